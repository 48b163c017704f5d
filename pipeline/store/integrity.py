"""Verifying stored arrays against the checksums in the journal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.events import in_order
from pipeline.executors import Executor
from pipeline.store.array import StageArray
from pipeline.store.chunk_file import ChunkError

OnProgress = Callable[[int, int], None]
# A damaged or unreadable file, and its error.
Finding = tuple[Path, ChunkError | OSError]
# Chunks per task: enough to hide the scheduler's overhead, few enough for a prompt stop.
_CHUNKS_PER_TASK = 16


@dataclass(frozen=True)
class CheckSpec:
    """Chunks to verify: their contents if the array has checksums, else only that the files exist at full size."""

    array: StageArray
    chunks: tuple[tuple[int, int], ...]


def check_task(spec: CheckSpec) -> list[Finding]:
    """Verify the chunks and return the damaged ones."""
    buffer = np.empty(spec.array.chunk_shape, spec.array.dtype)
    findings: list[Finding] = []
    for cy, cx in spec.chunks:
        try:
            if spec.array.checksums is None:
                spec.array.check_size(cy, cx)
            else:
                spec.array.read_chunk(cy, cx, buffer)
        except (ChunkError, OSError) as error:
            findings.append((spec.array.chunk_path(cy, cx), error))
    return findings


def specs_of(array: StageArray, chunks: Sequence[tuple[int, int]]) -> list[CheckSpec]:
    """The tasks that verify these chunks."""
    starts = range(0, len(chunks), _CHUNKS_PER_TASK)
    return [CheckSpec(array, tuple(chunks[start : start + _CHUNKS_PER_TASK])) for start in starts]


def damage(specs: Sequence[CheckSpec], executor: Executor, on_progress: OnProgress) -> list[Finding]:
    """All damaged chunks, in the order of the specs."""
    results = executor.map(check_task, specs, in_order(on_progress, len(specs)))
    return list(itertools.chain.from_iterable(results))


def require_intact(arrays: Sequence[StageArray], executor: Executor, on_progress: OnProgress) -> None:
    """Raise the error of the first damaged chunk of the arrays, if there is one."""
    specs = [spec for array in arrays for spec in specs_of(array, array.chunk_indices())]
    for _path, error in damage(specs, executor, on_progress):
        raise error
