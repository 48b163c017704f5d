"""How many tiles, threads and processes work on a run at once, and how large the pieces of an update are."""

from __future__ import annotations

import os

from pipeline.config import ComputeConfig
from pipeline.plan.device import Device

# Tasks in flight in a process: one reads the next tile, one computes, one writes the last.
WORKERS = 3
# Threads of the update pass where a GPU leaves the cores to it; more do not make it faster (docs/benchmarks.md).
MAX_UPDATE_THREADS = 8
# Values of a chunk that an update thread works on at a time: 64 rows of 512 px, of which five arrays fit a core's cache
# (measured per chunk: 4.2 ms, in whole chunks 4.5, in blocks of 16 rows 5.0).
BLOCK_VALUES = 98_304


def update_values(device: str, chunk_px: int) -> int:
    """Values of a chunk that a thread of the update pass works on at a time.

    On a CPU a block fits a core's cache. Beside a GPU there are more threads, which would contend for the GIL between
    small blocks (measured for 64 chunks: 0.29 s, in whole chunks 0.22 s).
    """
    chunk_values = chunk_px**2 * 3
    return min(chunk_values, BLOCK_VALUES) if device == "cpu" else chunk_values


def update_threads(device: str, processes: int = 1) -> int:
    """Threads of the update pass in each process that updates. On a CPU the network needs the cores too."""
    spare = 0 if device == "cpu" else len(os.sched_getaffinity(0)) - WORKERS
    return max(WORKERS, min(spare, MAX_UPDATE_THREADS) // processes)


def update_processes(compute: ComputeConfig, device: Device) -> int:
    """Worker processes that only update: beside those of the listed devices, compute.workers or as many."""
    return (compute.workers or len(device.processes)) if device.processes else 0


def most_ahead(device: Device) -> int:
    """Tiles that a cluster computes before the one that a sum waits for; one waits at every worker."""
    # workers may join later, and the number is part of each graph
    return (WORKERS + 1) * max(4, device.cluster_workers)
