"""The arrays of a run: one Zarr 3 group per stage, read by window and written by whole chunks.

    store.zarr/stage_2/  content u1, canvas_0 canvas_1 f4, gradient f4, m_0 m_1 v_0 v_1 f4, features_<layer> f4,
                         gram_<layer> f8

Zarr is the format. Uncompressed arrays are preallocated; windows are copied out of mapped chunk files, chunks are
written in place. Compressed arrays go through the Zarr API behind the same functions. The only importer of zarr.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.codecs
from numpy.typing import NDArray

from pipeline.errors import DamagedStateError, SpaceError
from pipeline.tiling import Rect, chunks_of

zarr.config.set({"async.concurrency": 1})  # measured best under our own threads

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@dataclass(frozen=True)
class StageArray:
    """One (H, W, C) array of a stage. Cheap to make, safe to use from any thread."""

    path: Path
    shape: tuple[int, int, int]
    chunk_px: int
    dtype: np.dtype[Any]
    mapped: bool
    chunk_keys: str

    @property
    def chunk_shape(self) -> tuple[int, int, int]:
        """(rows, columns, channels) of every chunk; those at the far border are stored at full size too."""
        return self.chunk_px, self.chunk_px, self.shape[2]

    def read_window(self, rect: Rect) -> NDArray[Any]:
        """A copy of the rectangle, (rows, columns, channels). Raises DamagedStateError for a missing or short chunk."""
        out = np.empty((rect.height, rect.width, self.shape[2]), self.dtype)
        for cy, cx, part in chunks_of(rect, self.chunk_px):
            chunk = Rect(cy * self.chunk_px, (cy + 1) * self.chunk_px, cx * self.chunk_px, (cx + 1) * self.chunk_px)
            self._copy_part(cy, cx, part.within(chunk), out[part.within(rect)])
        return out

    def _copy_part(self, cy: int, cx: int, part: tuple[slice, slice], out: NDArray[Any]) -> None:
        if not self.mapped:
            out[...] = self._decoded_chunk(cy, cx)[part]
            return
        path = self.chunk_path(cy, cx)
        with self._open_chunk(path, os.O_RDONLY) as file:
            row_bytes = self.chunk_px * self.shape[2] * self.dtype.itemsize
            first = part[0].start * row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            try:
                mapped.madvise(mmap.MADV_WILLNEED, first, part[0].stop * row_bytes - first)
                chunk = np.frombuffer(mapped, self.dtype).reshape(self.chunk_shape)
                out[...] = chunk[part]
                del chunk  # the map cannot be closed while an array looks into it
            finally:
                mapped.close()

    def read_chunk(self, cy: int, cx: int, out: NDArray[Any]) -> None:
        """Read one whole chunk, border padding included, into the contiguous array `out`."""
        if not self.mapped:
            out[...] = self._decoded_chunk(cy, cx)
            return
        view = out.data.cast("B")
        with self._open_chunk(self.chunk_path(cy, cx), os.O_RDONLY) as file:
            read = os.preadv(file.fileno(), [view], 0)
        if read != len(view):
            raise self._damaged(self.chunk_path(cy, cx), f"gave {read} of {len(view)} bytes")

    def write_chunk(self, cy: int, cx: int, data: NDArray[Any]) -> None:
        """Write one whole chunk; `data` smaller than a chunk (at the far border) is padded with zeros.

        Raises SpaceError if the disk refuses, DamagedStateError if the preallocated chunk is gone.
        """
        assert data.dtype == self.dtype, (data.dtype, self.dtype)  # zarr would cast in silence
        if data.shape != self.chunk_shape:
            padded = np.zeros(self.chunk_shape, self.dtype)
            padded[: data.shape[0], : data.shape[1]] = data
            data = padded
        path = self.chunk_path(cy, cx)
        try:
            if self.mapped:
                with self._open_chunk(path, os.O_WRONLY) as file:
                    _write_all(file.fileno(), np.ascontiguousarray(data).data.cast("B"))
            else:
                _open_zarr(self.path).set_block_selection((cy, cx, 0), data)
        except OSError as error:
            raise space_error(path, error) from error

    def write_window(self, rect: Rect, data: NDArray[Any]) -> None:
        """Write a rectangle that consists of whole chunks (or ends at the array's border)."""
        for cy, cx, part in chunks_of(rect, self.chunk_px):
            self.write_chunk(cy, cx, data[part.within(rect)])

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

    def _open_chunk(self, path: Path, flags: int) -> Any:
        try:
            file = os.fdopen(os.open(path, flags | os.O_CLOEXEC), "rb" if flags == os.O_RDONLY else "wb", 0)
        except FileNotFoundError as error:
            raise self._damaged(path, "is missing") from error
        expected = self.chunk_px**2 * self.shape[2] * self.dtype.itemsize
        if (size := os.fstat(file.fileno()).st_size) != expected:
            file.close()
            raise self._damaged(path, f"has {size} bytes instead of {expected}")
        return file

    def _decoded_chunk(self, cy: int, cx: int) -> NDArray[Any]:
        path = self.chunk_path(cy, cx)
        if not path.is_file():
            raise self._damaged(path, "is missing")
        full = np.zeros(self.chunk_shape, self.dtype)
        try:
            block = np.asarray(_open_zarr(self.path).get_block_selection((cy, cx, 0)))
        except (RuntimeError, ValueError) as error:
            raise self._damaged(path, f"cannot be decoded ({error})") from error
        full[: block.shape[0], : block.shape[1]] = block
        return full

    def _damaged(self, path: Path, what: str) -> DamagedStateError:
        return DamagedStateError(
            f"chunk {path} {what}: the run's state is damaged and would give a wrong picture. "
            "Restore the run directory from a copy, or delete it to render again from the start."
        )


def _write_all(descriptor: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], done)


