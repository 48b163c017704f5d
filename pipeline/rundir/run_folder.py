"""Creates and locks a run directory or a preview's folder; a refused start leaves nothing behind."""

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

# What a start creates before it renders. The lock is last, so that it is deleted after everything that it protects.
_LOCK = ("lock.owner", "lock")
# The files of a cluster's fence (executors/fence.py).
_FENCE = ("tasks.probe", "tasks.token", "tasks.lock")
_BEGUN = ("manifest.json", "manifest.json.partial", "journal.jsonl", f"{STORE}.partial", STORE, *_FENCE, *_LOCK)


@contextmanager
def locked_folder(folder: Path) -> Iterator[RunLock]:
    """Create the folder if it does not exist, and hold its lock.

    If the block is refused before a stage is prepared, all files and folders that this start created are deleted.
    Raises what make_work_dir raises, LockedError.
    """
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    new_locks = {name for name in _LOCK if not taken(folder / name)}
    make_work_dir(folder)
    with RunLock(folder) as lock:
        before = {path.name for path in folder.iterdir()} - new_locks  # under the lock, no other run adds files
        try:
            yield lock
        except (ConfigError, InputError, SpaceError, DamagedStateError):
            new = not before & {"manifest.json", "journal.jsonl"} and not _holds_stage(folder)
            with suppress(OSError):  # the refusal is the more useful error
                _discard(folder, new_folders, [name for name in (_BEGUN if new else _LOCK) if name not in before])
            raise


def _holds_stage(folder: Path) -> bool:
    try:
        return standing(Journal(journal_path(folder)))[1].is_fixed
    except (PipelineError, OSError):
        return True  # it may hold one, which must not be deleted


def _discard(folder: Path, new_folders: Sequence[Path], names: Sequence[str]) -> None:
    """Delete these files and folders; only the lock if there are images of a preview, whose journal identifies them."""
    if names_in(folder) - set(_BEGUN):
        names = [name for name in names if name in _LOCK]
    for path in (folder / name for name in names):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in new_folders:  # the innermost first; one that is not empty stays
        path.rmdir()


def _is_a_runs(work_dir: Path) -> bool:
    """Whether there is a run, damaged or not. A manifest alone has to be valid: other programs use that name too."""
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
    """Create the run directory, or check that it is one.

    Raises ConfigError if it cannot be used, DamagedStateError if there are links in it, StorageError.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_creatable(work_dir, error) from error
    check_work_dir(work_dir)


def refuse_misplaced(work_dir: Path) -> None:
    """Raise ConfigError if no folder can have this path, before anything is read from it."""
    try:
        work_dir.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _not_creatable(work_dir, error) from error


def _not_creatable(work_dir: Path, error: OSError) -> Exception:
    if error.errno not in MISPLACED:
        return storage_error(work_dir, error)
    return ConfigError(f"work_dir {work_dir}: cannot be created ({error.strerror}). Choose another work_dir.")


def check_work_dir(work_dir: Path) -> None:
    """Check that an existing folder can be a run directory. Raises as make_work_dir."""
    if (refusal := unwritable(work_dir)) is not None:
        if refusal.errno == errno.EROFS or manifest_path(work_dir).exists():  # it was writable when the run began
            raise storage_error(work_dir, refusal)
        raise ConfigError(f"work_dir {work_dir}: cannot be written to. Change its permissions or choose another.")
    refuse_links_at_top(work_dir)
    ours = {"manifest.json.partial", *_FENCE, *_LOCK}
    names = names_in(work_dir)
    run_files = names & {"manifest.json", "journal.jsonl"}
    if (names - ours and not run_files) or (run_files and not _is_a_runs(work_dir)):
        raise ConfigError(
            f"work_dir {work_dir}: holds files that are not a run's, and a run deletes unknown files. "
            "Choose an empty or a new folder."
        )
