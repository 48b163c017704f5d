"""A scheduler and workers as processes of their own, to be killed at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from pipeline.executors.addresses import find_scheduler
from pipeline.executors.cluster_pool import connected
from tests.support.e2e import PIPELINE, TIMEOUT_S

# One thread each, as the runs have it.
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def wait_for(condition: Callable[[], bool], what: str = "") -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class Cluster:
    """`pipeline scheduler` and `pipeline worker`s in one folder, on the loopback device."""

    def __init__(self, folder: Path):
        self.folder = folder / "cluster"
        self._log = folder / "cluster.log"
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []

    def start_scheduler(self) -> None:
        (self.folder / "scheduler.json").unlink(missing_ok=True)  # of one that was killed
        self.scheduler = self._start("scheduler", self.folder, "--host", "127.0.0.1")
        wait_for((self.folder / "scheduler.json").exists, self.log)

    def start_worker(self, *prefix: str) -> None:
        """`prefix`: a command that starts the worker, as in `nice`."""
        self.workers.append(self._start("worker", self.folder, "--devices", "cpu", prefix=prefix))

    def _start(self, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen([*prefix, PIPELINE, *map(str, arguments)], stdout=log, stderr=log, env=_ENVIRONMENT)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def processes(self) -> list[psutil.Process]:
        """The processes that compute, each a child of a `pipeline worker`."""
        found = []
        for worker in self.workers:
            with suppress(psutil.Error):
                found += psutil.Process(worker.pid).children()
        return found

    def joined(self) -> int:
        """How many processes the scheduler can give tasks to."""
        with connected(find_scheduler(self.folder, None)) as client:
            return len(client.scheduler_info(n_workers=-1)["workers"])

    def kill_process(self, number: int = 0) -> None:
        """Kill one that computes; its `pipeline worker` starts another."""
        with suppress(psutil.Error, IndexError):
            self.processes()[number].kill()

    def kill_worker(self, number: int = 0) -> None:
        """Kill a `pipeline worker`; the system kills what it started."""
        _kill(self.workers.pop(number))

    def kill_scheduler(self) -> None:
        if self.scheduler is not None:
            _kill(self.scheduler)
        self.scheduler = None

    def close(self) -> None:
        while self.workers:
            self.kill_worker()
        self.kill_scheduler()


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
