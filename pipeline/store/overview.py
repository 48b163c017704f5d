"""An 8-bit overview at 1/8 of each canvas, which the update pass writes beside it: an aid for viewers, no state.

    store.zarr/stage_2/canvas_0.overview    one record per chunk, row by row:
        u4 checksum of the chunk, as in the journal · u4 checksum of the pixels · pixels (rows, columns, 3) u1

A record needs no commit: it counts only with the checksum that the journal has for the chunk. Where it is missing, torn
or of another iteration, the viewer reads the chunk itself. So no run fails because of it, or waits for it.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.store.array import StageArray
from pipeline.store.checksums import checksum
from pipeline.store.layout import OVERVIEW, OVERVIEW_PX, OVERVIEW_SUMS_BYTES

_SUMS = struct.Struct("<II")
assert _SUMS.size == OVERVIEW_SUMS_BYTES
_COLUMNS = np.tile(np.eye(3, dtype=np.float32), (OVERVIEW_PX, 1))
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def overview_path(array: StageArray) -> Path:
    """The file with the overview of a canvas, or of the average of the canvases."""
    return array.path.with_name(array.path.name + OVERVIEW)


def block_sums(values_HWC: NDArray[Any], halvings: int, dtype: Any = np.uint32) -> NDArray[Any]:
    """Sums over blocks of 2^halvings px on each side; at the far edges the last row and column count again."""
    side, (height, width, channels) = 1 << halvings, values_HWC.shape
    pad = -height % side, -width % side
    if any(pad):  # which weighs the edge a little more than the mean of what the picture has of a block would
        values_HWC = np.pad(values_HWC, ((0, pad[0]), (0, pad[1]), (0, 0)), mode="edge")
    rows, columns = values_HWC.shape[0] // side, values_HWC.shape[1] // side
    # long rows are added, then every channel of them: numpy's `sum` over such short axes takes ten times as long
    lines = values_HWC.reshape(rows, side, columns * side * channels)
    tall = lines[:, 0].astype(dtype)
    for index in range(1, side):
        tall += lines[:, index]
    sums = np.empty((rows, columns, channels), dtype)
    step = side * channels
    for channel in range(channels):
        sums[..., channel] = tall[:, channel::step]
        for first in range(channel + channels, step, channels):
            sums[..., channel] += tall[:, first::step]
    return sums


def block_means(pixels_HWC: NDArray[Any], halvings: int) -> NDArray[Any]:
    """Means over the blocks of block_sums, rounded, of uint8 or uint16."""
    if halvings == 0:
        return pixels_HWC
    # 16 bits hold the sums of 8-bit blocks of up to 16 px on each side
    sums = block_sums(pixels_HWC, halvings, np.uint16 if pixels_HWC.dtype == np.uint8 and halvings <= 4 else np.uint32)
    sums += 1 << (2 * halvings - 1)
    sums >>= 2 * halvings
    means: NDArray[Any] = sums.astype(pixels_HWC.dtype)
    return means


class OverviewChunk:
    """The overview of one chunk, from its rows as they are stored, which `add` takes from the first to the last."""

    def __init__(self, array: StageArray, chunk: tuple[int, int]) -> None:
        self._array, self._chunk, self._y0 = array, chunk, 0
        self._rows, self._columns = (part.stop for part in array.valid_part(*chunk))
        # a sum per block of rows and per value of a row, filled up with zeros to whole blocks of columns
        blocks_down, blocks_across = (-(-side // OVERVIEW_PX) for side in (self._rows, self._columns))
        self._sums = np.zeros((blocks_down, blocks_across * OVERVIEW_PX * 3), np.float32)

    def add(self, stored: NDArray[Any]) -> None:
        """Add the next rows, (rows, columns, 3) as stored; those outside the image are left out."""
        values = self._columns * 3
        inside = stored[: max(0, self._rows - self._y0), : self._columns].reshape(-1, values)
        if self._y0 % OVERVIEW_PX == 0 and len(inside) % OVERVIEW_PX == 0:
            blocks = inside.reshape(-1, OVERVIEW_PX, values)
            first = self._y0 // OVERVIEW_PX
            np.add.reduce(blocks, axis=1, dtype=np.float32, out=self._sums[first : first + len(blocks), :values])
        else:
            for y, row in enumerate(inside, start=self._y0):
                self._sums[y // OVERVIEW_PX, :values] += row
        self._y0 += len(stored)

    def pixels(self) -> NDArray[np.uint8]:
        """(rows, columns, 3): the mean of every block of 8×8 px; at the far border, of what the image has of it."""
        # as a product with a constant matrix: sums over a short axis in the middle are ten times slower
        means = (self._sums.reshape(-1, OVERVIEW_PX * 3) @ _COLUMNS).reshape(len(self._sums), -1, 3)
        heights, widths = (
            np.minimum(OVERVIEW_PX, side - np.arange(0, side, OVERVIEW_PX)) for side in (self._rows, self._columns)
        )
        means /= (heights[:, None, None] * widths[:, None] * self._unit()).astype(np.float32)
        # a canvas that is not clipped may leave the colours that can be shown
        pixels: NDArray[np.uint8] = np.rint(np.clip(np.nan_to_num(means), 0, 255)).astype(np.uint8)
        return pixels

    def write(self, chunk_checksum: int) -> None:
        """Write the record of the chunk, which has this checksum. If the disk refuses, there is none."""
        pixels = self.pixels()
        data = np.zeros((_side(self._array), _side(self._array), 3), np.uint8)
        data[: pixels.shape[0], : pixels.shape[1]] = pixels
        record = _SUMS.pack(chunk_checksum, checksum(data)) + data.tobytes()
        with contextlib.suppress(OSError), _opened(overview_path(self._array), os.O_WRONLY | os.O_CREAT) as descriptor:
            os.pwrite(descriptor, record, _offset(self._array, *self._chunk))

    def _unit(self) -> float:
        """The stored value of one level. A canvas is stored as floats, or in fixed point: both are linear."""
        return 1.0 if self._array.encoding is None else float(self._array.encoding.encoded(np.ones(1, np.float32))[0])


class Overview:
    """Reads the overview of an array that was opened with checksums. `None`s everywhere if there is no such file."""

    def __init__(self, array: StageArray) -> None:
        assert array.checksums is not None
        self._array, self._checksums = array, array.checksums

    def chunks(self, indices: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], NDArray[np.uint8] | None]]:
        """The pixels of each chunk in the array's own colours, or None if there is no good record of it."""
        try:
            with _opened(overview_path(self._array), os.O_RDONLY) as descriptor:
                for index in indices:
                    yield index, self._record(descriptor, index)
        except OSError:
            for index in indices:
                yield index, None

    def _record(self, descriptor: int, index: tuple[int, int]) -> NDArray[np.uint8] | None:
        side = _side(self._array)
        size_bytes = _SUMS.size + side**2 * 3
        record = os.pread(descriptor, size_bytes, _offset(self._array, *index))
        if len(record) < size_bytes:
            return None
        of_chunk, of_pixels = _SUMS.unpack_from(record)
        pixels = np.frombuffer(record, np.uint8, offset=_SUMS.size)
        if of_chunk != self._checksums[index] or of_pixels != checksum(pixels):
            return None
        rows, columns = (-(-part.stop // OVERVIEW_PX) for part in self._array.valid_part(*index))
        return pixels.reshape(side, side, 3)[:rows, :columns]


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | _FLAGS, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _side(array: StageArray) -> int:
    """The side of a record; that of a chunk is a multiple of 16 px."""
    return array.chunk_px // OVERVIEW_PX


def _offset(array: StageArray, cy: int, cx: int) -> int:
    return (cy * -(-array.shape[1] // array.chunk_px) + cx) * (_SUMS.size + _side(array) ** 2 * 3)
