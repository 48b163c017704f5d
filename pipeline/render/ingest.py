"""Pixels between image files and the store: reading inputs, enlarging a canvas for the next stage, export."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import images
from pipeline.config.sections import ExportConfig
from pipeline.core.errors import storage
from pipeline.core.events import in_order
from pipeline.core.files import new_partial
from pipeline.core.image_formats import PixelKind
from pipeline.core.tiling import Rect, chunks_of
from pipeline.executors.threads import Engine
from pipeline.images import writer
from pipeline.losses import color
from pipeline.store import ome_zarr
from pipeline.store.array import StageArray
from pipeline.store.checksums import ChunkSums

OnProgress = Callable[[int, int], None]
_CHANNELS = (slice(3), slice(3, 4))  # of the colours, and of alpha


def ingest(source: Path, array: StageArray, engine: Engine, on_progress: OnProgress) -> str:
    """Stream an image file, resized to the array's size, into an array of 8 or 16 bits; gives the packed checksums.

    An array of one channel takes its luminance, which is the grey of a grey picture.
    Raises InputError for a broken file.
    """
    (sums,) = ingest_planes(source, [array], engine, on_progress)
    return sums


def ingest_planes(source: Path, planes: Sequence[StageArray], engine: Engine, on_progress: OnProgress) -> list[str]:
    """The same for the colours of an image, and its alpha if there is a second array, in one sweep."""
    first = planes[0]
    height, width, _ = first.shape
    kind = PixelKind(8 * first.dtype.itemsize, alpha=len(planes) == 2)
    sums: list[ChunkSums] = [{} for _ in planes]
    parts = list(zip(planes, _CHANNELS, sums, strict=False))
    for y0, rows in images.stream_rgb(source, width, height, first.chunk_px, engine.raise_if_stopped, kind):
        engine.raise_if_stopped()
        rect = Rect(y0, y0 + len(rows), 0, width)
        pixels = rows if first.shape[2] == 3 else np.rint(color.luminance(rows.astype(np.float32))).astype(np.uint8)
        for plane, channels, written in parts:
            written.update(plane.write_window(rect, pixels[..., channels]))
        on_progress(y0 + len(rows), height)
    return [plane.packed(written) for plane, written in zip(planes, sums, strict=True)]


@dataclass(frozen=True)
class CopySpec:
    """Fill one chunk row of `target` from `source`, which has the same size, or is to be enlarged."""

    source: StageArray
    target: StageArray
    rect: Rect


def copy_task(spec: CopySpec) -> ChunkSums:
    """Fill chunks with the source's own pixels, converted to the target's numbers."""
    sums: ChunkSums = {}
    for _, _, part in chunks_of(spec.rect, spec.target.chunk_px):
        sums |= spec.target.write_window(part, spec.source.read_window(part).astype(spec.target.value_dtype))
    return sums


def enlarge_task(spec: CopySpec) -> ChunkSums:
    """Fill chunks by centred bicubic enlargement, clipped to 0..255; the same as enlarging the whole image."""
    source_size, target_size = spec.source.shape[:2], spec.target.shape[:2]
    sums: ChunkSums = {}
    for _, _, part in chunks_of(spec.rect, spec.target.chunk_px):
        window = Rect(*images.source_window(part, source_size, target_size))
        pixels = spec.source.read_window(window)
        resized = images.resize_window(pixels, window, source_size, target_size, part)
        sums |= spec.target.write_window(part, np.clip(resized, 0, 255))
    return sums


def fill_canvas(source: StageArray, target: StageArray, engine: Engine, on_progress: OnProgress) -> str:
    """Start a canvas from the content (same size) or from the last stage's canvas; gives the packed checksums."""
    height, width, _ = target.shape
    task = copy_task if source.shape == target.shape else enlarge_task
    rows = range(0, height, target.chunk_px)
    specs = [CopySpec(source, target, Rect(y0, min(y0 + target.chunk_px, height), 0, width)) for y0 in rows]
    sums: ChunkSums = {}
    for written in engine.map(task, specs, in_order(on_progress, len(specs))):
        sums |= written
    return target.packed(sums)


def canvas_rows(canvas: StageArray, alpha: StageArray | None, bits: int) -> Callable[[int, int], NDArray[Any]]:
    """A reader of rows as exported: (y0, y1) to (rows, W, 3 or 4) uint8 or uint16, rounded to the nearest level."""
    levels, dtype = (255, np.uint8) if bits == 8 else (65535, np.uint16)
    width = canvas.shape[1]
    planes = [canvas] if alpha is None else [canvas, alpha]

    def read_rows(y0: int, y1: int) -> NDArray[Any]:
        out = np.empty((y1 - y0, width, sum(plane.shape[2] for plane in planes)), dtype)
        for x0 in range(0, width, canvas.chunk_px):  # chunk by chunk: float rows of the whole width would be large
            x1 = min(x0 + canvas.chunk_px, width)
            for plane, channels in zip(planes, _CHANNELS, strict=False):
                pixels = plane.read_window(Rect(y0, y1, x0, x1))
                out[:, x0:x1, channels] = np.rint(np.clip(pixels, 0, 255) * (levels / 255))
        return out

    return read_rows


def export_canvas(
    canvas: StageArray,
    alpha: StageArray | None,
    output: Path,
    options: ExportConfig,
    check: Callable[[], None],
    on_progress: OnProgress,
    on_whole: Callable[[Path], None] = lambda partial: None,
) -> None:
    """Write a canvas as the picture `output`, in the format of its suffix; it has its name only when it is whole.

    `alpha`: a fourth channel, for formats that have it. `options`: without any auto. `check` is called after every
    read, and while waiting; it may raise to give up, leaving nothing behind. `on_whole`: as for write_image.
    Raises StorageError, ConfigError (format limits), or what `check` raises.
    """
    assert options.bits != "auto"
    height, width, _ = canvas.shape
    kind = PixelKind(options.bits, alpha is not None)
    read = canvas_rows(canvas, alpha, kind.bits)

    def read_rows(y0: int, y1: int) -> NDArray[Any]:
        rows = read(y0, y1)
        check()
        return rows

    if output.suffix.lower() == ".zarr":
        with storage(output):
            _export_ome_zarr(output, (height, width), kind, read_rows, check, on_progress, on_whole)
        return
    writer.write_image(
        output,
        width,
        height,
        read_rows,
        kind=kind,
        compression=options.compression,
        quality=options.quality,
        pyramid=options.pyramid,
        on_progress=lambda share: on_progress(math.floor(share * 100), 100),
        check=check,
        on_whole=on_whole,
    )


def _export_ome_zarr(
    output: Path,
    size: tuple[int, int],
    kind: PixelKind,
    read_rows: Callable[[int, int], NDArray[Any]],
    check: Callable[[], None],
    on_progress: OnProgress,
    on_whole: Callable[[Path], None],
) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = new_partial(output)

    def counted_rows(y0: int, y1: int) -> NDArray[Any]:
        on_progress(y1, size[0])
        return read_rows(y0, y1)

    try:
        aside.mkdir()
        group = aside / output.name
        ome_zarr.write_ome_zarr(group, size, kind, counted_rows, check=check)
        writer.put_in_place(group, output, on_whole)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
