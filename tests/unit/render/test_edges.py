"""Edges of a print: a wrong px shows as a seam on the side of a canvas, or as a white line after the cut."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.config import ExportConfig
from pipeline.core.errors import ConfigError
from pipeline.core.image_formats import RGB8
from pipeline.core.lengths import Length
from pipeline.core.tiling import Rect
from pipeline.plan import sheets_of
from pipeline.plan.image_memory import export_bytes
from pipeline.render.edges import sheet_rows
from tests.support.pictures import measured_mb

# At 254 dpi a px is 0.1 mm.
DPI = 254.0
OUTPUT = Path("/wall.tif")


def pixels(height: int, width: int, channels: int = 3, dtype: type = np.uint8) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


def drawn(canvas: NDArray[Any], band_px: int = 7, **options: Any) -> list[NDArray[Any]]:
    """The output images, in bands of rows; asserts that no band reads more of the canvas than its own rows."""
    images = []
    for sheet in sheets_of(OUTPUT, canvas.shape[:2], ExportConfig.model_validate({"dpi": DPI, **options})):
        reads: list[int] = []

        def read(rect: Rect, reads: list[int] = reads) -> NDArray[Any]:
            reads.append(rect.height)
            return canvas[rect.y0 : rect.y1, rect.x0 : rect.x1]

        read_rows = sheet_rows(read, sheet)
        bands = [read_rows(y0, min(y0 + band_px, sheet.size[0])) for y0 in range(0, sheet.size[0], band_px)]
        assert max(reads) <= band_px
        images.append(np.concatenate(bands))
        assert images[-1].shape[:2] == sheet.size
        assert images[-1].dtype == canvas.dtype
    return images


def mm(length_px: int) -> str:
    return f"{length_px / 10}mm"


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.sampled_from([3, 4]),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    edge_px=st.integers(0, 60),
    mode=st.sampled_from([("mirror", "symmetric"), ("stretch", "edge")]),
    key=st.sampled_from(["bleed", "wrap"]),
    band_px=st.integers(1, 50),
)
def test_edges_are_numpys(size, channels, dtype, edge_px, mode, key, band_px):
    """Mirrored is `symmetric` of numpy.pad (the outermost px is there twice), stretched is `edge`, at any size."""
    canvas, (name, padding) = pixels(*size, channels, dtype), mode
    (image,) = drawn(canvas, band_px, **{key: {name: mm(edge_px)}})
    np.testing.assert_array_equal(image, np.pad(canvas, [(edge_px, edge_px)] * 2 + [(0, 0)], mode=padding))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [3, 4])
def test_wrap_border_and_bleed_lie_in_this_order(channels, dtype):
    """A border of paper between the wrap and the cut is white and opaque, and so is its bleed."""
    canvas = pixels(9, 13, channels, dtype)
    (image,) = drawn(canvas, wrap={"mirror": mm(4), "stretch": mm(2)}, border=mm(3), bleed=mm(5))
    around = [(4, 4), (4, 4), (0, 0)]
    wrapped = np.pad(np.pad(canvas, around, mode="symmetric"), [(2, 2), (2, 2), (0, 0)], mode="edge")
    white = np.iinfo(dtype).max
    np.testing.assert_array_equal(
        image, np.pad(wrapped, [(8, 8), (8, 8), (0, 0)], mode="constant", constant_values=white)
    )


def test_without_a_border_the_bleed_continues_the_wrap():
    """Else the cut would show a white line on the side of the canvas."""
    canvas = pixels(20, 30)
    (image,) = drawn(canvas, wrap=mm(4), bleed=mm(3))
    wrapped = np.pad(canvas, [(4, 4), (4, 4), (0, 0)], mode="symmetric")
    np.testing.assert_array_equal(image, np.pad(wrapped, [(3, 3), (3, 3), (0, 0)], mode="symmetric"))


def test_crop_marks_point_at_the_cut_and_never_touch_the_picture():
    """The printer cuts along the marks: a px off is a line of bleed in the print."""
    canvas = np.full((50, 60, 4), 200, np.uint8)
    bleed_px, margin_px = 30, 80
    (image,) = drawn(canvas, bleed=mm(bleed_px), marks=True)
    inside = image[margin_px:-margin_px, margin_px:-margin_px]
    assert inside.shape[:2] == (110, 120)
    assert (inside == 200).all()
    assert (image[..., 3][:margin_px] == 255).all()  # the margin is opaque
    black = (image[..., :3] == 0).all(axis=2)
    # The strokes, a px wide, are just outside of the trimmed picture, and 5 mm long.
    first, below, right = margin_px + bleed_px - 1, margin_px + bleed_px + 50, margin_px + bleed_px + 60
    np.testing.assert_array_equal(np.flatnonzero(black[:, :60].any(axis=1)), [first, below])
    np.testing.assert_array_equal(np.flatnonzero(black[:60].any(axis=0)), [first, right])
    np.testing.assert_array_equal(np.flatnonzero(black[first, :80]), range(10, 60))
    np.testing.assert_array_equal(black, black[::-1])
    np.testing.assert_array_equal(black, black[:, ::-1])


@given(
    width=st.integers(1, 300), panel_px=st.integers(2, 200), overlap_px=st.integers(0, 60), bleed_px=st.integers(0, 20)
)
def test_panels_laid_side_by_side_are_the_picture(width, panel_px, overlap_px, bleed_px):
    """A strip that is missing, or is there twice, shows on the wall."""
    overlap_px = min(overlap_px, panel_px - 1)
    canvas = pixels(6, width)
    (whole,) = drawn(canvas, bleed=mm(bleed_px))
    panels = drawn(canvas, bleed=mm(bleed_px), panels={"width": mm(panel_px), "overlap": mm(overlap_px)})
    assert all(panel.shape[1] == panel_px for panel in panels[:-1])
    assert panels[-1].shape[1] <= panel_px
    for left, right in itertools.pairwise(panels):
        assert right.shape[1] > overlap_px  # it has something of its own
        np.testing.assert_array_equal(left[:, panel_px - overlap_px :], right[:, :overlap_px])
    joined = np.concatenate([panels[0], *(panel[:, overlap_px:] for panel in panels[1:])], axis=1)
    np.testing.assert_array_equal(joined, whole)


def test_panels_are_numbered_so_that_they_sort():
    names = [
        sheet.path.name
        for sheet in sheets_of(OUTPUT, (10, 100), ExportConfig.model_validate({"dpi": DPI, "panels": mm(10)}))
    ]
    assert names == [f"wall-{number:02}of10.tif" for number in range(1, 11)]
    one = sheets_of(OUTPUT, (10, 100), ExportConfig.model_validate({"dpi": DPI, "panels": mm(100)}))
    assert [sheet.path for sheet in one] == [OUTPUT]


def test_the_marks_of_a_panel_are_at_its_own_cut():
    """At the outer edge the bleed is cut off; at a seam the panel's own edge is, where the next one overlaps it."""
    left, right = drawn(pixels(50, 80), bleed=mm(10), marks=True, panels=mm(50))
    for panel, first, last in ((left, 10, 50), (right, 0, 40)):
        marks = np.flatnonzero((panel[20] == 0).all(axis=1))
        np.testing.assert_array_equal(marks, [80 + first - 1, 80 + last])


def test_edges_that_no_format_holds_are_refused_before_they_take_memory():
    with pytest.raises(ConfigError, match="10,000,000 px that any format holds"):
        sheets_of(OUTPUT, (10, 10), ExportConfig.model_validate({"dpi": 90_000, "bleed": "900m"}))
    with pytest.raises(ConfigError, match="more than 1000"):
        sheets_of(OUTPUT, (10, 10_000), ExportConfig.model_validate({"dpi": DPI, "panels": mm(2)}))


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_edges_stay_within_the_planned_memory(tmp_path, name):
    """A wall of 2 m would take all memory at the end of the run."""
    width, height = 16_000, 6_000
    around_px = Length.parse("6mm").px(300) + Length.parse("5cm").px(300)
    size = height + 2 * around_px, width + 2 * around_px
    planned = export_bytes(size, RGB8, tiff=name == "a.tif", pyramid=True, edges=True)
    assert measured_mb("bleed", tmp_path / name, "6mm", width, height) * 1e6 < planned < 3 * size[0] * size[1]
