"""Resolves `compute.device`, `devices` and `scheduler` to what computes a run, with its memory.

Imports torch only on a machine that may have a GPU.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from pipeline.config import MAX_THREADS, ComputeConfig
from pipeline.core.cancel import NEVER, CancelToken
from pipeline.core.errors import ConfigError

# Threads that copy chunks between the store and a GPU, shared by all tiles in flight.
STAGING_THREADS = 6


@dataclass(frozen=True)
class Device:
    """A compute device by torch's name (`cpu`, `cuda:0`), with its memory: a CPU's in all, a GPU's free memory.

    Where there are several, the first: `processes` are the devices of this machine that have a process each, which sees
    its own alone; `cluster` is the address of the scheduler whose workers compute, `cluster_workers` how many of them
    compute tiles. The memory is that of the smallest.
    """

    name: str
    label: str
    memory_bytes: int
    processes: tuple[str, ...] = ()
    cluster: str = ""
    cluster_workers: int = 0


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


def run_device(
    compute: ComputeConfig, cancel: CancelToken = NEVER, note: Callable[[str], None] = lambda _message: None
) -> Device:
    """What computes a run. Waits for a cluster's first worker, of which `note` tells.

    Raises ConfigError for a device that is not there or a scheduler that cannot be used, ClusterError, Stopped.
    """
    if compute.scheduler != "none":
        return _cluster_device(compute, cancel, note)
    if compute.devices != "auto":
        return _processes(compute.devices)
    device = resolve_device(compute.device)
    if compute.device == "auto" and compute.workers == 0 and device.name != "cpu":
        alike = _gpus_like(device)
        return _processes(alike) if len(alike) > 1 else device
    return device


def _processes(names: tuple[str, ...]) -> Device:
    """Several devices of one kind; one that is listed more than once is shared."""
    shares = Counter(names)
    found = {name: resolve_device(name) for name in shares}
    label = ", ".join(f"{number} × {found[name].label}" for name, number in shares.items())
    memory = min(found[name].memory_bytes // number for name, number in shares.items())
    name = "cpu" if names[0] == "cpu" else "cuda:0"  # as each process sees its own
    return Device(name, label, memory, processes=names)


def _gpus_like(first: Device) -> tuple[str, ...]:
    """The GPUs of this machine of the same kind: others would round differently."""
    import torch  # noqa: PLC0415 - as above

    count = torch.cuda.device_count()
    return tuple(f"cuda:{index}" for index in range(count) if torch.cuda.get_device_name(index) == first.label)


def _cluster_device(compute: ComputeConfig, cancel: CancelToken, note: Callable[[str], None]) -> Device:
    from pipeline.executors.addresses import find_scheduler  # noqa: PLC0415 - brings distributed, for this case only
    from pipeline.executors.cluster_pool import survey  # noqa: PLC0415

    where = find_scheduler(compute.scheduler, compute.cluster_key)
    found = survey(where, own_device, cancel, lambda: note(f"waiting for the first worker of {where.address}"))
    gpus = [device for device in found if device.name != "cpu"]
    if not gpus and compute.device.startswith("cuda"):
        raise ConfigError(
            f"compute.device: {compute.device} is requested, but no worker of {where.address} has a GPU. Start one on "
            "a machine that has, or use compute.device: auto."
        )
    on_gpu = bool(gpus) and compute.device != "cpu"
    computing = gpus if on_gpu else [device for device in found if device.name == "cpu"] or found
    labels = Counter(device.label for device in computing)
    if len(labels) > 1:
        note(
            f"the cluster's workers differ ({', '.join(labels)}): the last bits of the image depend on which of them "
            "computes a tile, so a repeated run will not have the same bytes"
        )
    label = ", ".join(f"{number} × {name}" for name, number in labels.items())
    smallest = min(computing, key=lambda device: device.memory_bytes)
    name = "cuda:0" if on_gpu else "cpu"
    return replace(smallest, name=name, label=label, cluster=where.address, cluster_workers=len(computing))


def own_device() -> Device:
    """The device of a cluster's worker, as it sees it; the memory that it has reserved is its own."""
    device = resolve_device("auto")
    if device.name == "cpu":
        return replace(device, label=_processor())
    reserved = sys.modules["torch"].cuda.memory_reserved()
    return replace(device, memory_bytes=device.memory_bytes + reserved)


def _processor() -> str:
    """The kind of this machine's CPU; kernels for other kinds round differently."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or "CPU"


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


def tile_threads(compute: ComputeConfig) -> int:
    """CPU threads for one tile of a new run: those of the config, or the default."""
    return default_threads(compute.tile_processes) if compute.threads == "auto" else compute.threads


def _cpu() -> Device:
    return Device("cpu", f"CPU, {os.cpu_count()} cores", psutil.virtual_memory().total)


def _may_have_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists() or Path("/dev/dxg").exists()
