"""Geometry: tiles, halos, chunks, and the layer table that determines them."""

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.tiling import Rect, chunks_of, grid
from pipeline.core.vgg_layers import ALIGN_PX, CONV_NAMES, LAYER_BY_NAME, LAYERS, VGG19_WIDTHS, halo_px, min_side_px
from pipeline.core.vgg_layers import needed_layers as needed
from tests.support.reference import CONVS, STRIDES, TORCHVISION_INDICES

sides = st.integers(1, 400)
multiples = st.integers(1, 12).map(lambda k: 16 * k)
layer_sets = st.sets(st.sampled_from(CONVS), min_size=1)


@st.composite
def rects(draw, height: int = 300, width: int = 300) -> Rect:
    y0, x0 = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    return Rect(y0, draw(st.integers(y0 + 1, height)), x0, draw(st.integers(x0 + 1, width)))


# --- the grid ---


@given(sides, sides, multiples)
def test_tiles_cover_every_pixel_exactly_once(height, width, tile_px):
    """A pixel in no tile would never change; a pixel in two tiles would be summed twice."""
    counts = [[0] * width for _ in range(height)]
    for tile in grid(height, width, tile_px):
        assert tile.inner.height > 0 < tile.inner.width
        for y in range(tile.inner.y0, tile.inner.y1):
            for x in range(tile.inner.x0, tile.inner.x1):
                counts[y][x] += 1
    assert all(count == 1 for row in counts for count in row)


@given(sides, sides, multiples)
def test_tiles_start_at_pooling_windows_and_never_exceed_their_size(height, width, tile_px):
    """A tile that starts inside a pooling window pools other pixels than the whole image does."""
    tiles = grid(height, width, tile_px)
    assert [tile.index for tile in tiles] == list(range(len(tiles)))
    assert [tile.inner for tile in tiles] == sorted(tile.inner for tile in tiles)  # row by row: the order of all sums
    for tile in tiles:
        y0, y1, x0, x1 = tile.inner
        assert y0 % 16 == x0 % 16 == 0
        assert y1 % 16 == 0 or y1 == height
        assert x1 % 16 == 0 or x1 == width
        assert tile.inner.height <= tile_px and tile.inner.width <= tile_px


@given(sides, sides, multiples, st.integers(0, 12).map(lambda k: 16 * k))
def test_outer_is_inner_and_halo_cut_at_the_border(height, width, tile_px, halo):
    """Too small a halo gives wrong pixels at tile edges; one beyond the border reads outside of the canvas."""
    for tile in grid(height, width, tile_px):
        y0, y1, x0, x1 = tile.inner
        assert tile.outer(halo) == (
            y0 - halo if y0 >= halo else 0,
            y1 + halo if y1 + halo <= height else height,
            x0 - halo if x0 >= halo else 0,
            x1 + halo if x1 + halo <= width else width,
        )


@pytest.mark.parametrize("tile_px", [0, -16, 8, 24, 100])
def test_tiles_that_would_cut_pooling_windows_are_refused(tile_px):
    """Silently rounding a tile size would plan other memory than is used."""
    with pytest.raises(ValueError, match="multiple of 16"):
        grid(100, 100, tile_px)


