"""Making a run directory, or a preview's folder, and locking it; a refused start leaves nothing of it behind."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import MISPLACED, ConfigError, InputError, PipelineError, SpaceError, storage_error
from pipeline.journal import Journal, standing
from pipeline.lock import RunLock
from pipeline.places import STORE, journal_path, manifest_path, names_in, refuse_links_at_top, taken, unwritable

# What a start makes before anything is rendered; the lock last, so that it is there as long as anything else.
_BEGUN = ("manifest.json", "manifest.json.partial", "journal.jsonl", f"{STORE}.partial", STORE, "lock.owner", "lock")


@contextmanager
def locked_folder(folder: Path) -> Iterator[RunLock]:
    """The folder, made if it is not there, and its lock.

    When the block is refused before a stage is prepared, what was begun is taken back, and the folders that were made.
    Raises what make_work_dir raises, LockedError.
    """
    new = not (taken(journal_path(folder)) or taken(manifest_path(folder)))
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_work_dir(folder)
    with RunLock(folder) as lock:
        try:
            yield lock
        except (ConfigError, InputError, SpaceError):
            if new and not _holds_stage(folder):
                with suppress(OSError):  # the refusal says more
                    _take_back(folder, made)
            raise


def _holds_stage(folder: Path) -> bool:
    try:
        return bool(standing(Journal(journal_path(folder)))[1].slots)
    except (PipelineError, OSError):
        return True  # for all we know


def _take_back(folder: Path, made: Sequence[Path]) -> None:
    """Only what a start makes, and only if there is nothing else: pictures of a preview are kept, with its journal."""
    if names_in(folder) - set(_BEGUN):
        return
    for path in (folder / name for name in _BEGUN):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in made:  # the innermost first; one that holds anything else stays
        path.rmdir()


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
    if not names & {"manifest.json", "journal.jsonl"} and names - ours:
        raise ConfigError(
            f"work_dir {work_dir}: holds files that are not a run's, and a run deletes what it does not know. "
            "Choose an empty or a new folder."
        )
