"""Parts of pictures: cut from a file that is resized, enlarged from a part of a canvas, written as a picture.

A part is a rectangle of a picture of a size (height, width), in px; what is kept of it starts at its corner.
Axes in names: H rows, W columns, C channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import images
from pipeline.core.tiling import Rect, chunks_of
from pipeline.executors.threads import Engine
from pipeline.images import writer
from pipeline.losses import color
from pipeline.losses.color import ColorStatistics
from pipeline.plan.memory import Size
from pipeline.store.array import StageArray
from pipeline.store.checksums import ChunkSums

_BAND_PX = 256


@dataclass(frozen=True)
class Part:
    """An array that keeps the rectangle `rect` of a picture of `size`."""

    array: StageArray
    rect: Rect
    size: Size


def whole(array: StageArray) -> Part:
    """An array that keeps a picture from border to border."""
    height, width, _ = array.shape
    return Part(array, Rect(0, height, 0, width), (height, width))


def moved(rect: Rect, y: int, x: int) -> Rect:
    """The rectangle `y` further down and `x` further right."""
    return Rect(rect.y0 + y, rect.y1 + y, rect.x0 + x, rect.x1 + x)


def needed(rect: Rect, size: Size, source_size: Size) -> Rect:
    """The rectangle of a picture of `source_size` that `enlarge` reads for `rect` of it at `size`."""
    return rect if size == source_size else Rect(*images.source_window(rect, source_size, size))


@dataclass(frozen=True)
class EnlargeSpec:
    """Fill a row of chunks of `target` from `source`, a part of the same picture that is smaller or as large."""

    source: Part
    target: Part
    rect: Rect


def enlarge_task(spec: EnlargeSpec) -> ChunkSums:
    """The bits that enlarging the whole picture would give here (transfer.py)."""
    source, target = spec.source, spec.target
    sums: ChunkSums = {}
    for _, _, own in chunks_of(spec.rect, target.array.chunk_px):
        rect = moved(own, target.rect.y0, target.rect.x0)
        window = needed(rect, target.size, source.size)
        pixels = source.array.read_window(moved(window, -source.rect.y0, -source.rect.x0))
        if target.size != source.size:
            pixels = np.clip(images.resize_window(pixels, window, source.size, target.size, rect), 0, 255)
        sums |= target.array.write_window(own, pixels.astype(target.array.value_dtype))
    return sums


def enlarge(source: Part, target: Part, engine: Engine) -> str:
    """Fill a part of a picture from one that holds all that is `needed`; gives the packed checksums."""
    height, width, _ = target.array.shape
    rows = range(0, height, target.array.chunk_px)
    rects = [Rect(y0, min(y0 + target.array.chunk_px, height), 0, width) for y0 in rows]
    sums: ChunkSums = {}
    for written in engine.map(enlarge_task, [EnlargeSpec(source, target, rect) for rect in rects]):
        sums |= written
    return target.array.packed(sums)


def cut_file(path: Path, size: Size, rect: Rect, output: Path, check: Callable[[], None]) -> ColorStatistics:
    """Write the rectangle `rect` of an image file, resized to `size`, as the picture `output`.

    Gives the colours of the whole image at that size. Raises InputError for a broken file, StorageError, or what
    `check` raises.
    """
    seen: list[tuple[color.Matrix, color.Matrix]] = []
    # closed when a write fails: the error keeps this frame, and with it the decoder's thread and the open file
    with closing(images.stream_rgb(path, size[1], size[0], min(_BAND_PX, size[0]), check)) as decoded:
        bands = _cut_bands(decoded, rect, seen)
        write_rows(bands, output, (rect.height, rect.width), check)
        for _ in bands:
            raise AssertionError("a cut has no more rows than its rectangle")
    return color.statistics_of(seen, size[0] * size[1])


def _cut_bands(
    bands: Iterator[tuple[int, NDArray[Any]]], rect: Rect, seen: list[tuple[color.Matrix, color.Matrix]]
) -> Iterator[NDArray[Any]]:
    for y0, rows_HWC in bands:
        seen.append(color.moments(rows_HWC))
        part = rows_HWC[max(rect.y0 - y0, 0) : max(rect.y1 - y0, 0), rect.x0 : rect.x1]
        if len(part):
            yield part.copy()  # the band is not kept for it


def cut_canvas(
    canvas: Part, rect: Rect, output: Path, check: Callable[[], None], on_whole: Callable[[Path], None]
) -> None:
    """Write the rectangle `rect` of the picture that `canvas` keeps a part of, 8 bits a channel, as `output`."""
    write_rows(_canvas_bands(canvas, rect), output, (rect.height, rect.width), check, on_whole=on_whole)


def _canvas_bands(canvas: Part, rect: Rect) -> Iterator[NDArray[Any]]:
    for y0 in range(rect.y0, rect.y1, _BAND_PX):
        band = Rect(y0, min(y0 + _BAND_PX, rect.y1), rect.x0, rect.x1)
        pixels = canvas.array.read_window(moved(band, -canvas.rect.y0, -canvas.rect.x0))
        yield np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def write_rows(
    bands: Iterator[NDArray[Any]],
    output: Path,
    size: Size,
    check: Callable[[], None],
    on_progress: Callable[[float], None] | None = None,
    on_whole: Callable[[Path], None] = lambda partial: None,
) -> None:
    """Write bands of rows, one below the other, whatever their heights, as a picture of `size`."""
    rest: list[NDArray[Any]] = []

    def read_rows(y0: int, y1: int) -> NDArray[Any]:
        while sum(map(len, rest)) < y1 - y0:
            rest.append(next(bands))
        found = np.concatenate(rest)
        rest[:] = [found[y1 - y0 :]]
        return found[: y1 - y0]

    writer.write_image(output, size[1], size[0], read_rows, check=check, on_progress=on_progress, on_whole=on_whole)


def tiles_of(rect: Rect, tile_px: int) -> list[Rect]:
    """The rectangle in pieces of at most `tile_px` on a side."""
    rows, columns = range(rect.y0, rect.y1, tile_px), range(rect.x0, rect.x1, tile_px)
    return [
        Rect(y, min(y + tile_px, rect.y1), x, min(x + tile_px, rect.x1)) for y, x in itertools.product(rows, columns)
    ]
