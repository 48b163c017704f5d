"""Writing an image as an OME-Zarr pyramid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline.core.cancel import NEVER, CancelToken
from pipeline.core.image_formats import PixelKind
from pipeline.core.lengths import MM_PER_INCH
from pipeline.core.tiling import Rect, chunks_of


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
    group.attrs["ome"] = _ome_metadata(path.stem, levels, dpi)


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
        block = np.asarray(fine[:, 2 * part.y0 : 2 * part.y1, 2 * part.x0 : 2 * part.x1], np.uint32)
        missing = (2 * part.height - block.shape[1], 2 * part.width - block.shape[2])  # if a side is 1 px
        block = np.pad(block, ((0, 0), (0, missing[0]), (0, missing[1])), mode="edge")
        summed = block[:, 0::2, 0::2] + block[:, 0::2, 1::2] + block[:, 1::2, 0::2] + block[:, 1::2, 1::2]
        coarse.set_block_selection((0, cy, cx), ((summed + 2) // 4).astype(coarse.dtype))
    return coarse


def _ome_metadata(name: str, levels: int, dpi: float | None) -> dict[str, Any]:
    unit, px_size = ({}, 1.0) if dpi is None else ({"unit": "millimeter"}, MM_PER_INCH / dpi)
    axes = [{"name": "c", "type": "channel"}, *({"name": axis, "type": "space", **unit} for axis in "yx")]
    return {
        "version": "0.5",
        "multiscales": [
            {
                "name": name,
                "axes": axes,
                "datasets": [
                    {
                        "path": str(level),
                        "coordinateTransformations": [
                            {"type": "scale", "scale": [1.0, px_size * 2.0**level, px_size * 2.0**level]}
                        ],
                    }
                    for level in range(levels)
                ],
            }
        ],
    }