def space_error(path: Path, error: OSError) -> OSError:
    """`error` as a SpaceError if the disk is the cause, else itself."""
    if error.errno not in _NO_SPACE:
        return error
    return SpaceError(
        f"{path}: {error.strerror}. Nothing that was committed is lost. Make room (or the disk writable) and give the "
        "same command again."
    )


def create_store(path: Path) -> None:
    """Make the run's Zarr group if it is not there."""
    zarr.open_group(path, mode="a")


def create_array(
    stage_dir: Path, name: str, shape: tuple[int, int, int], chunk_px: int, dtype: str, codec: str
) -> None:
    """Create an (H, W, C) array with all its chunks on disk, reading as zeros.

    `codec`: none (preallocated, so that no later write needs room), zstd or lz4. Raises SpaceError.
    """
    try:
        array = zarr.create_array(
            stage_dir / name,
            shape=shape,
            chunks=(chunk_px, chunk_px, shape[2]),
            dtype=dtype,
            compressors=_compressors(codec),
            fill_value=0,
            dimension_names=("y", "x", "c"),
            config={"write_empty_chunks": True},
        )
        if codec != "none":
            array[...] = 0
            return
        opened = open_array(stage_dir, name)
        chunk_bytes = int(np.prod(opened.chunk_shape)) * opened.dtype.itemsize
        for cy, cx in opened.chunk_indices():
            _preallocate(opened.chunk_path(cy, cx), chunk_bytes)
    except OSError as error:
        raise space_error(stage_dir / name, error) from error


