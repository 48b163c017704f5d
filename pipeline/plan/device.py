"""Resolves `compute.device`, with the memory of the device. Imports torch only on a machine that may have a GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.config import MAX_THREADS
from pipeline.core.errors import ConfigError

# Threads that copy chunks between the store and a GPU, shared by all tiles in flight.
STAGING_THREADS = 6


@dataclass(frozen=True)
class Device:
    """A compute device by torch's name (`cpu`, `cuda:0`), with its memory: a CPU's in all, a GPU's free memory."""

    name: str
    label: str
    memory_bytes: int


def resolve_device(requested: str) -> Device:
    """The device that `compute.device` selects. Raises ConfigError if this machine does not have it."""
    if requested == "cpu" or (requested == "auto" and not _may_have_gpu()):
        return _cpu()
    import torch  # noqa: PLC0415 - takes seconds, which a machine without a GPU can save

    if not torch.cuda.is_available():
        if requested == "auto":
            return _cpu()
        raise ConfigError(
            f"compute.device: {requested} is requested, but torch {torch.__version__} finds no CUDA device. "
            "Use compute.device: cpu, or install the driver and a CUDA build of torch."
        )
    index = int(requested.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"compute.device: {requested} is requested, but this machine has {torch.cuda.device_count()} such devices. "
            "Use one of them, or compute.device: auto."
        )
    free_bytes, _ = torch.cuda.mem_get_info(index)
    return Device(f"cuda:{index}", torch.cuda.get_device_name(index), free_bytes)


def default_threads(workers: int) -> int:
    """CPU threads for one tile: the cores that this process may use, divided among the worker processes.

    OMP_NUM_THREADS overrides it.
    """
    requested = os.environ.get("OMP_NUM_THREADS", "")
    if requested.isdecimal() and int(requested) > 0:
        return min(int(requested), MAX_THREADS)
    usable = len(os.sched_getaffinity(0))
    # The hyper-threads of a core share its vector units, which one thread fills.
    cores = min(usable, psutil.cpu_count(logical=False) or usable)
    return min(max(1, cores // max(1, workers)), MAX_THREADS)


def _cpu() -> Device:
    return Device("cpu", f"CPU, {os.cpu_count()} cores", psutil.virtual_memory().total)


def _may_have_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists() or Path("/dev/dxg").exists()
