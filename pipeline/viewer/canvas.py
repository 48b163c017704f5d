"""Tiles of one array of pixels at every level of a pyramid, without a pyramid on the disk.

    level = max_level       tiles of 512 px of the array itself
    one or two below        the mean of 2×2 or 4×4 px, from the chunks under the tile
    three or more below     from an overview at 1/8 in memory: the one that the update pass has written beside the
                            canvas, and where that has no good record of a chunk, the chunk itself

Chunks are read whole, so that each is compared with its checksum: a chunk that a run overwrites meanwhile raises
ChunkError and is never shown half old, half new. Levels are numbered as in DeepZoom: level 0 is one pixel.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.core.tiling import Rect, chunks_of
from pipeline.images import OutputColors
from pipeline.store import OVERVIEW_PX, Overview, StageArray, block_means

TILE_PX = 512  # as most chunks; smaller ones would cost more processor time per pixel
OVERVIEW = OVERVIEW_PX.bit_length() - 1  # halvings of the overview
_MAX_OVERVIEW_BYTES = 48 * 2**20
Pixels = NDArray[np.uint8]
V = TypeVar("V")


class Recent(Generic[V]):
    """The most recently used values of up to `max_bytes` in all. Safe to use from any thread."""

    def __init__(self, max_bytes: int, size: Callable[[V], int]) -> None:
        self._max_bytes, self._size = max_bytes, size
        self._bytes = 0
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> V | None:
        """The value of a key, or None."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Hashable, value: V) -> V:
        """Keep a value, and give it back; the values that were not used for longest make room for it."""
        with self._lock:
            if key not in self._values:
                self._bytes += self._size(value)
            self._values[key] = value
            self._values.move_to_end(key)
            while self._bytes > self._max_bytes and len(self._values) > 1:
                self._bytes -= self._size(self._values.popitem(last=False)[1])
        return value


class Canvas:
    """The tiles of one array whose checksums are known.

    `blocks`: recently read chunks, which canvases share. `colors`: from the array's colours to sRGB; None: it is sRGB.
    """

    def __init__(self, array: StageArray, blocks: Recent[Pixels], colors: OutputColors | None = None) -> None:
        assert array.checksums is not None
        self.array, self._blocks, self._colors = array, blocks, colors
        self.height, self.width, self._channels = array.shape
        self.max_level = max_level(self.height, self.width)
        self._halvings = OVERVIEW
        # A chunk's side is a multiple of 16 px, so that its part of the overview is whole px.
        if (self.height >> OVERVIEW) * (self.width >> OVERVIEW) * self._channels > _MAX_OVERVIEW_BYTES:
            self._halvings += 1
        self._overview: Pixels | None = None
        self._filled: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    @property
    def overview_bytes(self) -> int:
        """The memory of the overview, once a coarse tile has been asked for."""
        return (-(-self.height >> self._halvings)) * (-(-self.width >> self._halvings)) * self._channels

    def tile(self, level: int, column: int, row: int) -> Pixels:
        """One tile, (rows, columns, channels). Raises LookupError outside the picture, ChunkError, StorageError."""
        if not 0 <= level <= self.max_level or column < 0 or row < 0:
            raise LookupError(f"there is no level {level}")
        shrink = self.max_level - level
        height, width = -(-self.height >> shrink), -(-self.width >> shrink)
        y0, x0 = row * TILE_PX, column * TILE_PX
        if y0 >= height or x0 >= width:
            raise LookupError(f"level {level} has no tile in column {column}, row {row}")
        rect = Rect(y0, min(y0 + TILE_PX, height), x0, min(x0 + TILE_PX, width))
        if shrink < self._halvings:
            return self._shrunk(rect, shrink, self.height, self.width, self._full)
        halvings = self._halvings
        sides = -(-self.height >> halvings), -(-self.width >> halvings)
        return self._shrunk(rect, shrink - halvings, *sides, self._coarse)

    def _shrunk(self, rect: Rect, halvings: int, height: int, width: int, read: Callable[[Rect], Pixels]) -> Pixels:
        """A rectangle of a level, as means of what `read` gives from the (height, width) px that it is made of."""
        y0, y1, x0, x1 = (edge << halvings for edge in rect)
        return block_means(read(Rect(y0, min(y1, height), x0, min(x1, width))), halvings)

    def _full(self, rect: Rect) -> Pixels:
        out = np.empty((rect.height, rect.width, self._channels), np.uint8)
        for cy, cx, part in chunks_of(rect, self.array.chunk_px):
            out[part.within(rect)] = self._block(cy, cx)[part.within(self.array.chunk_rect(cy, cx))]
        return out

    def _coarse(self, rect: Rect) -> Pixels:
        """A rectangle of the overview, after the chunks under it have been read."""
        step = self.array.chunk_px >> self._halvings
        with self._lock:
            if self._overview is None:
                sides = -(-self.height >> self._halvings), -(-self.width >> self._halvings)
                self._overview = np.zeros((*sides, self._channels), np.uint8)
            overview = self._overview
        missing = [(cy, cx) for cy, cx, _ in chunks_of(rect, step) if (cy, cx) not in self._filled]
        for (cy, cx), written in Overview(self.array).chunks(missing):
            if written is None:
                small = block_means(self._read(cy, cx), self._halvings)
            else:
                small = block_means(self._shown(written), self._halvings - OVERVIEW)
            overview[cy * step : cy * step + len(small), cx * step : cx * step + small.shape[1]] = small
            self._filled.add((cy, cx))
        return overview[rect.y0 : rect.y1, rect.x0 : rect.x1]

    def _block(self, cy: int, cx: int) -> Pixels:
        assert self.array.checksums is not None
        key = self.array.path, cy, cx, int(self.array.checksums[cy, cx])
        found = self._blocks.get(key)
        return self._blocks.put(key, self._read(cy, cx)) if found is None else found

    def _read(self, cy: int, cx: int) -> Pixels:
        """The valid part of a chunk, rounded as the export rounds it."""
        array = self.array
        stored: NDArray[Any] = np.empty(array.chunk_shape, array.dtype)
        array.read_chunk(cy, cx, stored)
        values = stored[array.valid_part(cy, cx)]
        if array.encoding is not None:
            values = array.encoding.decoded(values)
        if values.dtype != np.uint8:
            np.clip(values, 0, 255, out=values)
        return self._shown(values)

    def _shown(self, values: NDArray[Any]) -> Pixels:
        """Values of the array in sRGB, rounded; `values` may be overwritten."""
        if self._colors is not None:
            values = self._colors.convert(values)
        if values.dtype != np.uint8:
            values = np.rint(values, out=values)  # a new array would cost more than the rounding: its pages are new
        pixels: Pixels = values.astype(np.uint8, copy=False)
        return pixels


def max_level(height: int, width: int) -> int:
    """The DeepZoom level of the picture itself."""
    return (max(height, width) - 1).bit_length()