@given(sides, sides, multiples, st.sampled_from(CONVS))
def test_positions_of_tiles_cover_every_position_of_a_layer_once(height, width, tile_px, name):
    """Each position must count once for the Gram matrix to equal that of the whole image."""
    layer = LAYER_BY_NAME[name]
    parts = [tile.inner.positions(layer) for tile in grid(height, width, tile_px)]
    assert sum(part.area for part in parts) == (height // layer.stride) * (width // layer.stride)
    corners = {(part.y0, part.x0) for part in parts if part.area}
    assert len(corners) == sum(part.area > 0 for part in parts)


# --- chunks and rectangles ---


@given(rects(), multiples)
def test_chunks_of_a_rectangle_cover_it_exactly_once(rect, chunk_px):
    """A missing chunk would leave uninitialised memory in the window."""
    parts = list(chunks_of(rect, chunk_px))
    assert sum(part.area for _, _, part in parts) == rect.area
    assert len({(cy, cx) for cy, cx, _ in parts}) == len(parts)
    for cy, cx, part in parts:
        assert part.area > 0
        assert part.intersection(rect) == part
        assert cy * chunk_px <= part.y0 < part.y1 <= (cy + 1) * chunk_px
        assert cx * chunk_px <= part.x0 < part.x1 <= (cx + 1) * chunk_px


@given(rects(), rects())
def test_intersection_is_what_both_cover(first, second):
    """Copies between chunks and windows use this rectangle."""
    both = first.intersection(second)
    rows = set(range(first.y0, first.y1)) & set(range(second.y0, second.y1))
    columns = set(range(first.x0, first.x1)) & set(range(second.x0, second.x1))
    assert both.area == len(rows) * len(columns)
    if both.area:
        assert (both.y0, both.y1, both.x0, both.x1) == (min(rows), max(rows) + 1, min(columns), max(columns) + 1)


@given(rects())
def test_within_cuts_the_same_pixels_from_a_window(inner):
    """An off-by-one error here would shift the image against its halo."""
    outer = inner.grown(7, 300, 300)
    rows, columns = inner.within(outer)
    assert list(range(outer.y0, outer.y1))[rows] == list(range(inner.y0, inner.y1))
    assert list(range(outer.x0, outer.x1))[columns] == list(range(inner.x0, inner.x1))


# --- the layer table ---


def test_torchvision_indices_are_those_of_its_vgg19():
    """With a wrong index the weights of VGG-19 would be loaded into other layers, or not at all."""
    convs = [layer for layer in LAYERS if layer.kind == "conv"]
    assert [layer.name for layer in convs] == list(CONV_NAMES) == CONVS
    assert [layer.torchvision_index for layer in convs] == TORCHVISION_INDICES
    assert [layer.torchvision_index for layer in LAYERS if layer.kind == "pool"] == [4, 9, 18, 27]


def test_strides_and_widths_are_those_of_vgg19():
    """Tile positions and the memory plan are computed from these."""
    assert {name: LAYER_BY_NAME[name].stride for name in CONVS} == STRIDES
    assert [LAYER_BY_NAME[f"pool{block}"].stride for block in range(1, 5)] == [2, 4, 8, 16]
    assert [VGG19_WIDTHS[f"conv{block}_1"] for block in range(1, 6)] == [64, 128, 256, 512, 512]
    assert ALIGN_PX == 16


# 1 px per 3×3 convolution at its stride, added by hand from the drawing of VGG-19
@pytest.mark.parametrize(
    ("deepest", "radius_px", "halo"),
    [
        ("conv1_1", 1, 16),
        ("conv2_1", 4, 16),
        ("conv3_1", 10, 16),
        ("conv3_4", 22, 32),
        ("conv4_1", 30, 32),
        ("conv4_2", 38, 48),
        ("conv4_4", 54, 64),
        ("conv5_1", 70, 80),
    ],
)
@pytest.mark.parametrize("pooling", ["max", "average", "l2"])
def test_halo_is_the_receptive_radius_rounded_up(deepest, radius_px, halo, pooling):
    """16 px less give an error up to 0.8 of the gradient, 16 px more only cost time (eqs. 12, 13)."""
    assert halo_px([deepest], pooling) == halo_px(["conv1_1", deepest], pooling) == halo
    assert ceil(radius_px / 16) * 16 == halo


# as above, and 1, 2, 4, 8 px for the windows of the poolings, which reach one position beyond their cell
@pytest.mark.parametrize(
    ("deepest", "radius_px", "halo"),
    [
        ("conv1_2", 2, 16),
        ("conv2_1", 5, 16),
        ("conv3_4", 25, 32),
        ("conv4_1", 37, 48),
        ("conv4_2", 45, 48),
        ("conv5_1", 85, 96),
    ],
)
def test_halo_of_tent_pooling_has_its_windows_too(deepest, radius_px, halo):
    """With the halo of other poolings the outermost position of a tile would be missing."""
    assert halo_px([deepest], "tent") == ceil(radius_px / 16) * 16 == halo


@given(layer_sets)
def test_only_the_layers_down_to_the_deepest_are_run(names):
    """With a layer too few the pass crashes; a layer too many only costs time and memory."""
    deepest = max(names, key=CONVS.index)
    assert needed(names)[-1].name == deepest
    assert [layer.name for layer in needed(names) if layer.kind == "conv"] == CONVS[: CONVS.index(deepest) + 1]
    assert halo_px(names, "tent") == halo_px([deepest], "tent")


@given(layer_sets, st.sampled_from(["replicate", "zeros", "reflect"]))
def test_min_side_is_the_least_that_leaves_the_positions_padding_needs(names, padding):
    """Smaller images fail in the pooling or the reflection; larger ones must not be refused."""
    stride = max(STRIDES[name] for name in names)
    least = min_side_px(names, padding)
    positions = 2 if padding == "reflect" else 1
    assert least // stride == positions
    assert (least - 1) // stride == positions - 1
