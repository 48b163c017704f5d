"""Making a run directory, or a preview's folder, and locking it; a refused start leaves nothing of it behind."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.core.errors import (
    MISPLACED,
    ConfigError,
    DamagedStateError,
    InputError,
    PipelineError,
    SpaceError,
    storage_error,
)
from pipeline.core.files import names_in, taken, unwritable
from pipeline.rundir.journal import Journal, standing
from pipeline.rundir.lock import RunLock
from pipeline.rundir.manifest import OtherFormatError, read_manifest
from pipeline.rundir.paths import STORE, journal_path, manifest_path, refuse_links_at_top, store_path

# What a start makes before anything is rendered; the lock last, so that it is there as long as anything else.
_LOCK = ("lock.owner", "lock")
_BEGUN = ("manifest.json", "manifest.json.partial", "journal.jsonl", f"{STORE}.partial", STORE, *_LOCK)


@contextmanager
def locked_folder(folder: Path) -> Iterator[RunLock]:
    """The folder, made if it is not there, and its lock.

    When the block is refused before a stage is prepared, what was begun is taken back, and the folders that were made.
    Nothing is that was there before. Raises what make_work_dir raises, LockedError.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    locks = {name for name in _LOCK if not taken(folder / name)}  # those that this start makes
    make_work_dir(folder)
    with RunLock(folder) as lock:
        before = {path.name for path in folder.iterdir()} - locks  # in the lock: nobody adds anything any more
        try:
            yield lock
        except (ConfigError, InputError, SpaceError, DamagedStateError):
            new = not before & {"manifest.json", "journal.jsonl"} and not _holds_stage(folder)
            with suppress(OSError):  # the refusal says more
                _take_back(folder, made, [name for name in (_BEGUN if new else _LOCK) if name not in before])
            raise


def _holds_stage(folder: Path) -> bool:
    try:
        return bool(standing(Journal(journal_path(folder)))[1].slots)
    except (PipelineError, OSError):
        return True  # for all we know


def _take_back(folder: Path, made: Sequence[Path], names: Sequence[str]) -> None:
    """Delete these, and the folders. Pictures of a preview that are there keep its journal, which knows them."""
    if names_in(folder) - set(_BEGUN):
        names = [name for name in names if name in _LOCK]
    for path in (folder / name for name in names):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in made:  # the innermost first; one that holds anything else stays
        path.rmdir()


def _is_a_runs(work_dir: Path) -> bool:
    """Whether there is a run, whole or not. Its manifest is its first file, and others have files of that name."""
    if taken(journal_path(work_dir)) or taken(store_path(work_dir)):
        return True
    try:
        read_manifest(manifest_path(work_dir))
    except OtherFormatError:
        return True
    except DamagedStateError:
        return False
    return True


def make_work_dir(work_dir: Path) -> None:
    """Make the run directory, or check that it is one.

    Raises ConfigError if it cannot serve, DamagedStateError if there are links in it, StorageError.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in MISPLACED:
            raise storage_error(work_dir, error) from error
        raise ConfigError(
            f"work_dir {work_dir}: cannot be made ({error.strerror}). Choose another work_dir."
        ) from error
    if (refusal := unwritable(work_dir)) is not None:
        if refusal.errno == errno.EROFS or manifest_path(work_dir).exists():  # it could once
            raise storage_error(work_dir, refusal)
        raise ConfigError(f"work_dir {work_dir}: cannot be written to. Change its permissions or choose another.")
    refuse_links_at_top(work_dir)
    ours = {"lock", "lock.owner", "manifest.json.partial"}
    names = names_in(work_dir)
    known = names & {"manifest.json", "journal.jsonl"}
    if (names - ours and not known) or (known and not _is_a_runs(work_dir)):
        raise ConfigError(
            f"work_dir {work_dir}: holds files that are not a run's, and a run deletes what it does not know. "
            "Choose an empty or a new folder."
        )
