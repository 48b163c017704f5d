"""The overview of a canvas: means of 8×8 px, and nothing of what is torn, stale or missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.core.tiling import chunks_of
from pipeline.store import (
    Overview,
    OverviewChunk,
    StageArray,
    create_array,
    create_stage,
    open_array,
    overview_path,
    overviews_bytes,
)


def canvas_with_overview(folder: Path, pixels: np.ndarray, form: str, chunk_px: int, rows: int) -> StageArray:
    """A canvas, and its overview made from blocks of this many rows."""
    create_stage(folder)
    create_array(folder, "canvas_0", pixels.shape, chunk_px, form, "none")
    array, sums = open_array(folder, "canvas_0"), {}
    for cy, cx, part in chunks_of(array.rect, chunk_px):
        whole = np.full(array.chunk_shape, 77, np.float32)  # what lies outside the image must not count
        whole[: part.height, : part.width] = pixels[part.y0 : part.y1, part.x0 : part.x1]
        stored = array.encoding.encoded(whole) if array.encoding else whole.astype(array.dtype)
        sums[cy, cx] = array.write_chunk(cy, cx, stored)
        overview = OverviewChunk(array, (cy, cx))
        for y0 in range(0, chunk_px, rows):
            overview.add(stored[y0 : y0 + rows])
        overview.write(sums[cy, cx])
    return open_array(folder, "canvas_0", array.packed(sums))


@pytest.mark.parametrize(
    ("form", "size", "chunk_px", "rows"),
    [("float32", (300, 500), 64, 64), ("float64", (301, 503), 64, 10), ("fixed16", (100, 90), 112, 13)],
)
def test_shows_the_mean_of_each_block(tmp_path, form, size, chunk_px, rows) -> None:
    pixels = np.random.default_rng(0).uniform(0, 255, (*size, 3)).astype(np.float32)
    array = canvas_with_overview(tmp_path / "stage_0", pixels, form, chunk_px, rows)
    assert 2 * overview_path(array).stat().st_size == overviews_bytes(size, chunk_px)  # as the plan says
    shown = np.zeros((-(-size[0] // 8), -(-size[1] // 8), 3))
    for (cy, cx), part in Overview(array).chunks(array.chunk_indices()):
        y0, x0 = cy * chunk_px // 8, cx * chunk_px // 8
        shown[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]] = part
    means = [[pixels[y : y + 8, x : x + 8].mean((0, 1)) for x in range(0, size[1], 8)] for y in range(0, size[0], 8)]
    assert np.abs(shown - means).max() < 0.51


def test_records_that_are_stale_or_torn_do_not_count(tmp_path) -> None:
    """Otherwise a page would show one iteration's picture as that of another."""
    pixels = np.full((128, 64, 3), 99, np.float32)
    array = canvas_with_overview(tmp_path / "stage_0", pixels, "float32", 64, 64)
    path, indices = overview_path(array), array.chunk_indices()

    def good() -> list[bool]:
        return [part is not None for _, part in Overview(array).chunks(indices)]

    assert good() == [True, True]
    OverviewChunk(array, (0, 0)).write(1)  # of another iteration
    assert good() == [False, True]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert good() == [False, False]
    path.write_bytes(data[:-9])
    assert good() == [False, False]
    path.unlink()
    assert good() == [False, False]
    path.symlink_to("/etc/passwd")
    assert good() == [False, False]
    OverviewChunk(array, (0, 0)).write(1)  # no error, and no write through the link
