"""A worker process: it runs tasks for the process that started it, and does not outlive it (engine_processes.py)."""

from __future__ import annotations

import asyncio
import ctypes
import io
import logging
import os
import pickle
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import dask.config
import numpy as np
from distributed import Worker

from pipeline.core import profiler
from pipeline.core.allocator import set_up_process
from pipeline.executors import loopback
from pipeline.rundir.process_settings import process_settings

# How often a task may lose its worker and be done again.
ALLOWED_DEATHS = 3
# For both ends of the connection. What distributed does by default is for clusters whose machines come and go.
SETTINGS: Mapping[str, Any] = {
    # it takes mapped files for its own memory, and would pause or kill workers over them; the plan is the limit
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
}
# What is larger in a spec, an array or a text, is sent to every worker once, not with each task that shares it.
SHARED_BYTES = 2**14
# A worker has places for the tasks of a pass, and as many for those of a pass beside it.
SLOTS = ("pass", "beside")
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def main() -> None:
    """Serve the scheduler at argv[1], as a child of process argv[2], argv[3] tasks per slot; files go to argv[4]."""
    address, parent, tasks, folder = sys.argv[1:]
    _die_with(int(parent))
    set_up_process()
    dask.config.set(SETTINGS)
    logging.getLogger("distributed").setLevel(logging.WARNING)  # that the last words say something
    kept = ExitStack()  # and never put back: nobody else is in this process, and its end waits for nothing
    kept.enter_context(process_settings())
    asyncio.run(_serve(address, int(tasks), folder))
    os._exit(0)  # without waiting for tasks that still run: the scheduler has given them to others, or is gone


def _die_with(parent: int) -> None:
    """Have the system kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be watched
        os._exit(1)


async def _serve(address: str, tasks: int, folder: str) -> None:
    worker = Worker(
        address,
        nthreads=len(SLOTS) * tasks,
        resources=dict.fromkeys(SLOTS, tasks),
        name=os.getpid(),
        host="127.0.0.1",
        protocol=loopback.SCHEME,
        dashboard_address="127.0.0.1:0",
        memory_limit=0,
        local_directory=folder,
        death_timeout=60,
    )
    async with worker:
        await worker.finished()  # type: ignore[no-untyped-call]


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, large: dict[int, object]):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._large = large

    def persistent_id(self, obj: object) -> int | None:
        size = obj.nbytes if isinstance(obj, np.ndarray) else len(obj) if isinstance(obj, str) else 0
        if size < SHARED_BYTES:
            return None
        self._large[id(obj)] = obj
        return id(obj)


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, large: Mapping[int, object]):
        super().__init__(file)
        self._large = large

    def persistent_load(self, pid: int) -> object:
        return self._large[pid]


def pack(task: object, spec: object) -> tuple[bytes, dict[int, object]]:
    """The task and its spec as bytes, without the spec's large arrays and texts, and those by their id."""
    file, large = io.BytesIO(), dict[int, object]()
    _Packer(file, large).dump((task, spec))
    return file.getvalue(), large


def run_packed(packed: bytes, large: Mapping[int, object]) -> tuple[Any, dict[str, float]]:
    """What the task of `pack` gives for its spec, and the seconds this process has spent since it last gave them."""
    task, spec = _Unpacker(io.BytesIO(packed), large).load()
    return task(spec), profiler.take()


def give(large: object) -> object:
    """The thing itself: as the result of a task it can be had again when the worker that holds it dies."""
    return large
