"""Which stages stay in memory between two commits, beside the passes over their tiles.

Tiles are chosen before, as if no stage did: the last bits of the image depend on them, and must not depend on this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipeline.network import bounded_gpu_bytes
from pipeline.plan.memory import ITERATION_PHASES, Workload
from pipeline.store import GRADIENT, RESIDENT_THREADS, ArraySpec, resident_names

# Chunks of a row that one kernel on a GPU updates: with 512 px, 25 MB of every array.
CHUNKS_PER_KERNEL = 8
# Temporary arrays of such an update, in copies of its chunks as they are stored: some are in float64.
_TEMPORARIES = 16


def resident_bytes(arrays: Mapping[str, ArraySpec], device: str) -> int:
    """Bytes of a stage's arrays in memory: on a GPU with the temporary arrays of its update, else with buffers."""
    held = [arrays[name] for name in resident_names(arrays)]
    chunk = arrays[GRADIENT].stored_bytes // arrays[GRADIENT].chunks
    more = buffer_bytes(arrays) if device == "cpu" else _TEMPORARIES * CHUNKS_PER_KERNEL * chunk
    return sum(spec.stored_bytes for spec in held) + more


def buffer_bytes(arrays: Mapping[str, ArraySpec]) -> int:
    """Host memory of the threads that read and write the chunks; page-locked, it may be rounded up to twice a chunk."""
    largest = max(arrays[name].stored_bytes // arrays[name].chunks for name in resident_names(arrays))
    return 4 * RESIDENT_THREADS * largest


def room_bytes(work: Workload, tile_px: int) -> int:
    """Memory that the passes leave to a stage that stays there; 0 where none does."""
    config, device = work.config, work.device
    shares_disk = config.compute.workers or device.processes or device.cluster  # worker processes share no memory
    if shares_disk or not config.store.commit_interval:
        return 0
    if device.name == "cpu":
        host = work.host_bytes(tile_px)
        return max(0, config.memory.limit_bytes - max(host[phase] for phase in ITERATION_PHASES))
    if config.state != "float32":
        return 0  # the random bits of a compact state come from a generator on the CPU
    # the workspaces of kernels keep what they have without: whether one fits selects the kernel, and so the last bits
    return max(0, device.memory_bytes - bounded_gpu_bytes(work.gpu_bytes(tile_px)))


def with_resident(host: Mapping[str, int], stages: Iterable[int]) -> dict[str, int]:
    """Host memory of every phase with the largest of the stages, in bytes, that stay in this memory."""
    largest = max(stages, default=0)
    return {phase: size + (largest if phase in ITERATION_PHASES else 0) for phase, size in host.items()}
