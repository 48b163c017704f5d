"""One array of a stage: its geometry, window reads and chunk writes.

    store.zarr/stage_2/  content u1, canvas_0 canvas_1 f4, gradient f4, m_0 m_1 v_0 v_1 f4, features_<layer> f4,
                         gram_<layer> f8, average_0 average_1 f4 (optimizer.average)
                                                            (compact: u2 for all f4, see encodings.py)

Zarr 3 is the format; chunk files are read and written directly, without the Zarr API. Every write returns the CRC-32C
of the chunks, and an array that was opened with checksums verifies the chunks that it reads.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline.config import MAX_CHUNK_PX
from pipeline.core.errors import storage
from pipeline.core.text import shown
from pipeline.core.tiling import Rect, chunks_of
from pipeline.store.checksums import ChunkSums, checksum, packed, unpacked
from pipeline.store.chunk_file import (
    ChunkError,
    codec_of,
    opened,
    read_all,
    read_compressed,
    replace_compressed,
    write_all,
)
from pipeline.store.encodings import ENCODINGS, Encoding
from pipeline.store.layout import METADATA
from pipeline.store.memory import Memory, memory_of

MAX_METADATA_BYTES = 2**20  # zarr.json of an array has about 700


@dataclass(frozen=True)
class StageArray:
    """One (H, W, C) array of a stage. Cheap to create and safe to use from any thread.

    `codec`: a numcodecs codec; None: the file of a chunk is its memory, byte for byte. `encoding`: how float32 values
    are stored in 16 bits; None: as they are. `checksums`: by (chunk row, chunk column); None: reads are not verified.
    `memory`: holds the chunks instead of the files, which have an older state; None: they are on the disk.
    """

    path: Path
    shape: tuple[int, int, int]
    chunk_px: int
    dtype: np.dtype[Any]
    codec: Any = field(compare=False)
    chunk_keys: str
    encoding: Encoding | None = None
    checksums: NDArray[np.uint32] | ChunkSums | None = field(default=None, compare=False)
    memory: Memory | None = field(default=None, compare=False)

    @property
    def rect(self) -> Rect:
        """All pixels."""
        return Rect(0, self.shape[0], 0, self.shape[1])

    @property
    def raw(self) -> bool:
        """Whether the chunks are uncompressed files, which are read and written in parts."""
        return self.codec is None and self.memory is None

    @property
    def is_compressed(self) -> bool:
        """Whether the chunks are compressed files, which are read and written whole."""
        return self.codec is not None and self.memory is None

    @property
    def chunk_shape(self) -> tuple[int, int, int]:
        """(rows, columns, channels) of every chunk; chunks at the far border are stored at full size too."""
        return self.chunk_px, self.chunk_px, self.shape[2]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one uncompressed chunk."""
        return self.chunk_px**2 * self.shape[2] * self.dtype.itemsize

    @property
    def value_dtype(self) -> np.dtype[Any]:
        """The dtype of windows, as they are read and written."""
        return np.dtype(np.float32) if self.encoding else self.dtype

    def rounded(self, value: float) -> float:
        """`value` rounded to what the array can store."""
        return self.encoding.nearest(value) if self.encoding else value

    def valid_part(self, cy: int, cx: int) -> tuple[slice, slice]:
        """The rows and columns of a chunk that lie inside the array; the others are padding."""
        rows = min(self.chunk_px, self.shape[0] - cy * self.chunk_px)
        columns = min(self.chunk_px, self.shape[1] - cx * self.chunk_px)
        return slice(0, rows), slice(0, columns)

    def chunk_indices(self) -> list[tuple[int, int]]:
        """(row, column) of every chunk, row by row."""
        return [(cy, cx) for cy, cx, _ in chunks_of(self.rect, self.chunk_px)]

    def chunk_rect(self, cy: int, cx: int) -> Rect:
        """The pixels of a whole chunk; at the far border it reaches beyond the array."""
        return Rect(cy * self.chunk_px, (cy + 1) * self.chunk_px, cx * self.chunk_px, (cx + 1) * self.chunk_px)

    def chunk_path(self, cy: int, cx: int) -> Path:
        """The file of one chunk."""
        return self.path / self.chunk_keys.format(cy=cy, cx=cx)

    def opened_chunk(self, path: Path, flags: int) -> AbstractContextManager[int]:
        """The descriptor of an uncompressed chunk's file. Raises ChunkError if it is missing or of another size."""
        return opened(path, flags, self.chunk_bytes)

    def read_window(self, rect: Rect) -> NDArray[Any]:
        """A copy of the rectangle, (rows, columns, channels). Raises ChunkError, StorageError.

        Of each chunk only the rows in `rect` are read, and of a narrow strip only its columns. A chunk whose rows are
        all in `rect`, unless it is read as a strip, is verified.
        """
        out = np.empty((rect.height, rect.width, self.shape[2]), self.value_dtype)
        scratch = np.empty(self.chunk_shape, self.dtype)
        for part, rows, columns in self.read_parts(rect, lambda: scratch):
            stored = rows[:, columns]
            out[part.within(rect)] = self.encoding.decoded(stored) if self.encoding else stored
        return out

    def read_parts(
        self, rect: Rect, scratch: Callable[[], NDArray[Any]], strips: bool = True
    ) -> Iterator[tuple[Rect, NDArray[Any], slice]]:
        """Read a rectangle chunk by chunk: yields the part of it, rows of the chunk as stored, and their columns.

        The rows are a view into the array that `scratch()` returns, which is called before each chunk. `strips`: read
        the columns of narrow parts alone, row by row: the fewest bytes, in many calls. Raises ChunkError, StorageError.
        """
        self._check_inside(rect)
        for cy, cx, part in chunks_of(rect, self.chunk_px):
            rows, columns = part.within(self.chunk_rect(cy, cx))
            if self.memory is not None:  # in place, and not verified: the update verifies what is written
                yield part, self.memory.get(cy, cx)[rows], columns
            elif strips and self.raw and 2 * part.width <= self.chunk_px and columns != self.valid_part(cy, cx)[1]:
                yield part, self._read_strip(cy, cx, rows, columns, scratch()), slice(None)
            else:
                yield part, self._read_rows(cy, cx, rows, scratch()), columns

    def _read_strip(self, cy: int, cx: int, rows: slice, columns: slice, scratch: NDArray[Any]) -> NDArray[Any]:
        """Some columns of a chunk, read row by row into a part of `scratch`."""
        shape = rows.stop - rows.start, columns.stop - columns.start, self.shape[2]
        out = scratch.reshape(-1)[: int(np.prod(shape))].reshape(shape)
        path, position_bytes = self.chunk_path(cy, cx), self.shape[2] * self.dtype.itemsize
        row_bytes, start = self.chunk_px * position_bytes, columns.start * position_bytes
        offsets = [y * row_bytes + start for y in range(rows.start, rows.stop)]
        with storage(path), self.opened_chunk(path, os.O_RDONLY) as descriptor:
            # Rows that are pages apart look random to the kernel's read-ahead, so they are announced.
            if out[0].nbytes >= mmap.PAGESIZE:
                for offset in offsets:
                    os.posix_fadvise(descriptor, offset, out[0].nbytes, os.POSIX_FADV_WILLNEED)
            for row, offset in zip(out, offsets, strict=True):
                read_all(descriptor, path, row, offset)
        return out

    def _read_rows(self, cy: int, cx: int, rows: slice, scratch: NDArray[Any]) -> NDArray[Any]:
        """Rows of a chunk as a part of `scratch`."""
        # When all valid rows are needed, the padding rows are read too, because the checksum covers the whole chunk.
        verified = self.checksums is not None and rows == self.valid_part(cy, cx)[0]
        if verified or not self.raw:
            self.read_chunk(cy, cx, scratch)
            return scratch[rows]
        part, path = scratch[: rows.stop - rows.start], self.chunk_path(cy, cx)
        with storage(path), self.opened_chunk(path, os.O_RDONLY) as descriptor:
            read_all(descriptor, path, part, rows.start * self.chunk_px * self.shape[2] * self.dtype.itemsize)
        return part

    def read_chunk(self, cy: int, cx: int, out: NDArray[Any]) -> None:
        """Read one whole chunk as stored, padding included, into the contiguous array `out`, and verify it.

        Raises ChunkError for a missing, short or changed one, StorageError if the disk refuses.
        """
        path = self.chunk_path(cy, cx)
        with storage(path):
            if self.memory is not None:
                np.copyto(out, self.memory.get(cy, cx))
            elif self.raw:
                with self.opened_chunk(path, os.O_RDONLY) as descriptor:
                    read_all(descriptor, path, out, 0)
            else:
                read_compressed(path, self.codec, out)
        if self.checksums is not None and checksum(out) != self.checksums[cy, cx]:
            raise ChunkError(path, "changed", "is not what was written there")

    def write_chunk(self, cy: int, cx: int, data: NDArray[Any]) -> int:
        """Write one whole chunk; `data` smaller than a chunk (at the far border) is padded with zeros.

        `data` has the stored dtype, or is float32 for an encoded array and then rounded to nearest. Returns the
        checksum of the chunk, padding included. Raises StorageError if the disk refuses, ChunkError if the
        preallocated chunk is missing or if `data` is not as large as the array is there.
        """
        if self.encoding and data.dtype == self.value_dtype:
            data = self.encoding.encoded(data)
        assert data.dtype == self.dtype, (data.dtype, self.dtype)
        rows, columns = self.valid_part(cy, cx)
        if data.shape not in (self.chunk_shape, (rows.stop, columns.stop, self.shape[2])):
            raise self._size_error(f"{data.shape[1]}×{data.shape[0]} px of chunk row {cy}, column {cx}")
        if data.shape != self.chunk_shape:
            padded = np.zeros(self.chunk_shape, self.dtype)
            padded[: data.shape[0], : data.shape[1]] = data
            data = padded
        data, path = np.ascontiguousarray(data), self.chunk_path(cy, cx)
        with storage(path):
            if self.memory is not None:
                self.memory.put(cy, cx, data)
            elif self.raw:
                with self.opened_chunk(path, os.O_WRONLY) as descriptor:
                    write_all(descriptor, data, 0)
            else:
                replace_compressed(path, self.codec.encode(data))
        return checksum(data)

    def write_window(self, rect: Rect, data: NDArray[Any]) -> ChunkSums:
        """Write a rectangle of whole chunks (or up to the array's border) and return their checksums.

        Raises ChunkError if the rectangle is not inside the array, StorageError if the disk refuses.
        """
        self._check_inside(rect)
        return {
            (cy, cx): self.write_chunk(cy, cx, data[part.within(rect)])
            for cy, cx, part in chunks_of(rect, self.chunk_px)
        }

    def check_size(self, cy: int, cx: int) -> None:
        """Raise ChunkError for a missing chunk, or an uncompressed one of another size; its content is not read."""
        path = self.chunk_path(cy, cx)
        if self.memory is not None:
            return
        if self.raw:
            with self.opened_chunk(path, os.O_RDONLY):
                pass
        elif not path.is_file():
            raise ChunkError(path, "missing", "is missing")

    def refuse_other_size(self, shapes: Sequence[tuple[int, int, int]], words: str) -> None:
        """Raise ChunkError for a size that is none of these: a stranger's metadata could make a read take all memory.

        `words`: of those that are meant, behind "which".
        """
        if self.shape not in shapes or self.chunk_px > MAX_CHUNK_PX or self.dtype.kind not in "fu":
            what = f"describes {self.shape} {self.dtype}, which {words}"
            raise ChunkError(self.path / METADATA, "changed", what)

    def _check_inside(self, rect: Rect) -> None:
        # Reading further would return a border chunk's padding as pixels.
        if not (0 <= rect.y0 <= rect.y1 <= self.shape[0] and 0 <= rect.x0 <= rect.x1 <= self.shape[1]):
            raise self._size_error(f"rows {rect.y0} to {rect.y1} and columns {rect.x0} to {rect.x1}")

    def _size_error(self, requested: str) -> ChunkError:
        # The plan never asks for such pixels, so the array's metadata must be wrong.
        what = f"says {self.shape[1]}×{self.shape[0]} px, which {requested} do not fit"
        return ChunkError(self.path / METADATA, "changed", what)

    def packed(self, sums: ChunkSums) -> str:
        """The checksums of all chunks as text for the journal."""
        return packed(sums[index] for index in self.chunk_indices())

    def packed_zeros(self) -> str:
        """The checksums of an array that was just created."""
        return packed([checksum(np.zeros(self.chunk_shape, self.dtype))] * len(self.chunk_indices()))


