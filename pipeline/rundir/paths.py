"""Where a run may write: nowhere through a link, and no picture over its own state.

A run directory, or a part of one, may come from a stranger, or out of an archive. A run writes into the files that it
finds there and deletes folders: through a link, or another name of the same file, those would be somebody else's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import ConfigError, DamagedStateError
from pipeline.core.files import real

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
    """Everything in a run's store that is a link, or is neither a file nor a folder, and what it is."""
    folders = [os.fspath(store_path(work_dir))]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                found = list(entries)
        except (FileNotFoundError, NotADirectoryError):  # a run at work deletes what it no longer needs
            continue
        for entry in found:
            if what := _link(entry):
                yield Path(entry.path), what
        folders += [entry.path for entry in found if entry.is_dir(follow_symlinks=False)]


def refuse_links_at_top(work_dir: Path) -> None:
    """The same for the directory's own entries alone: locking it would already empty the file that a link names."""
    with os.scandir(work_dir) as entries:
        for entry in entries:
            if what := _link(entry):
                raise _link_error(Path(entry.path), what)


SECOND_NAME = "has a second name elsewhere (a hard link)"


def _link(entry: os.DirEntry[str]) -> str | None:
    """What an entry is that no run makes; None for a folder or a file of one name, and for what is gone by now."""
    if entry.is_dir(follow_symlinks=False):
        return None
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:  # a run at work has deleted it
        return None
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if not stat.S_ISREG(status.st_mode):
        return "is a pipe, a socket or a device"
    return SECOND_NAME if status.st_nlink > 1 else None


def _link_error(path: Path, what: str) -> DamagedStateError:
    return DamagedStateError(
        f"{path}: {what}, and no run makes one. Going on would read or change what is not this run's. Delete it, "
        "and copy here what it stands for if that is yours, or use another work_dir."
    )


def refuse_own_state(output: Path, work_dir: Path) -> None:
    """Raise ConfigError if a picture of this name would replace the state of the run in `work_dir`, or a part of it."""
    picture, store = real(output), real(store_path(work_dir))
    if picture in (store, *store.parents) or store in picture.parents:
        raise ConfigError(
            f"output {output}: is, or is in, the state of the run in {work_dir}, which the picture would replace. "
            "Choose another name."
        )


def refuse_missing_folder(output: Path) -> None:
    """Raise ConfigError if a picture that the command line names would need a folder made for it.

    A mistyped name would else become a tree of folders, which stays there whatever becomes of the picture.
    """
    folder = output.absolute().parent
    if not os.access(folder, os.F_OK):
        raise ConfigError(f"{output}: there is no folder {folder}. Make it, or correct the name.")
