"""Checking stored arrays against the checksums that the journal keeps of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.engine import Engine
from pipeline.store import ChunkError, StageArray

OnProgress = Callable[[int, int], None]
# Chunks per task: the scheduler's cost is small beside them, and a stop comes soon.
_CHUNKS_PER_TASK = 16


@dataclass(frozen=True)
class CheckSpec:
    """Some chunks of an array that knows its checksums."""

    array: StageArray
    chunks: tuple[tuple[int, int], ...]


def check_task(spec: CheckSpec) -> list[ChunkError]:
    """Read the chunks; gives what is wrong with them. Raises StorageError for a disk that cannot be read."""
    buffer = np.empty(spec.array.chunk_shape, spec.array.dtype)
    found: list[ChunkError] = []
    for cy, cx in spec.chunks:
        try:
            spec.array.read_chunk(cy, cx, buffer)
        except ChunkError as error:
            found.append(error)
    return found


def damage(arrays: Sequence[StageArray], engine: Engine, on_progress: OnProgress) -> list[ChunkError]:
    """All chunks that are not what was written, in the order of the arrays."""
    specs = [
        CheckSpec(array, tuple(indices[first : first + _CHUNKS_PER_TASK]))
        for array in arrays
        for indices in [array.chunk_indices()]
        for first in range(0, len(indices), _CHUNKS_PER_TASK)
    ]
    done = itertools.count(1)
    found = engine.map(check_task, specs, lambda: on_progress(next(done), len(specs)))
    return list(itertools.chain.from_iterable(found))


def require_intact(arrays: Sequence[StageArray], engine: Engine, on_progress: OnProgress) -> None:
    """Raise the first ChunkError of the arrays, if there is one."""
    for error in damage(arrays, engine, on_progress):
        raise error
