"""The arrays of a run: one Zarr 3 group per stage, read by window and written by whole chunks.

    store.zarr/stage_2/  content u1, canvas_0 canvas_1 f4, gradient f4, m_0 m_1 v_0 v_1 f4, features_<layer> f4,
                         gram_<layer> f8, average_0 average_1 f4 (optimizer.average)
                                                            (compact: u2 for all f4, see formats.py)

Zarr is the format. Uncompressed arrays are preallocated; chunk files are read and written in place, by rows. Compressed
arrays go through the Zarr API behind the same functions. Writing gives checksums, and an array that was opened with
them checks what it reads.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.codecs
from numpy.typing import NDArray

from pipeline.core.errors import DamagedStateError, storage
from pipeline.core.text import shown
from pipeline.core.tiling import Rect, chunks_of
from pipeline.store.checksums import ChunkSums, checksum, grid_of, packed
from pipeline.store.encodings import ENCODINGS, Encoding
from pipeline.store.layout import METADATA

MAX_METADATA_BYTES = 2**20  # it has 700


class ChunkError(DamagedStateError):
    """A file of the store is not what was written there. `kind`: missing, truncated or changed."""

    def __init__(self, path: Path, kind: str, what: str):
        super().__init__(
            f"{path}: {what}. The run's state is damaged, and going on would give a wrong picture. `pipeline verify` "
            "finds all damage, and with --repair recomputes what can be recomputed."
        )
        self.path, self.kind, self.what = path, kind, what

    def __reduce__(self) -> tuple[type[ChunkError], tuple[Path, str, str]]:
        return ChunkError, (self.path, self.kind, self.what)


@dataclass(frozen=True)
class StageArray:
    """One (H, W, C) array of a stage. Cheap to make, safe to use from any thread.

    `raw`: a chunk's file is its memory. `encoding`: what its numbers mean; None: themselves. `checksums`: what its
    chunks have to be, by (chunk row, chunk column); None while they are being written, or are nobody's.
    """

    path: Path
    shape: tuple[int, int, int]
    chunk_px: int
    dtype: np.dtype[Any]
    raw: bool
    chunk_keys: str
    encoding: Encoding | None = None
    checksums: NDArray[np.uint32] | ChunkSums | None = field(default=None, compare=False)

    @property
    def chunk_shape(self) -> tuple[int, int, int]:
        """(rows, columns, channels) of every chunk; those at the far border are stored at full size too."""
        return self.chunk_px, self.chunk_px, self.shape[2]

    @property
    def value_dtype(self) -> np.dtype[Any]:
        """Of the values, as windows are read and written."""
        return np.dtype(np.float32) if self.encoding else self.dtype

    def kept(self, value: float) -> float:
        """`value` as it reads after it was written."""
        return self.encoding.nearest(value) if self.encoding else value

    def read_window(self, rect: Rect) -> NDArray[Any]:
        """A copy of the rectangle, (rows, columns, channels). Raises ChunkError, StorageError.

        Of every chunk that the rectangle reaches into, only the rows in question are read, and of a narrow strip only
        its columns. Where it covers all rows of a chunk, and more than a strip, the chunk is checked.
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
        """What of each chunk lies in the rectangle: where, rows of the chunk as stored, and the columns of them.

        The rows are a part of what `scratch` gives, which is called before each chunk. `strips`: of a narrow part read
        its columns alone, row by row: the fewest bytes, by many calls. Raises ChunkError, StorageError.
        """
        self._refuse_outside(rect)
        for cy, cx, part in chunks_of(rect, self.chunk_px):
            chunk = Rect(cy * self.chunk_px, (cy + 1) * self.chunk_px, cx * self.chunk_px, (cx + 1) * self.chunk_px)
            rows, columns = part.within(chunk)
            if strips and self.raw and 2 * part.width <= self.chunk_px and columns != self.valid_part(cy, cx)[1]:
                yield part, self._read_strip(cy, cx, rows, columns, scratch()), slice(None)
            else:
                yield part, self._read_rows(cy, cx, rows, scratch()), columns

    def prefetch(self, rect: Rect) -> None:
        """Have the kernel begin to read the rectangle's rows; whoever reads them later is told what is wrong there."""
        row_bytes = self.chunk_px * self.shape[2] * self.dtype.itemsize
        for cy, cx, part in chunks_of(rect, self.chunk_px):
            offset = part.y0 % self.chunk_px * row_bytes
            with suppress(OSError, ChunkError), self.opened_chunk(self.chunk_path(cy, cx), os.O_RDONLY) as descriptor:
                os.posix_fadvise(descriptor, offset, part.height * row_bytes, os.POSIX_FADV_WILLNEED)

    def _read_strip(self, cy: int, cx: int, rows: slice, columns: slice, scratch: NDArray[Any]) -> NDArray[Any]:
        """Some columns of a chunk, row by row, as a part of `scratch`."""
        shape = rows.stop - rows.start, columns.stop - columns.start, self.shape[2]
        out = scratch.reshape(-1)[: int(np.prod(shape))].reshape(shape)
        path, position_bytes = self.chunk_path(cy, cx), self.shape[2] * self.dtype.itemsize
        row_bytes, start = self.chunk_px * position_bytes, columns.start * position_bytes
        offsets = [y * row_bytes + start for y in range(rows.start, rows.stop)]
        with storage(path), self.opened_chunk(path, os.O_RDONLY) as descriptor:
            if out[0].nbytes >= mmap.PAGESIZE:  # the kernel sees no order in what skips pages
                for offset in offsets:
                    os.posix_fadvise(descriptor, offset, out[0].nbytes, os.POSIX_FADV_WILLNEED)
            for row, offset in zip(out, offsets, strict=True):
                read_all(descriptor, path, row, offset)
        return out

    def _read_rows(self, cy: int, cx: int, rows: slice, scratch: NDArray[Any]) -> NDArray[Any]:
        """Rows of a chunk, as a part of `scratch`; the whole chunk is read where that allows to check it."""
        whole = self.checksums is not None and rows == self.valid_part(cy, cx)[0]
        if whole or not self.raw:
            self.read_chunk(cy, cx, scratch)
            return scratch[rows]
        part = scratch[: rows.stop - rows.start]
        self._read(cy, cx, part, rows.start * self.chunk_px * self.shape[2] * self.dtype.itemsize)
        return part

    def read_chunk(self, cy: int, cx: int, out: NDArray[Any]) -> None:
        """Read one whole chunk as stored, border padding included, into the contiguous array `out`, and check it.

        Raises ChunkError for a missing, short or changed one, StorageError if the disk refuses.
        """
        if self.raw:
            self._read(cy, cx, out, 0)
        else:
            out[...] = self._decoded_chunk(cy, cx)
        if self.checksums is not None and checksum(out) != self.checksums[cy, cx]:
            raise ChunkError(self.chunk_path(cy, cx), "changed", "is not what was written there")

    def _read(self, cy: int, cx: int, out: NDArray[Any], offset: int) -> None:
        path = self.chunk_path(cy, cx)
        with storage(path), self.opened_chunk(path, os.O_RDONLY) as descriptor:
            read_all(descriptor, path, out, offset)

    def write_chunk(self, cy: int, cx: int, data: NDArray[Any]) -> int:
        """Write one whole chunk; `data` smaller than a chunk (at the far border) is padded with zeros.

        `data` is stored as it is if it has the stored dtype; float32 values of an encoded array are rounded to nearest.
        Gives the checksum of what was written, padding included. Raises StorageError if the disk refuses, ChunkError
        if the preallocated chunk is gone, or if `data` is not all that the array has there.
        """
        if self.encoding and data.dtype == self.value_dtype:
            data = self.encoding.encoded(data)
        assert data.dtype == self.dtype, (data.dtype, self.dtype)  # zarr would cast in silence
        rows, columns = self.valid_part(cy, cx)
        if data.shape not in (self.chunk_shape, (rows.stop, columns.stop, self.shape[2])):
            raise self._other_size(f"{data.shape[1]}×{data.shape[0]} px of chunk row {cy}, column {cx}")
        if data.shape != self.chunk_shape:
            padded = np.zeros(self.chunk_shape, self.dtype)
            padded[: data.shape[0], : data.shape[1]] = data
            data = padded
        data, path = np.ascontiguousarray(data), self.chunk_path(cy, cx)
        with storage(path):
            if self.raw:
                with self.opened_chunk(path, os.O_WRONLY) as descriptor:
                    write_all(descriptor, data, 0)
            else:
                _open_zarr(self.path).set_block_selection((cy, cx, 0), data)
        return checksum(data)

    def write_window(self, rect: Rect, data: NDArray[Any]) -> ChunkSums:
        """Write a rectangle that consists of whole chunks (or ends at the array's border); gives their checksums.

        Raises ChunkError for one that is not in the array.
        """
        self._refuse_outside(rect)
        return {
            (cy, cx): self.write_chunk(cy, cx, data[part.within(rect)])
            for cy, cx, part in chunks_of(rect, self.chunk_px)
        }

    def _refuse_outside(self, rect: Rect) -> None:
        """Raise ChunkError for a rectangle that is not in the array: padding and missing pixels are no picture."""
        if not (0 <= rect.y0 <= rect.y1 <= self.shape[0] and 0 <= rect.x0 <= rect.x1 <= self.shape[1]):
            raise self._other_size(f"rows {rect.y0} to {rect.y1} and columns {rect.x0} to {rect.x1}")

    def _other_size(self, asked: str) -> ChunkError:
        height, width, _ = self.shape
        return ChunkError(self.path / METADATA, "changed", f"tells of {width}×{height} px, which {asked} do not fit")

    def check_size(self, cy: int, cx: int) -> None:
        """Raise ChunkError for a chunk that is not there or, uncompressed, has not its size; nothing is read."""
        path = self.chunk_path(cy, cx)
        if self.raw:
            with self.opened_chunk(path, os.O_RDONLY):
                pass
        elif not path.is_file():
            raise ChunkError(path, "missing", "is missing")

    def valid_part(self, cy: int, cx: int) -> tuple[slice, slice]:
        """The slices of a chunk that lie inside the array: its border padding is nobody's pixels."""
        rows = min(self.chunk_px, self.shape[0] - cy * self.chunk_px)
        columns = min(self.chunk_px, self.shape[1] - cx * self.chunk_px)
        return slice(0, rows), slice(0, columns)

    def chunk_indices(self) -> list[tuple[int, int]]:
        """(row, column) of every chunk, row by row."""
        height, width, _ = self.shape
        return [(cy, cx) for cy, cx, _ in chunks_of(Rect(0, height, 0, width), self.chunk_px)]

    def chunk_path(self, cy: int, cx: int) -> Path:
        """The file of one chunk."""
        return self.path / self.chunk_keys.format(cy=cy, cx=cx)

    @contextmanager
    def opened_chunk(self, path: Path, flags: int) -> Iterator[int]:
        """The descriptor of an uncompressed chunk's file. Raises ChunkError if it is missing, or has another size."""
        try:
            descriptor = os.open(path, flags | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ChunkError(path, "missing", "is missing") from error
        try:
            expected = self.chunk_px**2 * self.shape[2] * self.dtype.itemsize
            if (size := os.fstat(descriptor).st_size) != expected:
                raise ChunkError(path, "truncated", f"has {size} bytes instead of {expected}")
            yield descriptor
        finally:
            os.close(descriptor)

    def _decoded_chunk(self, cy: int, cx: int) -> NDArray[Any]:
        self.check_size(cy, cx)
        full = np.zeros(self.chunk_shape, self.dtype)
        try:
            with storage(self.path):
                block = np.asarray(_open_zarr(self.path).get_block_selection((cy, cx, 0)))
        except (RuntimeError, ValueError) as error:
            raise ChunkError(self.chunk_path(cy, cx), "changed", f"cannot be decoded ({error})") from error
        full[: block.shape[0], : block.shape[1]] = block
        return full

    def packed(self, sums: ChunkSums) -> str:
        """The checksums of all chunks, as a journal keeps them."""
        return packed(sums[index] for index in self.chunk_indices())

    def packed_zeros(self) -> str:
        """The checksums of an array that was just created."""
        return packed([checksum(np.zeros(self.chunk_shape, self.dtype))] * len(self.chunk_indices()))


def read_all(descriptor: int, path: Path, out: NDArray[Any], offset: int) -> None:
    """Fill the contiguous array `out` with what a file holds from `offset` on. Raises ChunkError if that is less."""
    view, done = out.data.cast("B"), 0
    while done < len(view):
        read = os.preadv(descriptor, [view[done:]], offset + done)
        if read == 0:
            raise ChunkError(path, "truncated", f"ends after {offset + done} bytes")
        done += read


def write_all(descriptor: int, data: NDArray[Any], offset: int) -> None:
    """Write a contiguous array into a file, from `offset` on."""
    view, done = data.data.cast("B"), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def create_array(stage_dir: Path, name: str, shape: tuple[int, int, int], chunk_px: int, form: str, codec: str) -> None:
    """Create an (H, W, C) array with all its chunks on disk, reading as zeros.

    `form`: a numpy dtype, or the name of one of formats.ENCODINGS. `codec`: none (preallocated, so that no later write
    needs room), zstd or lz4. Raises StorageError.
    """
    with storage(stage_dir / name):
        array = new_array(stage_dir / name, shape, chunk_px, form, codec)
        if codec != "none":
            array[...] = 0
            return
        opened = open_array(stage_dir, name)
        chunk_bytes = int(np.prod(opened.chunk_shape)) * opened.dtype.itemsize
        for cy, cx in opened.chunk_indices():
            preallocate(opened.chunk_path(cy, cx), chunk_bytes)


def new_array(target: Any, shape: tuple[int, int, int], chunk_px: int, form: str, codec: str) -> Any:
    """An (H, W, C) zarr array without chunks, in a folder or in whatever else zarr takes for a store."""
    return zarr.create_array(
        target,
        shape=shape,
        chunks=(chunk_px, chunk_px, shape[2]),
        dtype="uint16" if form in ENCODINGS else form,
        compressors=_compressors(codec),
        fill_value=0,
        attributes={"encoding": form} if form in ENCODINGS else None,
        dimension_names=("y", "x", "c"),
        config={"write_empty_chunks": True},
    )


def preallocate(path: Path, size: int) -> None:
    """Make a file of zeros that have their place on the disk; one that is there keeps its beginning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(descriptor, size)
        os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def _compressors(codec: str) -> Any:
    if codec == "none":
        return None
    if codec == "zstd":
        return [zarr.codecs.ZstdCodec(level=1)]
    return [zarr.codecs.BloscCodec(cname="lz4", shuffle="shuffle")]


def _open_zarr(path: Path) -> Any:
    # Groups and configs of existing arrays forget this flag; without it an all-zero chunk would be deleted.
    return zarr.open_array(path, mode="r+").with_config({"write_empty_chunks": True})


def open_array(stage_dir: Path, name: str, checksums: str | None = None) -> StageArray:
    """Open an array of a stage. Raises ChunkError if it is not there or is not what `checksums` are of."""
    path = stage_dir / name
    with storage(path / METADATA):
        try:
            metadata = (path / METADATA).stat()
            if metadata.st_size > MAX_METADATA_BYTES:
                raise ValueError(f"it has {metadata.st_size:,} bytes")
            array = _open_array(path, metadata.st_mtime_ns)
            if checksums is None:
                return array
            return replace(array, checksums=grid_of(checksums, [-(-n // array.chunk_px) for n in array.shape[:2]]))
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
    raw = len(metadata.codecs) == 1  # only the bytes codec
    encoding = ENCODINGS[str(array.attrs["encoding"])] if "encoding" in array.attrs else None
    return StageArray(path, (height, width, channels), array.chunks[0], np.dtype(array.dtype), raw, pattern, encoding)


def create_stage(stage_dir: Path) -> None:
    """Make an empty stage group, replacing what an interrupted preparation left there. Raises StorageError."""
    with storage(stage_dir):
        if stage_dir.exists():
            shutil.rmtree(stage_dir)
        zarr.create_group(stage_dir)


def commit_stage(partial_dir: Path, stage_dir: Path) -> None:
    """Give a fully prepared stage its name. Raises StorageError."""
    with storage(stage_dir):
        if stage_dir.exists():
            shutil.rmtree(stage_dir)
        partial_dir.replace(stage_dir)


def delete_array(stage_dir: Path, name: str) -> None:
    """Free the disk of one array. Raises StorageError."""
    with storage(stage_dir / name):
        shutil.rmtree(stage_dir / name)


def delete_arrays(stage_dir: Path, keep: set[str]) -> None:
    """Free the disk of a stage's arrays, all but those named in `keep`. Raises StorageError."""
    with storage(stage_dir):
        for path in stage_dir.iterdir() if stage_dir.exists() else ():
            if path.is_dir() and path.name not in keep:
                shutil.rmtree(path)
