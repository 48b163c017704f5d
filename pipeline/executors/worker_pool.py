"""Worker processes on this machine, and the scheduler of dask.distributed that hands tasks to them.

    this process                                 worker processes (worker.py)
      the run's lock ─────── inherited ─────────►  hold it too: no run begins here while one of them lives
      scheduler and client ── 127.0.0.1, TLS ───►  a few tiles in flight each, one of them computing
      a keeper thread each ── starts, awaits ───►  killed by the system when their keeper ends

A worker that dies is replaced, and its tasks, which may run twice, are done again. Tasks whose results are no longer
wanted are ended with their processes: nothing of an old pass may be written during a later one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

import dask.config
from distributed import Client, Future, LocalCluster, Scheduler, Security
from distributed.diagnostics.plugin import SchedulerPlugin

from pipeline.core.errors import ConfigError
from pipeline.core.isolation import own_environment
from pipeline.core.text import shown
from pipeline.executors import worker

# What a worker process runs. The settings come first: distributed heeds them while it is imported.
_WORKER = """
from pipeline.executors.library import enter_dask_settings
enter_dask_settings()
from pipeline.executors.worker import main
main()
"""
# How many workers in a row may die before one is ready for tasks.
_STARTS = 3
# Ctrl-C and the end of a terminal signal the whole process group, but only the parent stops workers.
_PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class WorkerPool:
    """A scheduler and a client in this process, and the worker processes, each watched by a keeper thread."""

    def __init__(
        self,
        processes: int,
        tiles: int,
        lock: int | None,
        note: Callable[[str], None],
        initialize: Callable[[], None],
    ):
        self._processes, self._tiles, self._lock, self._note = processes, tiles, lock, note
        self._initialize = initialize
        self._environment = own_environment(os.environ)  # a worker that is started later computes as the first ones do
        self._opened: ExitStack | None = None
        self._keepers: list[threading.Thread] = []
        self._state = threading.Lock()  # guards the attributes below
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self._dropped: set[int] = set()
        self._closing = False
        self._last_end = ""
        self._broken: Exception | None = None

    def submit(
        self, graph: Mapping[str, Any], keys: Sequence[str], resources: Callable[[str], Mapping[str, int]]
    ) -> list[Future[Any]]:
        """Hand the graph to the scheduler; gives the futures of `keys`. `resources`: of each key, to be pickled."""
        calls: list[Future[Any]] = self._client.get(graph, list(keys), sync=False, resources=resources)
        return calls

    @contextmanager
    def counting(self, on_done: Callable[[str], None]) -> Iterator[None]:
        """Inside, `on_done` is called once with every key that is done, on the scheduler's thread."""
        self._register.count(on_done)
        try:
            yield
        finally:
            self._register.count(None)

    def fetch(self, call: Future[Any]) -> futures.Future[Any]:
        """Begin to fetch a value. One that is lost with its worker is computed again."""
        gathering: Coroutine[Any, Any, Any] = self._client.gather(call, asynchronous=True)
        return asyncio.run_coroutine_threadsafe(gathering, self._loop)

    def call_everywhere(self, function: Callable[[], Any]) -> list[Any]:
        """What `function` gives in every worker process that answers."""
        if self._opened is None:
            return []
        answers: dict[str, Any] = self._client.run(function, on_error="ignore")
        return list(answers.values())

    def drop(self, calls: Sequence[Future[Any]]) -> None:
        """Kill all workers, with what they run; new ones are started at once. `calls` are not computed again."""
        if self._opened is None:
            return
        self._client.cancel(list(calls), force=True)
        with self._state:
            killed = list(self._workers.values())
            for process in killed:
                self._dropped.add(process.pid)
                process.kill()
        for process in killed:
            process.wait()

    def raise_if_broken(self) -> None:
        """Raise the error that prevents workers from being started."""
        if self._broken is not None:
            raise self._broken

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
        with self._state:
            self._closing = True
            for process in self._workers.values():
                process.kill()
        for keeper in self._keepers:
            keeper.join()
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
        self._keepers = [threading.Thread(target=self._keep, daemon=True) for _ in range(self._processes)]
        for keeper in self._keepers:
            keeper.start()

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
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
                silence_logs=logging.CRITICAL,
            )
            opened.enter_context(cluster)
            client = Client(cluster, security=self._security, set_as_default=False)  # type: ignore[no-untyped-call]
            self._client = opened.enter_context(client)
            self._loop: asyncio.AbstractEventLoop = cast(Any, client.loop).asyncio_loop
            self._address = cluster.scheduler_address
            self._register = _Register(self._kill)
            cast(Scheduler, cluster.scheduler).add_plugin(self._register)
            self._opened = opened.pop_all()

    def _keep(self) -> None:
        """Start a worker, wait for its end, start the next. The kernel kills the worker if this thread ends."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS_SIGNALS)  # inherited by the worker
        failed_starts = 0
        try:
            while (process := self._start_worker()) is not None:
                ending = _ending(process.wait())
                with self._state:
                    del self._workers[process.pid]
                    if self._closing or process.pid in self._dropped:
                        continue
                    self._last_end = ending
                failed_starts = 0 if process.pid in self._register.pids else failed_starts + 1
                if failed_starts == _STARTS:
                    raise self._start_error(
                        f"{_STARTS} worker processes ended before they could work; the last {ending}"
                    )
                self._note(f"worker process {process.pid} {ending}; a new one repeats its tasks")
        except OSError as error:
            self._broken = self._start_error(f"a worker process could not be started ({error.strerror})")
        except Exception as error:  # whatever it is: the thread that waits for tasks has to raise it
            self._broken = error

    def _start_worker(self) -> subprocess.Popen[bytes] | None:
        """A new worker process, or None if the cluster closes."""
        # everything that tasks can be imported from here; -P keeps the current folder out
        path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
        spec = worker.WorkerSpec(
            self._address, os.getpid(), self._tiles, str(self._folder), self._security, self._initialize
        )
        with self._state, self._log.open("ab") as log:
            if self._closing:
                return None
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _WORKER],
                env={**self._environment, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=() if self._lock is None else (self._lock,),
            )
            self._workers[process.pid] = process
        with suppress(BrokenPipeError), cast(IO[bytes], process.stdin) as stdin:  # it may have ended already
            stdin.write(pickle.dumps(spec))
        return process

    @property
    def _log(self) -> Path:
        """The log that workers write: distributed says there why one ended."""
        return self._folder / "workers.log"

    def _start_error(self, what: str) -> ConfigError:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = next((f" Their last words: {line.strip()}" for line in reversed(lines) if line.strip()), "")
        return ConfigError(
            f"compute.workers: {what}.{said} Nothing is lost: correct the cause, or use compute.workers: 0, which "
            "computes in one process."
        )

    def _kill(self, pid: int) -> None:
        with self._state:
            if pid in self._workers:
                self._workers[pid].kill()


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


def _ending(code: int) -> str:
    """Describes how a process ended."""
    if code >= 0:
        return f"ended with code {code}"
    hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"
