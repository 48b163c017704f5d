"""The lock of a run directory, and the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil

from pipeline.core.errors import LockedError, SpaceError, storage
from pipeline.core.files import read_regular
from pipeline.core.text import shown
from pipeline.rundir.records import MAX_OWNER_BYTES, parse_json

# How long a start waits for the worker processes of a killed run: the system kills them within a moment.
_LEFT_BEHIND_S = 10.0


class RunLock:
    """Locks a run directory against other runs. Raises LockedError on entry if another run holds the lock.

    The system releases the lock however the process ends, once its worker processes, which inherit `descriptor`, have
    ended too: a process closes its files after its last write, so that nothing writes into an unlocked directory.
    `named`: the file that names the owner is required; otherwise a full disk does not prevent the lock.
    """

    descriptor: int

    def __init__(self, work_dir: Path, named: bool = True):
        self._named = named
        self._owner = work_dir / "lock.owner"
        self._path = work_dir / "lock"

    def __enter__(self) -> RunLock:
        with storage(self._path):
            try:
                self.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError as error:
                raise self._removed() from error
        try:
            self._acquire()
            if not self._is_there():
                raise self._removed()
        except BaseException:
            os.close(self.descriptor)
            raise
        process = psutil.Process()
        owner_text = json.dumps({"pid": process.pid, "started": process.create_time(), "host": socket.gethostname()})
        try:
            with storage(self._owner):
                self._owner.write_text(owner_text, encoding="utf-8")
        except OSError as error:
            if self._named or not isinstance(error, SpaceError):
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_there():
            with contextlib.suppress(OSError):  # if it stays, `running_owner` finds that its process has ended
                self._owner.unlink(missing_ok=True)
        os.close(self.descriptor)

    def _is_there(self) -> bool:
        """Whether the locked file still has its name: a refused start deletes it, and another start makes a new one."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), self._path.stat())
        except OSError:
            return False

    def _removed(self) -> LockedError:
        return LockedError(f"{self._path.parent}: was removed by another run that did not start. Try again.")

    def _acquire(self) -> None:
        """Wait for the workers of a killed run, and lock. Raises LockedError if a run is alive, or after a timeout."""
        deadline = time.monotonic() + _LEFT_BEHIND_S
        while True:
            try:
                with storage(self._path):
                    fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                owner = running_owner(self._path.parent)
                if owner is None and time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                raise _locked(self._path.parent, owner) from error


def refuse_locked(work_dir: Path) -> None:
    """Raise LockedError if a run is active there. Takes no lock."""
    if (owner := running_owner(work_dir)) is not None:
        raise _locked(work_dir, owner)


def _locked(work_dir: Path, owner: int | None) -> LockedError:
    cause = "the worker processes of a run that was killed have not ended yet"
    if (host := _owner_in(work_dir).get("host")) not in (None, socket.gethostname()):
        cause = f"the run directory is locked by a run on another machine, {shown(str(host))}"
    elif owner is not None:
        cause = f"the run directory is locked by another run (process {owner})"
    return LockedError(
        f"{work_dir}: {cause}. Two runs would destroy each other's state: wait for it, stop it, or choose another "
        "work_dir."
    )


def running_owner(work_dir: Path) -> int | None:
    """The process id of the run that holds the lock of `work_dir`, or None. Takes no lock itself."""
    try:
        owner = _owner_in(work_dir)
        if owner.get("host", socket.gethostname()) != socket.gethostname():
            return None  # on another machine, whose processes cannot be seen from here
        process = psutil.Process(owner["pid"])
        # a process id may be in use again, by another process with another start time
        alive = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - owner["started"]) < 1
        return int(owner["pid"]) if alive else None
    except (OSError, ValueError, LookupError, TypeError, OverflowError, psutil.Error):
        return None


def _owner_in(work_dir: Path) -> dict[str, Any]:
    """What the file of the owner says; empty if it cannot be read."""
    try:
        owner = parse_json(read_regular(work_dir / "lock.owner", MAX_OWNER_BYTES))
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return owner if isinstance(owner, dict) else {}
