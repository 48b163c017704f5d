"""A worker process: it runs tasks for a scheduler, and does not outlive the process that started it (keepers.py)."""

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
# Where distributed's HTTP server listens, which has no pages here: not at port 8787 of an address that others reach.
NO_PAGES = "127.0.0.1:0"
# How long a worker tries to reach its scheduler, and the code with which it ends then.
REACH_S, NO_SCHEDULER = 60, 69
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h

# The resources that nodes take: a place for a tile on a GPU, for one on a CPU, for a sum of what tiles left, and for
# any other task.
GPU_TILE, CPU_TILE, SUM, OTHER = "GPU", "TILE", "SUM", "CPU"


@dataclass(frozen=True)
class Role:
    """What a worker process does: `tiles` in flight, and `others`, tasks without a tile, at once.

    `device`: the only one that it sees, None: all. A tile is computed at a time, while others are read and written.
    """

    tiles: int
    others: int
    device: str | None = None

    @property
    def is_on_gpu(self) -> bool:
        """Whether it computes on a GPU of its own."""
        return self.device not in (None, "cpu")

    def resources(self) -> dict[str, float]:
        """Its places for tasks."""
        tile = GPU_TILE if self.is_on_gpu else CPU_TILE
        places = ((tile, self.tiles), (SUM, min(1, self.tiles)), (OTHER, self.others))
        return {name: number for name, number in places if number}


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker process is told on its standard input, where no other process can read the key.

    `name`: how the scheduler calls it; None: by its process id. `host`: address that it serves; None: that by which it
    reaches the scheduler. `folder`: for files of distributed's own.
    """

    scheduler: str
    parent: int
    role: Role
    folder: str
    security: Security
    initialize: Callable[[], None]
    name: str | None = None
    host: str | None = "127.0.0.1"


def main() -> None:
    """Serve the scheduler of the WorkerSpec on standard input."""
    spec: WorkerSpec = pickle.load(sys.stdin.buffer)
    _die_with(spec.parent)
    set_up_process()
    dask.config.set(SETTINGS)
    logging.getLogger("distributed").setLevel(logging.WARNING)  # so that the last lines of the log say why it ended
    spec.initialize()
    code = asyncio.run(_serve(spec))
    os._exit(code)  # without waiting for tasks that still run: the scheduler has given them to others, or is gone


def _die_with(parent: int) -> None:
    """Have the system kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be watched
        os._exit(1)


async def _serve(spec: WorkerSpec) -> int:
    """Serve until the scheduler ends the worker, or is lost; gives the exit code."""
    role = spec.role
    worker = Worker(
        spec.scheduler,
        nthreads=int(sum(role.resources().values())),
        resources=role.resources(),
        name=os.getpid() if spec.name is None else f"{spec.name}-{os.getpid()}",
        host=spec.host,
        protocol=spec.scheduler.partition("://")[0],
        security=spec.security,
        dashboard_address=NO_PAGES,
        memory_limit=0,
        local_directory=spec.folder,
        death_timeout=REACH_S,
    )
    leaving: list[asyncio.Task[Any]] = []
    asyncio.get_running_loop().add_signal_handler(
        signal.SIGUSR1, lambda: leaving.append(asyncio.ensure_future(worker.close_gracefully()))
    )
    try:
        await worker
    except (TimeoutError, OSError) as error:
        logging.getLogger("distributed").error("cannot reach %s: %s", spec.scheduler, error)
        return NO_SCHEDULER
    await worker.finished()  # type: ignore[no-untyped-call]
    return 0 if leaving else NO_SCHEDULER