def _preallocate(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    try:
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


def open_array(stage_dir: Path, name: str) -> StageArray:
    """Open an array of a stage. Raises DamagedStateError if it is not there."""
    path = stage_dir / name
    try:
        return _open_array(path, (path / "zarr.json").stat().st_mtime_ns)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedStateError(
            f"array {path}: cannot be opened ({error}). The run's state is damaged: restore the run directory from a "
            "copy, or delete it to render again from the start."
        ) from error


@lru_cache(maxsize=256)
def _open_array(path: Path, _modified_ns: int) -> StageArray:
    array = zarr.open_array(path, mode="r")
    height, width, channels = array.shape
    metadata: Any = array.metadata
    key = metadata.encode_chunk_key((987654321, 123456789, 0))
    pattern = key.replace("987654321", "{cy}").replace("123456789", "{cx}")
    mapped = len(metadata.codecs) == 1  # only the bytes codec: a chunk file is the chunk's memory
    return StageArray(path, (height, width, channels), array.chunks[0], np.dtype(array.dtype), mapped, pattern)


def write_gram(stage_dir: Path, layer: str, gram_CC: NDArray[np.float64]) -> None:
    """Store the style target of one layer, (C, C) float64."""
    array = zarr.create_array(
        stage_dir / f"gram_{layer}",
        shape=gram_CC.shape,
        chunks=gram_CC.shape,  # one file, which is there or not
        dtype="float64",
        compressors=None,
        config={"write_empty_chunks": True},
    )
    array[...] = gram_CC


def read_gram(stage_dir: Path, layer: str) -> NDArray[np.float64]:
    """The style target of one layer. Raises DamagedStateError if it is not there."""
    path = stage_dir / f"gram_{layer}"
    try:
        array = zarr.open_array(path, mode="r")
        if not (path / "c" / "0" / "0").is_file():
            raise FileNotFoundError(f"{path / 'c/0/0'} is missing")
        return np.asarray(array[...], np.float64)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedStateError(
            f"style target {path}: cannot be read ({error}). Delete the run directory to start again."
        ) from error


def create_stage(stage_dir: Path) -> None:
    """Make an empty stage group, replacing what an interrupted preparation left there."""
    shutil.rmtree(stage_dir, ignore_errors=True)
    zarr.create_group(stage_dir)


def commit_stage(partial_dir: Path, stage_dir: Path) -> None:
    """Give a fully prepared stage its name."""
    shutil.rmtree(stage_dir, ignore_errors=True)
    partial_dir.replace(stage_dir)


def delete_array(stage_dir: Path, name: str) -> None:
    """Free the disk of one array."""
    shutil.rmtree(stage_dir / name)


def delete_arrays(stage_dir: Path, keep: set[str]) -> None:
    """Free the disk of a stage's arrays, all but those named in `keep`."""
    for path in stage_dir.iterdir():
        if path.is_dir() and path.name not in keep:
            shutil.rmtree(path)


def write_ome_zarr(
    path: Path, size: tuple[int, int], bits: int, read_rows: Callable[[int, int], NDArray[Any]], chunk_px: int = 512
) -> None:
    """Write an OME-Zarr 0.5 image pyramid, axes (c, y, x), each level the 2×2 means of the one before.

    `size`: (H, W). `read_rows(y0, y1)` gives (rows, W, 3) of uint8 or uint16, as `bits` says. At most one band of
    chunk rows is in memory.
    """
    height, width = size
    group = zarr.create_group(path, overwrite=True)
    level = _create_level(path / "0", (height, width), bits, chunk_px)
    for y0 in range(0, height, chunk_px):
        y1 = min(y0 + chunk_px, height)
        level[:, y0:y1, :] = np.moveaxis(read_rows(y0, y1), 2, 0)
    levels = 1
    while max(height, width) > chunk_px:
        height, width = max(1, height // 2), max(1, width // 2)
        level = _halve(level, _create_level(path / str(levels), (height, width), bits, chunk_px))
        levels += 1
    group.attrs["ome"] = _ome_metadata(path.stem, levels)


def _create_level(path: Path, size: tuple[int, int], bits: int, chunk_px: int) -> Any:
    return zarr.create_array(
        path,
        shape=(3, *size),
        chunks=(3, chunk_px, chunk_px),
        dtype=f"uint{bits}",
        dimension_names=("c", "y", "x"),
        config={"write_empty_chunks": True},
    )


def _halve(fine: Any, coarse: Any) -> Any:
    """Fill `coarse`, chunk by chunk, with the means of 2×2 squares of `fine` (a last odd row or column is dropped)."""
    _, height, width = coarse.shape
    for cy, cx, part in chunks_of(Rect(0, height, 0, width), coarse.chunks[1]):
        block = np.asarray(fine[:, 2 * part.y0 : 2 * part.y1, 2 * part.x0 : 2 * part.x1], np.uint32)
        missing = (2 * part.height - block.shape[1], 2 * part.width - block.shape[2])  # a fine side of 1 px has no pair
        block = np.pad(block, ((0, 0), (0, missing[0]), (0, missing[1])), mode="edge")
        summed = block[:, 0::2, 0::2] + block[:, 0::2, 1::2] + block[:, 1::2, 0::2] + block[:, 1::2, 1::2]
        coarse.set_block_selection((0, cy, cx), ((summed + 2) // 4).astype(coarse.dtype))
    return coarse


def _ome_metadata(name: str, levels: int) -> dict[str, Any]:
    return {
        "version": "0.5",
        "multiscales": [
            {
                "name": name,
                "axes": [
                    {"name": "c", "type": "channel"},
                    {"name": "y", "type": "space"},
                    {"name": "x", "type": "space"},
                ],
                "datasets": [
                    {
                        "path": str(level),
                        "coordinateTransformations": [{"type": "scale", "scale": [1.0, 2.0**level, 2.0**level]}],
                    }
                    for level in range(levels)
                ],
            }
        ],
    }
