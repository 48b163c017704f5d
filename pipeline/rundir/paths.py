"""The paths of a run directory, and the refusal of links in it and of outputs that would overwrite it.

A run directory may come from a stranger or from an archive. A run overwrites files in it and deletes folders; through
symbolic or hard links it would change files outside.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.config import AnyConfig, dotted, input_files
from pipeline.core.errors import ConfigError, DamagedStateError
from pipeline.core.files import real, would_replace

STORE = "store.zarr"


def store_path(work_dir: Path) -> Path:
    """The Zarr group of a run."""
    return work_dir / STORE


def journal_path(work_dir: Path) -> Path:
    """The journal of a run."""
    return work_dir / "journal.jsonl"


def manifest_path(work_dir: Path) -> Path:
    """The manifest of a run."""
    return work_dir / "manifest.json"


def refuse_links(work_dir: Path) -> None:
    """Raise DamagedStateError if anything in a run directory is a link, or is neither a file nor a folder."""
    refuse_links_at_top(work_dir)
    for path, what in links_in_store(work_dir):
        raise _link_error(path, what)


def links_in_store(work_dir: Path) -> Iterator[tuple[Path, str]]:
    """(path, description) of everything in the store that is a link, or neither a file nor a folder."""
    folders = [os.fspath(store_path(work_dir))]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                listing = list(entries)
        except (FileNotFoundError, NotADirectoryError):  # an active run deletes what it no longer needs
            continue
        for entry in listing:
            if what := _link(entry):
                yield Path(entry.path), what
        folders += [entry.path for entry in listing if entry.is_dir(follow_symlinks=False)]


def refuse_links_at_top(work_dir: Path) -> None:
    """The same for the top level alone. Called before locking, which would truncate the target of a link."""
    with os.scandir(work_dir) as entries:
        for entry in entries:
            if what := _link(entry):
                raise _link_error(Path(entry.path), what)


SECOND_NAME = "has a second name elsewhere (a hard link)"


def _link(entry: os.DirEntry[str]) -> str | None:
    """A description of an entry that no run makes; None for folders, ordinary files and deleted entries."""
    if entry.is_dir(follow_symlinks=False):
        return None
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:  # an active run has deleted it
        return None
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if not stat.S_ISREG(status.st_mode):
        return "is a pipe, a socket or a device"
    return SECOND_NAME if status.st_nlink > 1 else None


def _link_error(path: Path, what: str) -> DamagedStateError:
    return DamagedStateError(
        f"{path}: {what}, and no run makes one. To resume would read or change a file outside this run. Delete it, "
        "and copy its target here if that is yours, or use another work_dir."
    )


def refuse_own_state(output: Path, work_dir: Path) -> None:
    """Raise ConfigError if an output image at this path would overwrite the state of the run in `work_dir`."""
    image, store = real(output), real(store_path(work_dir))
    if image in (store, *store.parents) or store in image.parents:
        raise ConfigError(
            f"output {output}: is, or is in, the state of the run in {work_dir}, which the image would overwrite. "
            "Choose another name."
        )


def named_inputs(config: AnyConfig) -> Iterator[tuple[str, Path]]:
    """(dotted key, path) of every file that a config reads."""
    return ((dotted(key), path) for key, path in input_files(config))


def refuse_inputs(output: Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """Raise ConfigError if writing `output` would destroy one of the (dotted key, path) that a config reads.

    Not even --force allows it: the originals are gone, and the run, whose inputs have changed, with them.
    """
    for key, path in inputs:
        if would_replace(output, path):
            raise ConfigError(
                f"{output}: is the config's {key}, or a folder that holds it, which would be overwritten, with or "
                "without --force. Choose another name."
            )


def refuse_missing_folder(output: Path) -> None:
    """Raise ConfigError if the folder of an output path from the command line does not exist.

    It is not created, because a mistyped path would leave a tree of empty folders.
    """
    folder = output.absolute().parent
    if not os.access(folder, os.F_OK):
        raise ConfigError(f"{output}: there is no folder {folder}. Make it, or correct the name.")
