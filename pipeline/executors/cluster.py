"""The scheduler and the workers of a cluster, as `pipeline scheduler` and `pipeline worker` start them."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import dask.config
from distributed import Scheduler, Security

from pipeline.core.errors import ConfigError, LockedError, Stopped, storage
from pipeline.core.text import shown
from pipeline.executors.addresses import (
    KEY_FILE,
    ClusterAddress,
    find_scheduler,
    make_key,
    read_key,
    write_scheduler_file,
)
from pipeline.executors.keepers import Keepers, ending, environment
from pipeline.executors.worker import NO_PAGES, NO_SCHEDULER, SETTINGS, Role, WorkerSpec

# Of a cluster whose machines come and go, a task may lose more workers than on one machine.
_ALLOWED_DEATHS = 10
# A machine that does not answer for this long is lost: without power it closes no connection.
_SILENT_S = "120s"
# A process that lived for this long did not fail at its start. The longest pause before the next start.
_LIVED_S, _LONGEST_PAUSE_S = 60.0, 15.0
_POLL_S = 0.5
# How long a worker that is to end may hand over results that others need.
GRACE_S = 20.0


def serve_scheduler(
    folder: Path, host: str | None, port: int, stop: threading.Event, ready: Callable[[str, Path], None]
) -> None:
    """Serve a cluster until `stop` is set. Writes its key, unless there is one, and its scheduler file to `folder`.

    `host`: address to serve, None: all of this machine. Raises ConfigError if it cannot be served, LockedError if
    another scheduler serves the folder, StorageError.
    """
    key = folder / KEY_FILE
    if not key.exists():
        make_key(key)
    security = read_key(key)
    with storage(key):
        file = key.open("r+b")
    with file as locked:  # the system releases the lock however this process ends
        try:
            fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(
                f"{folder}: another scheduler serves this folder. A second one would take its workers from running "
                "work: use that one, stop it first, or choose another folder."
            ) from error
        _serve(folder, host, port, security, stop, ready)


def _serve(
    folder: Path,
    host: str | None,
    port: int,
    security: Security,
    stop: threading.Event,
    ready: Callable[[str, Path], None],
) -> None:
    settings = {
        **SETTINGS,
        "distributed.scheduler.allowed-failures": _ALLOWED_DEATHS,
        "distributed.scheduler.worker-ttl": _SILENT_S,
    }
    logging.getLogger("distributed").setLevel(logging.ERROR)

    async def serve() -> None:
        try:
            scheduler = await Scheduler(
                host=host, port=port, protocol="tls", security=security, dashboard=False, dashboard_address=NO_PAGES
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"a scheduler cannot listen at port {port} ({shown(str(error), 200)}).") from error
        async with scheduler:
            file = write_scheduler_file(folder, scheduler.address)
            ready(scheduler.address, file)
            while not stop.is_set():
                await asyncio.sleep(0.1)
            file.unlink(missing_ok=True)

    with dask.config.set(settings):
        asyncio.run(serve())


def serve_workers(
    scheduler: str | Path,
    key: Path | None,
    roles: Sequence[Role],
    initialize: Callable[[], None],
    stop: threading.Event,
    note: Callable[[str], None],
) -> None:
    """Keep a worker process for each role at work for a scheduler, whenever it is there, until `stop` is set.

    `initialize`: called once in every worker; to be pickled. Raises ConfigError for an address or key that cannot be
    used, OSError if no process can be started.
    """
    if not isinstance(scheduler, Path):
        find_scheduler(scheduler, key)  # refused at once; a file may appear later
    with TemporaryDirectory(prefix="pipeline-") as folder:
        workers = _Workers(scheduler, key, folder, initialize, stop, note)
        keepers = Keepers(roles, Path(folder), None, workers.spec_of, workers.ended, environment())
        try:
            while not stop.wait(0.2):
                if keepers.broken is not None:
                    raise keepers.broken
        finally:
            keepers.close(GRACE_S)


class _Workers:
    """What worker processes are told, and what the user is told of their ends."""

    def __init__(
        self,
        scheduler: str | Path,
        key: Path | None,
        folder: str,
        initialize: Callable[[], None],
        stop: threading.Event,
        note: Callable[[str], None],
    ):
        self._scheduler, self._key, self._folder = scheduler, key, folder
        self._initialize, self._stop, self._note = initialize, stop, note
        self._lock = threading.Lock()
        self._is_told = False
        self._begun: dict[int, float] = {}

    def spec_of(self, role: Role) -> WorkerSpec:
        """Called before every start: the scheduler may have moved."""
        where = self._find()
        self._begun[threading.get_ident()] = time.monotonic()
        return WorkerSpec(
            where.address,
            os.getpid(),
            role,
            self._folder,
            where.security,
            self._initialize,
            name=f"{socket.gethostname()}-{role.device or 'cpu'}",
            host=None if where.protocol == "tls" else "127.0.0.1",  # unencrypted: for this machine alone
        )

    def _find(self) -> ClusterAddress:
        """The scheduler, as soon as it is there. Raises ConfigError for an unusable file or key."""
        while True:
            try:
                where = find_scheduler(self._scheduler, self._key)
            except ConfigError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                self._say(f"waiting for a scheduler: {error}")
            else:
                if _answers(where):
                    self._is_told = False
                    return where
                self._say(f"waiting for the scheduler at {where.address}")
            if self._stop.wait(_POLL_S):
                raise Stopped

    def ended(self, pid: int, code: int, failed: int) -> int:
        """Pause before the next start, the longer the more often it failed; gives how often."""
        lived = time.monotonic() - self._begun[threading.get_ident()] > _LIVED_S
        if code != NO_SCHEDULER:
            self._note(f"worker process {pid} {ending(code)}; a new one takes its place")
        failed = 1 if lived or code == NO_SCHEDULER else failed + 1
        self._stop.wait(min(_LONGEST_PAUSE_S, 2.0 ** (failed - 1) / 2))
        return failed

    def _say(self, message: str) -> None:
        """Once, though every process has its keeper."""
        with self._lock:
            if not self._is_told:
                self._note(message)
            self._is_told = True


def _answers(where: ClusterAddress) -> bool:
    """Whether something listens at the address."""
    parts = urlsplit(where.address)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5):
            return True
    except OSError:
        return False
