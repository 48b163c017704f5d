"""Which device computes, and how much memory it and the host have. Imports torch only where a GPU may be."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.config.fields import MAX_THREADS
from pipeline.core.errors import ConfigError

# Threads that move chunks between the store and a GPU, for all tiles in flight together.
STAGING_THREADS = 6


@dataclass(frozen=True)
class Device:
    """A compute device as torch names it (`cpu`, `cuda:0`), with its memory; a GPU's is what is free now."""

    name: str
    label: str
    memory_bytes: int

    @property
    def is_gpu(self) -> bool:
        """Whether tiles live in memory other than the host's."""
        return self.name != "cpu"


def resolve_device(requested: str) -> Device:
    """The device that `compute.device` means here. Raises ConfigError if it is not to be had."""
    if requested == "cpu" or (requested == "auto" and not _may_have_gpu()):
        return _cpu()
    import torch  # noqa: PLC0415 - costs seconds, and a machine without a GPU need not pay them here

    if not torch.cuda.is_available():
        if requested == "auto":
            return _cpu()
        raise ConfigError(
            f"compute.device: {requested} is asked for, but torch {torch.__version__} sees no CUDA device here. "
            "Use compute.device: cpu, or install the driver and a CUDA build of torch."
        )
    index = int(requested.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"compute.device: {requested} is asked for, but this machine has {torch.cuda.device_count()}."
        )
    free_bytes, _ = torch.cuda.mem_get_info(index)
    return Device(f"cuda:{index}", torch.cuda.get_device_name(index), free_bytes)


def default_threads(workers: int) -> int:
    """CPU threads for one tile: this machine's cores, as far as we may use them, divided among worker processes."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return min(int(asked), MAX_THREADS)
    usable = len(os.sched_getaffinity(0))
    cores = min(usable, psutil.cpu_count(logical=False) or usable)
    return min(max(1, cores // max(1, workers)), MAX_THREADS)


def _cpu() -> Device:
    return Device("cpu", f"CPU, {os.cpu_count()} cores", psutil.virtual_memory().total)


def _may_have_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists() or Path("/dev/dxg").exists()
