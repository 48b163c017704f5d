"""A stage whose iterations read and write memory, and that goes to the disk at commits alone.

Both slots are in memory: an iteration overwrites nothing that it reads, there as on the disk. So a pass that fails may
be repeated, and the newest canvas and the one before it can be written at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import profiler
from pipeline.core.errors import DamagedStateError
from pipeline.store import memory
from pipeline.store.array import StageArray, open_array
from pipeline.store.checksums import unpacked
from pipeline.store.layout import result_name
from pipeline.store.memory import HostMemory, Memory
from pipeline.store.overview import OverviewChunk

Allocate = Callable[[tuple[int, int], tuple[int, int, int], np.dtype[Any]], Memory]
# Threads that read and write chunks; more do not make a disk faster.
RESIDENT_THREADS = 4


class ResidentStage:
    """Holds arrays of a stage in memory until `close`. Tasks of this process that open one get its memory."""

    def __init__(self, stage_dir: Path, allocate: Allocate = HostMemory):
        self._dir, self._allocate = stage_dir, allocate
        self._names: list[str] = []

    def load(self, names: Iterable[str], checksums: Mapping[str, str]) -> None:
        """Hold these arrays. Those with checksums are read and verified, the others are uninitialised.

        Raises ChunkError, StorageError, MemoryError; the arrays that are held by then stay so.
        """
        for name in names:
            array = self._on_disk(name, checksums.get(name))
            rows, columns = (-(-side // array.chunk_px) for side in array.shape[:2])
            held = self._allocate((rows, columns), array.chunk_shape, array.dtype)
            if name in checksums:
                self._of_every_chunk(array, partial(_load, array, held))
            memory.hold(array.path, held)
            self._names.append(name)

    def write(self, names: Iterable[str], checksums: Mapping[str, str]) -> dict[str, str]:
        """Write these arrays to the disk; returns the packed checksums of their chunks.

        `checksums`: those that are known already. Raises DamagedStateError if a chunk has changed in memory since.
        """
        written, names = {}, list(names)
        with profiler.span("commit"):
            for name in names:
                array = self._on_disk(name, None)
                held = memory.memory_of(array.path)
                assert held is not None, name
                write = _write_with_overview if name == result_name(int(name[-1]), names) else _write
                sums = self._of_every_chunk(array, partial(write, array, held))
                written[name] = array.packed(dict(zip(array.chunk_indices(), sums, strict=True)))
                if written[name] != checksums.get(name, written[name]):
                    raise self._changed(array, sums, checksums[name])
        return written

    def close(self) -> None:
        """Release the memory."""
        while self._names:
            memory.release(self._dir / self._names.pop())

    def _on_disk(self, name: str, checksums: str | None) -> StageArray:
        return replace(open_array(self._dir, name, checksums), memory=None)

    def _of_every_chunk(self, array: StageArray, work: Callable[[tuple[int, int]], int]) -> list[int]:
        with ThreadPoolExecutor(RESIDENT_THREADS, thread_name_prefix="commit") as pool:
            return list(pool.map(work, array.chunk_indices()))

    def _changed(self, array: StageArray, sums: list[int], expected: str) -> DamagedStateError:
        known = unpacked(expected)
        index = next(number for number, value in enumerate(sums) if value != known[number])
        return DamagedStateError(
            f"{array.path}: chunk {array.chunk_indices()[index]} has changed in memory since it was computed, so it is "
            "not committed: the memory of this machine is unreliable. The last committed iteration is intact: test the "
            "memory, then run the same command again to resume."
        )


def _load(array: StageArray, held: Memory, chunk: tuple[int, int]) -> int:
    buffer = np.empty(array.chunk_shape, array.dtype)
    array.read_chunk(*chunk, buffer)
    held.put(*chunk, buffer)
    return 0


def _write(array: StageArray, held: Memory, chunk: tuple[int, int]) -> int:
    return array.write_chunk(*chunk, held.get(*chunk))


def _write_with_overview(array: StageArray, held: Memory, chunk: tuple[int, int]) -> int:
    overview, data = OverviewChunk(array, chunk), held.get(*chunk)
    overview.add(data)
    overview.write(written := array.write_chunk(*chunk, data))
    return written
