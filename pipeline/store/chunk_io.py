"""Reading or writing one chunk in pieces, from its first row to its last.

A piece fits in the processor's cache while it is read, checksummed, updated and written; a chunk does not. A compressed
chunk is one block to its codec, so it is held in memory whole. Of an array in memory the chunk itself is used.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import storage
from pipeline.store.array import StageArray
from pipeline.store.checksums import checksum
from pipeline.store.chunk_file import ChunkError, read_all, write_all

Array = NDArray[Any]


class _ChunkStream:
    """One chunk of an array, open for the duration of a `with` block."""

    def __init__(self, array: StageArray, chunk: tuple[int, int], flags: int) -> None:
        self._array, self._chunk, self._path = array, chunk, array.chunk_path(*chunk)
        self._offset = self._sum = 0
        self._opened = ExitStack()
        if array.raw:
            with storage(self._path):
                self._descriptor = self._opened.enter_context(array.opened_chunk(self._path, flags))
        elif array.memory is not None:
            self._whole = array.memory.get(*chunk)
        else:
            self._whole = np.empty(array.chunk_shape, array.dtype)

    def _next(self, piece: Array) -> Array:
        """The view of the next piece in a chunk in memory."""
        start = self._offset // piece.itemsize
        return self._whole.reshape(-1)[start : start + piece.size].reshape(piece.shape)

    def _close(self) -> None:
        with storage(self._path):
            self._opened.close()


class ChunkReader(_ChunkStream):
    """Reads a chunk as stored, padding included, and verifies its checksum when the block ends.

    Nothing that was computed from the pieces may be committed before. Raises ChunkError for a missing, short or changed
    chunk, StorageError if the disk refuses.
    """

    def __init__(self, array: StageArray, chunk: tuple[int, int]) -> None:
        super().__init__(array, chunk, os.O_RDONLY)

    def __enter__(self) -> ChunkReader:
        if self._array.is_compressed:
            self._array.read_chunk(*self._chunk, self._whole)
        return self

    def read(self, piece: Array) -> None:
        """Fill `piece`, contiguous and of the stored dtype, with the next values."""
        if self._array.raw:
            with storage(self._path):
                read_all(self._descriptor, self._path, piece, self._offset)
        else:
            piece[...] = self._next(piece)
        self._offset += piece.nbytes
        if self._array.checksums is not None:
            self._sum = checksum(piece, self._sum)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close()
        checksums = self._array.checksums
        if kind is None and checksums is not None and checksums[self._chunk] != self._sum:
            raise ChunkError(self._path, "changed", "is not what was written there")


class ChunkWriter(_ChunkStream):
    """Writes a chunk of stored values. Raises StorageError if the disk refuses, ChunkError if the chunk is gone."""

    def __init__(self, array: StageArray, chunk: tuple[int, int]) -> None:
        super().__init__(array, chunk, os.O_WRONLY)

    @property
    def checksum(self) -> int:
        """The checksum of all values written so far."""
        return self._sum

    def __enter__(self) -> ChunkWriter:
        return self

    def write(self, piece: Array) -> None:
        """Write the next values, contiguous and of the stored dtype."""
        if self._array.raw:
            with storage(self._path):
                write_all(self._descriptor, piece, self._offset)
        else:
            self._next(piece)[...] = piece
        self._offset += piece.nbytes
        self._sum = checksum(piece, self._sum)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close()
        if kind is None and self._array.is_compressed:
            self._array.write_chunk(*self._chunk, self._whole)
