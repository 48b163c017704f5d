"""Where previews of a config lie: their folder beside its output, its lock, and which pictures are its own.

out/harbour.png                    the config's output
out/harbour.preview.png            a contact sheet
out/harbour.preview/journal.jsonl  what was written here, and may be replaced
out/harbour.preview/…              what they are made of
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.config import Config, input_files
from pipeline.config.yaml_reader import dotted
from pipeline.core.errors import ConfigError, storage
from pipeline.core.files import names_in, path_fault, real, same_file, taken, write_whole
from pipeline.core.text import shown
from pipeline.rundir.journal import Journal, standing
from pipeline.rundir.open import now
from pipeline.rundir.paths import journal_path, manifest_path, refuse_own_state
from pipeline.rundir.records import Exported, Exporting
from pipeline.rundir.results import refuse_foreign, written_picture
from pipeline.rundir.run_folder import locked_folder

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


def folder_of(config: Config) -> Path:
    """The folder of a config's previews."""
    return config.output.with_name(f"{config.output.stem}.preview")


@dataclass(frozen=True)
class Claim:
    """The right to make `picture` in `folder`, while it is locked."""

    folder: Path
    picture: Path
    journal: Journal
    force: bool

    def refuse_foreign(self) -> None:
        """Raise ConfigError if there is a picture of that name which no preview of the config wrote."""
        if not self.force:
            pictures = standing(self.journal)[1].pictures
            refuse_foreign(self.picture, pictures, "no preview of this config made it")

    def record(self, whole: Path) -> None:
        """Remember what is about to get the picture's name: the next preview may replace that, and nothing else."""
        made = written_picture(whole)
        self.refuse_foreign()
        self.journal.append(Exporting(output=str(self.picture), picture=made, time=now()))

    def done(self) -> None:
        """The picture has its name: whatever had it before is gone."""
        picture = standing(self.journal)[1].pictures[str(self.picture)][-1]
        self.journal.append(Exported(output=str(self.picture), picture=picture, time=now()))


@contextmanager
def claimed(config: Config, picture: Path, force: bool) -> Iterator[Claim]:
    """The folder of the config's previews, locked, for one that will make `picture`; none is left by a refused one.

    `force`: replace a picture that no preview of this config made. Raises ConfigError if the picture would replace
    anything else, or the folder is not one of previews; LockedError if another preview works there.
    """
    folder = folder_of(config)
    _refuse_place(config, folder, picture)
    with storage(folder):
        _refuse_foreign(folder)
        with locked_folder(folder):
            journal = Journal(journal_path(folder))
            journal.repair_tail()
            if not taken(journal.path):  # by this the next preview knows the folder
                write_whole(journal.path, b"")
            claim = Claim(folder, picture, journal, force)
            claim.refuse_foreign()
            yield claim


def _refuse_place(config: Config, folder: Path, picture: Path) -> None:
    """Raise ConfigError if the picture, or the folder, would be in place of what the config reads or makes."""
    if fault := path_fault(picture):
        raise ConfigError(f"-o {shown(str(picture))}: {fault}. Choose another name.")
    if picture.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{picture}: a preview is one file; give a name that ends in {', '.join(SUFFIXES)}.")
    named = [*((dotted(key), path) for key, path in input_files(config)), ("output", config.output)]
    for key, path in named:
        if same_file(path, picture):
            raise ConfigError(f"{picture}: is the config's {key}. Choose another name with -o.")
    refuse_own_state(picture, config.work_dir)
    if real(folder) in real(picture).parents:
        raise ConfigError(f"{picture}: is in {folder}, among what previews are made of. Choose another place with -o.")
    work_dir, own = real(config.work_dir), real(folder)
    if work_dir == own or work_dir in own.parents or own in work_dir.parents:
        raise ConfigError(
            f"{folder}: previews are kept here, and the config's work_dir, {config.work_dir}, is the same folder, "
            "or one lies in the other. Choose another work_dir or output."
        )


def _refuse_foreign(folder: Path) -> None:
    if taken(manifest_path(folder)):
        raise ConfigError(f"{folder}: previews would be kept here, but it is a run's folder. Choose another output.")
    if names_in(folder) - {"lock", "lock.owner"} and not taken(journal_path(folder)):
        raise ConfigError(
            f"{folder}: previews would be kept here, but it holds files that are none. Move it away, or choose "
            "another output."
        )