def open_array(stage_dir: Path, name: str, checksums: str | None = None) -> StageArray:
    """Open an array of a stage. Raises ChunkError if its metadata is missing, damaged or does not fit `checksums`."""
    path = stage_dir / name
    with storage(path / METADATA):
        try:
            metadata = (path / METADATA).stat()
            if metadata.st_size > MAX_METADATA_BYTES:
                raise ValueError(f"it has {metadata.st_size:,} bytes")
            array = _open_array(path, metadata.st_mtime_ns)
            if (memory := memory_of(path)) is not None:
                array = replace(array, memory=memory)
            if checksums is None:
                return array
            grid = [-(-side // array.chunk_px) for side in array.shape[:2]]
            return replace(array, checksums=unpacked(checksums).reshape(grid))
        except FileNotFoundError as error:
            raise ChunkError(path / METADATA, "missing", "is missing") from error
        except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
            what = f"cannot be read ({shown(str(error), 200)})"
            raise ChunkError(path / METADATA, "changed", what) from error


@lru_cache(maxsize=256)
def _open_array(path: Path, _modified_ns: int) -> StageArray:
    array = zarr.open_array(path, mode="r", zarr_format=3)  # format 2 may hold pickles
    height, width, channels = array.shape
    metadata: Any = array.metadata
    key = metadata.encode_chunk_key((987654321, 123456789, 0))
    pattern = key.replace("987654321", "{cy}").replace("123456789", "{cx}")
    codec = codec_of([codec.to_dict() for codec in metadata.codecs])
    encoding = ENCODINGS[str(array.attrs["encoding"])] if "encoding" in array.attrs else None
    return StageArray(path, (height, width, channels), array.chunks[0], np.dtype(array.dtype), codec, pattern, encoding)
