"""Checking stored arrays against the checksums that the journal keeps of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.events import in_order
from pipeline.executors.threads import Engine
from pipeline.store.array import StageArray
from pipeline.store.chunk_file import ChunkError

OnProgress = Callable[[int, int], None]
# A file, and why it cannot be trusted: a ChunkError, or the disk's own error.
Finding = tuple[Path, ChunkError | OSError]
# Chunks per task: the scheduler's cost is small beside them, and a stop comes soon.
_CHUNKS_PER_TASK = 16


@dataclass(frozen=True)
class CheckSpec:
    """Some chunks of an array: their contents if the array knows its checksums, else only that they can be whole."""

    array: StageArray
    chunks: tuple[tuple[int, int], ...]


def check_task(spec: CheckSpec) -> list[Finding]:
    """Look at the chunks; gives what is wrong with them."""
    buffer = np.empty(spec.array.chunk_shape, spec.array.dtype)
    found: list[Finding] = []
    for cy, cx in spec.chunks:
        try:
            if spec.array.checksums is None:
                spec.array.check_size(cy, cx)
            else:
                spec.array.read_chunk(cy, cx, buffer)
        except (ChunkError, OSError) as error:
            found.append((spec.array.chunk_path(cy, cx), error))
    return found


def specs_of(array: StageArray, chunks: Sequence[tuple[int, int]]) -> list[CheckSpec]:
    """The tasks that check these chunks."""
    starts = range(0, len(chunks), _CHUNKS_PER_TASK)
    return [CheckSpec(array, tuple(chunks[start : start + _CHUNKS_PER_TASK])) for start in starts]


def damage(specs: Sequence[CheckSpec], engine: Engine, on_progress: OnProgress) -> list[Finding]:
    """All chunks that are not what was written, in the order of the specs."""
    found = engine.map(check_task, specs, in_order(on_progress, len(specs)))
    return list(itertools.chain.from_iterable(found))


def require_intact(arrays: Sequence[StageArray], engine: Engine, on_progress: OnProgress) -> None:
    """Raise what is wrong with the first chunk of the arrays that is not what was written, if there is one."""
    specs = [spec for array in arrays for spec in specs_of(array, array.chunk_indices())]
    for _path, error in damage(specs, engine, on_progress):
        raise error
