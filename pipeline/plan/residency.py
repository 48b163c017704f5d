"""Which stages stay in memory between two commits, beside the passes over their tiles.

Tiles are chosen before, as if no stage did: the last bits of the image depend on them, and must not depend on this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipeline.network import bounded_gpu_bytes
from pipeline.plan.memory import ITERATION_PHASES, Workload
from pipeline.store import RESIDENT_THREADS, ArraySpec, resident_names


def resident_bytes(arrays: Mapping[str, ArraySpec]) -> int:
    """Bytes of a stage's arrays in memory, with the buffers through which they come and go."""
    held = [arrays[name] for name in resident_names(arrays)]
    buffers = 2 * RESIDENT_THREADS * max(spec.stored_bytes // spec.chunks for spec in held)
    return sum(spec.stored_bytes for spec in held) + buffers


def room_bytes(work: Workload, tile_px: int) -> int:
    """Memory that the passes leave to a stage that stays there; 0 where none does."""
    config, device = work.config, work.device
    shares_disk = config.compute.workers or device.processes or device.cluster  # worker processes share no memory
    if shares_disk or not config.store.commit_interval:
        return 0
    if device.name == "cpu":
        host = work.host_bytes(tile_px)
        return max(0, config.memory.limit_bytes - max(host[phase] for phase in ITERATION_PHASES))
    if config.store.state_dtype == "compact":
        return 0  # its random bits come from a generator on the CPU
    # the workspaces of kernels keep what they have without: whether one fits selects the kernel, and so the last bits
    return max(0, device.memory_bytes - bounded_gpu_bytes(work.gpu_bytes(tile_px)))


def with_resident(host: Mapping[str, int], stages: Iterable[int]) -> dict[str, int]:
    """Host memory of every phase with the largest of the stages, in bytes, that stay in this memory."""
    largest = max(stages, default=0)
    return {phase: size + (largest if phase in ITERATION_PHASES else 0) for phase, size in host.items()}
