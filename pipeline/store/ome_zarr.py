"""Writing an image as an OME-Zarr pyramid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline.core.cancel import NEVER, CancelToken
from pipeline.core.image_formats import PixelKind
from pipeline.core.lengths import MM_PER_INCH
from pipeline.core.tiling import Rect, chunks_of
from pipeline.store.overview import block_means, block_sums


def write_ome_zarr(
    path: Path,
    size: tuple[int, int],
    kind: PixelKind,
    read_rows: Callable[[int, int], NDArray[Any]],
    chunk_px: int = 512,
    cancel: CancelToken = NEVER,
    dpi: float | None = None,
) -> None:
    """Write an OME-Zarr 0.5 image pyramid, axes (c, y, x), each level the 2×2 means of the one before.

    `size`: (H, W). `read_rows(y0, y1)` returns (rows, W, channels), uint8 or uint16 as `kind` says. At most one band of
    chunk rows is in memory. `dpi`: the resolution, for axes in millimetres. Raises Stopped soon after `cancel` is set.
    """
    height, width = size
    group = zarr.create_group(path, overwrite=True)
    level = _create_level(path / "0", (height, width), kind, chunk_px)
    for y0 in range(0, height, chunk_px):
        rows_CHW = np.moveaxis(read_rows(y0, min(y0 + chunk_px, height)), 2, 0)
        # One call per chunk: after a failure, zarr would still write the other chunks of the call.
        for x0 in range(0, width, chunk_px):
            level.set_block_selection((0, y0 // chunk_px, x0 // chunk_px), rows_CHW[:, :, x0 : x0 + chunk_px])
    levels = 1
    while max(height, width) > chunk_px:
        height, width = max(1, height // 2), max(1, width // 2)
        level = _halve(level, _create_level(path / str(levels), (height, width), kind, chunk_px), cancel)
        levels += 1
    group.attrs["ome"] = _ome_metadata(path.stem, size, levels, kind, dpi)


def add_attributes(path: Path, attributes: Mapping[str, Any]) -> None:
    """Add attributes beside `ome` to the group of an image."""
    zarr.open_group(path, mode="r+", zarr_format=3).attrs.update(attributes)


def _create_level(path: Path, size: tuple[int, int], kind: PixelKind, chunk_px: int) -> Any:
    return zarr.create_array(
        path,
        shape=(kind.channels, *size),
        chunks=(kind.channels, chunk_px, chunk_px),
        dtype=f"uint{kind.bits}",
        dimension_names=("c", "y", "x"),
        config={"write_empty_chunks": True},
    )


def _halve(fine: Any, coarse: Any, cancel: CancelToken) -> Any:
    """Fill `coarse`, chunk by chunk, with the means of 2×2 squares of `fine`; a last odd row or column is dropped."""
    _, height, width = coarse.shape
    for cy, cx, part in chunks_of(Rect(0, height, 0, width), coarse.chunks[1]):
        cancel.raise_if_set()
        block_HWC = np.moveaxis(fine[:, 2 * part.y0 : 2 * part.y1, 2 * part.x0 : 2 * part.x1], 0, 2)
        coarse.set_block_selection((0, cy, cx), np.moveaxis(_halved(block_HWC), 2, 0))
    return coarse


def _halved(block_HWC: NDArray[Any]) -> NDArray[Any]:
    """The means of 2×2 squares. Colours count by their alpha: those of transparent pixels are not seen."""
    means = block_means(block_HWC, 1)
    if block_HWC.shape[2] == 4:
        colors, alpha = block_HWC[..., :3].astype(np.uint64), block_HWC[..., 3:]
        weights, weighted = block_sums(alpha, 1, np.uint64), block_sums(colors * alpha, 1, np.uint64)
        seen = (weighted + weights // 2) // np.maximum(weights, 1)
        means[..., :3] = np.where(weights > 0, seen, means[..., :3])
    return means


def _grids(size: tuple[int, int], levels: int) -> list[tuple[list[float], list[float]]]:
    """(size of a pixel, position of the first pixel's centre) of every level, as (y, x) in pixels of the first.

    A pixel of a level is the mean of two of the level before, so that its centre lies between theirs; a side of 1 px
    is not halved again.
    """
    scales, offsets, sides = [1.0, 1.0], [0.0, 0.0], list(size)
    grids = [([*scales], [*offsets])]
    for _ in range(levels - 1):
        for axis in (0, 1):
            if sides[axis] > 1:
                offsets[axis] += scales[axis] / 2
                scales[axis] *= 2
                sides[axis] //= 2
        grids.append(([*scales], [*offsets]))
    return grids


# Labels and colours by which viewers show the channels as one picture.
_CHANNELS = (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"), ("alpha", "FFFFFF"))


def _omero(kind: PixelKind) -> dict[str, Any]:
    """How viewers show the channels: without it napari and others show red, green and blue as three grey images."""
    top = 2**kind.bits - 1
    window = {"min": 0, "max": top, "start": 0, "end": top}
    return {
        "channels": [
            {"label": label, "color": color, "window": window, "active": label != "alpha"}
            for label, color in _CHANNELS[: kind.channels]
        ],
        "rdefs": {"model": "color"},
    }


def _ome_metadata(name: str, size: tuple[int, int], levels: int, kind: PixelKind, dpi: float | None) -> dict[str, Any]:
    unit, px_size = ({}, 1.0) if dpi is None else ({"unit": "millimeter"}, MM_PER_INCH / dpi)
    datasets = []
    for level, (scales, offsets) in enumerate(_grids(size, levels)):
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": [1.0, *(px_size * scale for scale in scales)]}]
        if any(offsets):
            transforms.append({"type": "translation", "translation": [0.0, *(px_size * offset for offset in offsets)]})
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
    axes = [{"name": "c", "type": "channel"}, *({"name": axis, "type": "space", **unit} for axis in "yx")]
    return {
        "version": "0.5",
        "multiscales": [{"name": name, "axes": axes, "datasets": datasets}],
        "omero": _omero(kind),
    }
