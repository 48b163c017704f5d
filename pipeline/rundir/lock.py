"""The lock that keeps a second run out of a run directory, and whose it is."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path

import psutil

from pipeline.core.errors import LockedError, SpaceError, storage
from pipeline.core.files import read_regular
from pipeline.rundir.records import MAX_OWNER_BYTES, parse_json

# How long a start waits for the worker processes of a run that was killed: the system kills them within a moment.
_LEFT_BEHIND_S = 10.0


class RunLock:
    """Keeps a second run out of a run directory.

    Released by the system however the process ends, once its worker processes, which inherit `descriptor`, have ended
    too: a file is closed after the last call that writes, so that nothing writes into a directory that can be locked.
    `named`: others have to be told who works here, which takes room on the disk; else they are if there is some.
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
        owner_text = json.dumps({"pid": process.pid, "started": process.create_time()})
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
            with contextlib.suppress(OSError):  # it names a process that has ended, which `running_owner` sees
                self._owner.unlink(missing_ok=True)
        os.close(self.descriptor)

    def _is_there(self) -> bool:
        """Whether the lock is still the folder's: a refused start takes both away, and another makes them anew."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), self._path.stat())
        except OSError:
            return False

    def _removed(self) -> LockedError:
        return LockedError(f"{self._path.parent}: was removed by another run, which did not begin. Try again.")

    def _acquire(self) -> None:
        """Lock, once what a killed run left has ended. Raises LockedError if a run works here, or that takes long."""
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
                who = f"another run is working here (process {owner})"
                left = "the worker processes of a run that was killed have not ended yet"
                raise LockedError(
                    f"{self._path.parent}: {left if owner is None else who}. Two runs would destroy each other's "
                    "state: wait for it, stop it, or choose another work_dir."
                ) from error


def running_owner(work_dir: Path) -> int | None:
    """The process id of the run that is working in `work_dir`, or None. Never disturbs it."""
    try:
        owner = parse_json(read_regular(work_dir / "lock.owner", MAX_OWNER_BYTES))
        process = psutil.Process(owner["pid"])
        alive = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - owner["started"]) < 1
        return int(owner["pid"]) if alive else None
    except (OSError, ValueError, LookupError, TypeError, OverflowError, psutil.Error):
        return None
