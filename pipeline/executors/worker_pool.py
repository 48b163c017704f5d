"""Worker processes on this machine, and the scheduler of dask.distributed that hands tasks to them.

    this process                                 worker processes (worker.py)
      the run's lock ─────── inherited ─────────►  hold it too: no run begins here while one of them lives
      scheduler and client ── 127.0.0.1, TLS ───►  a few tiles in flight each, one of them computing
      a keeper thread each ── starts, awaits ───►  killed by the system when their keeper ends

A worker that dies is replaced, and its tasks, which may run twice, are done again. Tasks whose results are no longer
wanted are ended with their processes: nothing of an old pass may be written during a later one.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import dask.config
from distributed import Client, Future, LocalCluster, Scheduler, Security
from distributed.diagnostics.plugin import SchedulerPlugin

from pipeline.core.errors import ConfigError
from pipeline.core.text import shown
from pipeline.executors import worker
from pipeline.executors.keepers import Keepers, ending, environment

# How many workers in a row may die before one is ready for tasks.
_STARTS = 3


class WorkerPool:
    """A scheduler and a client in this process, and the worker processes, one for each of `roles`."""

    tile_resource = worker.CPU_TILE

    def __init__(
        self,
        roles: Sequence[worker.Role],
        lock: int | None,
        note: Callable[[str], None],
        initialize: Callable[[], None],
    ):
        self._roles, self._lock, self._note = roles, lock, note
        self._initialize = initialize
        if any(role.is_on_gpu for role in roles):
            self.tile_resource = worker.GPU_TILE
        self._environment = environment()
        self._opened: ExitStack | None = None
        self._keepers: Keepers | None = None
        self._last_end = ""

    @property
    def name_prefix(self) -> str:
        """What the names of this pool's tasks begin with."""
        return ""

    def task(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What a worker calls for `function`."""
        return function

    def submit(
        self, graph: Mapping[str, Any], keys: Sequence[str], resources: Callable[[str], Mapping[str, int]]
    ) -> list[Future[Any]]:
        """Hand the graph to the scheduler; gives the futures of `keys`. `resources`: of each key, to be pickled."""
        calls: list[Future[Any]] = self.client.get(graph, list(keys), sync=False, resources=resources)
        return calls

    @contextmanager
    def counting(self, on_done: Callable[[str], None]) -> Iterator[None]:
        """Inside, `on_done` is called once with every key that is done, on the scheduler's thread."""
        self._register.count(on_done)
        try:
            yield
        finally:
            self._register.count(None)

    def call_everywhere(self, function: Callable[[], Any]) -> list[Any]:
        """What `function` gives in every worker process that answers."""
        if self._opened is None:
            return []
        answers: dict[str, Any] = self.client.run(function, on_error="ignore")
        return list(answers.values())

    def drop(self, calls: Sequence[Future[Any]]) -> None:
        """Kill all workers, with what they run; new ones are started at once. `calls` are not computed again."""
        if self._opened is None or self._keepers is None:
            return
        self.client.cancel(list(calls), force=True)
        self._keepers.drop()

    def raise_if_broken(self) -> None:
        """Raise the error that prevents workers from being started."""
        if self._keepers is not None and self._keepers.broken is not None:
            raise self._start_error(self._keepers.broken)

    def lost_error(self) -> Exception:
        """The error of tasks that the scheduler has lost; it is in this process."""
        return AssertionError("tasks were cancelled")

    def killer_error(self) -> ConfigError:
        """The error of a task during which several workers died."""
        return ConfigError(
            f"{worker.ALLOWED_DEATHS + 1} worker processes died over the same task; the last {self._last_end}. Most "
            "likely this machine has too little memory, or another program took it. Nothing that was committed is "
            "lost: run the same command again with fewer compute.workers, a smaller compute.tile_px or memory.limit, "
            "or when there is more memory."
        )

    def close(self) -> None:
        """Kill the workers, wait for their end, and close the scheduler."""
        if self._keepers is not None:
            self._keepers.close()
        if self._opened is not None:
            self._opened.close()

    def start(self) -> None:
        """Start the scheduler and the workers, if they are not there yet. Raises ConfigError if that is impossible."""
        if self._opened is not None:
            return
        try:
            _check_loopback()
            self._start_scheduler()
        except (OSError, RuntimeError) as error:  # distributed raises RuntimeError whatever the cause
            cause = error.__cause__ or error
            raise ConfigError(
                f"compute.workers: their scheduler could not be started on 127.0.0.1 ({shown(str(cause), 200)}). "
                "Nothing is lost: correct the cause, or use compute.workers: 0, which computes in one process."
            ) from error
        self._keepers = Keepers(
            self._roles, self._folder, self._lock, self._spec_of, self._worker_ended, self._environment
        )

    def _start_scheduler(self) -> None:
        with ExitStack() as opened:
            self._folder = Path(opened.enter_context(TemporaryDirectory(prefix="pipeline-")))
            opened.enter_context(dask.config.set(worker.SETTINGS))
            # a scheduler runs whatever it is sent, and every account of the machine can reach its port
            self._security = Security.temporary()  # type: ignore[no-untyped-call]
            cluster = LocalCluster(  # type: ignore[no-untyped-call]
                n_workers=0,
                host="127.0.0.1",
                protocol="tls",
                security=self._security,
                dashboard_address=worker.NO_PAGES,
                scheduler_kwargs={"dashboard": False},
                silence_logs=logging.CRITICAL,
            )
            opened.enter_context(cluster)
            client = Client(cluster, security=self._security, set_as_default=False)  # type: ignore[no-untyped-call]
            self.client: Any = opened.enter_context(client)
            self._address = cluster.scheduler_address
            self._register = _Register(self._kill)
            cast(Scheduler, cluster.scheduler).add_plugin(self._register)
            self._opened = opened.pop_all()

    def _spec_of(self, role: worker.Role) -> worker.WorkerSpec:
        return worker.WorkerSpec(self._address, os.getpid(), role, str(self._folder), self._security, self._initialize)

    def _worker_ended(self, pid: int, code: int, failed_starts: int) -> int:
        """Report it; gives the failed starts in a row. Raises _DeadAtStartError when they are too many."""
        self._last_end = ending(code)
        failed_starts = 0 if pid in self._register.pids else failed_starts + 1
        if failed_starts == _STARTS:
            raise _DeadAtStartError(
                f"{_STARTS} worker processes ended before they could work; the last {self._last_end}"
            )
        self._note(f"worker process {pid} {self._last_end}; a new one repeats its tasks")
        return failed_starts

    def _start_error(self, error: Exception) -> Exception:
        """The error of a keeper that starts no more workers."""
        if isinstance(error, OSError):
            what, said = f"a worker process could not be started ({error.strerror})", ""
        elif isinstance(error, _DeadAtStartError):
            what, said = str(error), cast(Keepers, self._keepers).last_words()
        else:
            return error
        return ConfigError(
            f"compute.workers: {what}.{said} Nothing is lost: correct the cause, or use compute.workers: 0, which "
            "computes in one process."
        )

    def _kill(self, pid: int) -> None:
        if self._keepers is not None:
            self._keepers.kill(pid)


class _DeadAtStartError(Exception):
    """Worker processes end before they can work."""


class _Register(SchedulerPlugin):
    """Counts the tasks that are done, and the workers that were ready once.

    `kill` ends the process of a worker that the scheduler gives up.
    """

    def __init__(self, kill: Callable[[int], None]):
        self.pids: set[int] = set()
        self._by_address: dict[str, int] = {}
        self._kill = kill
        self._done: set[str] = set()
        self._on_done: Callable[[str], None] | None = None

    def count(self, on_done: Callable[[str], None] | None) -> None:
        """Call `on_done` from now on; None: nothing."""
        self._done, self._on_done = set(), on_done

    def transition(self, key: Any, start: str, finish: str, *_: Any, **_options: Any) -> None:
        """Called by the scheduler, also for tasks that are done again because their worker died."""
        if finish == "memory" and self._on_done is not None and key not in self._done:
            self._done.add(key)
            self._on_done(key)

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        self._by_address[worker] = int(str(scheduler.workers[worker].name))
        self.pids.add(self._by_address[worker])

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: object) -> None:
        self._kill(self._by_address.pop(worker))


def _check_loopback() -> None:
    """Raise OSError if this machine, or its container, has no loopback device: distributed would try for 30 s."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        pass
