"""The folder of a config's previews, beside its output: its lock, and the record of the images written from it.

out/harbour.png                    the config's output
out/harbour.preview.png            a contact sheet
out/harbour.preview/journal.jsonl  the images that were written, which may be overwritten
out/harbour.preview/…              the runs that they are made from
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config
from pipeline.core.errors import ConfigError, storage
from pipeline.core.files import names_in, path_fault, real, taken, write_whole
from pipeline.core.text import shown
from pipeline.rundir import (
    Exported,
    Exporting,
    Journal,
    journal_path,
    locked_folder,
    manifest_path,
    named_inputs,
    now,
    refuse_foreign,
    refuse_inputs,
    refuse_own_state,
    standing,
    written_picture,
)

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


def folder_of(config: Config) -> Path:
    """The folder of a config's previews."""
    return config.output.with_name(f"{config.output.stem}.preview")


@dataclass(frozen=True)
class Claim:
    """The right to write `image` while `folder` is locked."""

    folder: Path
    image: Path
    journal: Journal
    force: bool

    def refuse_foreign(self) -> None:
        """Raise ConfigError if there is a file of that name that no preview of this config wrote."""
        if not self.force:
            refuse_foreign(self.image, standing(self.journal)[1].pictures, "no preview of this config made it")

    def record(self, whole: Path) -> None:
        """Record the complete file before it is renamed, so that a later preview may overwrite it, and nothing else."""
        written = written_picture(whole)
        self.refuse_foreign()
        self.journal.append(Exporting(output=str(self.image), picture=written, time=now()))

    def done(self) -> None:
        """Record that the file has been renamed to its name."""
        written = standing(self.journal)[1].pictures[str(self.image)][-1]
        self.journal.append(Exported(output=str(self.image), picture=written, time=now()))


@contextmanager
def claimed(config: Config, image: Path, force: bool, suffixes: Sequence[str] = SUFFIXES) -> Iterator[Claim]:
    """Lock the folder of the config's previews for one that will write `image`; a refused one leaves no folder.

    `force`: overwrite a file that no preview of this config wrote. Raises ConfigError if the image would replace
    anything else, or the folder is not one of previews; LockedError if another preview is running.
    """
    folder = folder_of(config)
    _refuse_place(config, folder, image, suffixes)
    with storage(folder):
        _refuse_foreign(folder)
        with locked_folder(folder):
            journal = Journal(journal_path(folder))
            journal.repair_tail()
            if not taken(journal.path):  # the journal marks the folder as one of previews
                write_whole(journal.path, b"")
            claim = Claim(folder, image, journal, force)
            claim.refuse_foreign()
            yield claim


def _refuse_place(config: Config, folder: Path, image: Path, suffixes: Sequence[str]) -> None:
    """Raise ConfigError if the image or the folder would replace the config's inputs, output or run directory."""
    if fault := path_fault(image):
        raise ConfigError(f"-o {shown(str(image))}: {fault}. Choose another name.")
    if image.suffix.lower() not in suffixes:
        raise ConfigError(f"{image}: a preview is one file; choose a name that ends in {', '.join(suffixes)}.")
    refuse_inputs(image, [*named_inputs(config), ("output", config.output)])
    refuse_own_state(image, config.work_dir)
    if real(folder) in real(image).parents:
        raise ConfigError(f"{image}: is in {folder}, the folder of the preview's runs. Choose another place with -o.")
    work_dir, own = real(config.work_dir), real(folder)
    if work_dir == own or work_dir in own.parents or own in work_dir.parents:
        raise ConfigError(
            f"{folder}: is the folder of the config's previews, and its work_dir, {config.work_dir}, is the same "
            "folder, or one contains the other. Choose another work_dir or output."
        )


def _refuse_foreign(folder: Path) -> None:
    if taken(manifest_path(folder)):
        raise ConfigError(
            f"{folder}: would be the folder of the previews, but it is a run directory. Choose another output."
        )
    if names_in(folder) - {"lock", "lock.owner"} and not taken(journal_path(folder)):
        raise ConfigError(
            f"{folder}: would be the folder of the previews, but it contains other files. Move it away, or choose "
            "another output."
        )
