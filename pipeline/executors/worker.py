"""A worker process: it runs tasks for the process that started it, and does not outlive it (worker_pool.py)."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import pickle
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dask.config
from distributed import Security, Worker

from pipeline.core.allocator import set_up_process

# How often a task may lose its worker and be done again.
ALLOWED_DEATHS = 3
# For both ends of the connection. Distributed's defaults are for clusters whose machines come and go.
SETTINGS: Mapping[str, Any] = {
    # distributed counts mapped files as used memory, and would pause or kill workers over them; the plan is the limit
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    # a worker is lost when its process has ended, not when it, or the whole machine, has slept for a while
    "distributed.scheduler.worker-ttl": None,
    "distributed.scheduler.allowed-failures": ALLOWED_DEATHS,
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.worker.profile.enabled": False,
    "distributed.admin.large-graph-warning-threshold": "1 GiB",
}
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker process is told on its standard input, where no other process can read the key.

    `tiles`: in flight at once, and threads for other tasks. `folder`: for files of distributed's own.
    """

    scheduler: str
    parent: int
    tiles: int
    folder: str
    security: Security
    initialize: Callable[[], None]


def main() -> None:
    """Serve the scheduler of the WorkerSpec on standard input."""
    spec: WorkerSpec = pickle.load(sys.stdin.buffer)
    _die_with(spec.parent)
    set_up_process()
    dask.config.set(SETTINGS)
    logging.getLogger("distributed").setLevel(logging.WARNING)  # so that the last lines of the log say why it ended
    spec.initialize()
    asyncio.run(_serve(spec))
    os._exit(0)  # without waiting for tasks that still run: the scheduler has given them to others, or is gone


def _die_with(parent: int) -> None:
    """Have the system kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be watched
        os._exit(1)


async def _serve(spec: WorkerSpec) -> None:
    worker = Worker(
        spec.scheduler,
        nthreads=2 * spec.tiles,
        resources={"tile": spec.tiles, "other": spec.tiles},
        name=os.getpid(),
        host="127.0.0.1",
        protocol="tls",
        security=spec.security,
        dashboard_address="127.0.0.1:0",
        memory_limit=0,
        local_directory=spec.folder,
        death_timeout=60,
    )
    async with worker:
        await worker.finished()  # type: ignore[no-untyped-call]
