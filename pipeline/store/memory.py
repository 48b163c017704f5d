"""Arrays of a stage that are held in memory between two commits (ResidentStage in resident.py).

A registry of this process: a task opens an array by its path and gets the chunks in memory instead of the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Memory(Protocol):
    """The chunks of one array, all of one shape, as stored: at the far border with their padding."""

    def get(self, cy: int, cx: int) -> Array:
        """A chunk in host memory: itself, or a copy if it is elsewhere."""

    def put(self, cy: int, cx: int, data: Array) -> None:
        """Replace a chunk."""


class HostMemory:
    """Chunks in the memory of this process; `get` gives the chunk itself, which may be written to."""

    def __init__(self, grid: tuple[int, int], chunk_shape: tuple[int, int, int], dtype: np.dtype[Any]):
        """`grid`: (chunk rows, chunk columns). The chunks are uninitialised."""
        self._chunks = np.empty((*grid, *chunk_shape), dtype)

    def get(self, cy: int, cx: int) -> Array:
        """The chunk itself."""
        chunk: Array = self._chunks[cy, cx]
        return chunk

    def put(self, cy: int, cx: int, data: Array) -> None:
        """As in Memory."""
        self._chunks[cy, cx] = data


_held: dict[Path, Memory] = {}


def memory_of(path: Path) -> Memory | None:
    """The memory of the array at `path`; None: its chunks are read from the disk."""
    return _held.get(path)


def hold(path: Path, memory: Memory) -> None:
    """From now on the array at `path` is read from, and written to, `memory`."""
    _held[path] = memory


def release(path: Path) -> None:
    """The array at `path` is on the disk alone again."""
    _held.pop(path, None)
