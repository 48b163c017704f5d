"""Several scales at once (`loss.scales`): exact over tiles like one, and read only what is written."""

from __future__ import annotations

import time

import pytest

from pipeline.core.tiling import Tile
from pipeline.render import update
from pipeline.store.layout import gram_key, is_stage_array, layer_key, layer_of, scale_of, style_key
from tests.support.masks import ramp
from tests.support.stages import Case, InOrder, Rendering, assert_exact, prepared, relative

# A halo of 16 px, so that small canvases have tiles with real cuts at coarse scales: 32 px of each scale around.
SHALLOW = {"content_layers": {"conv2_2": 1.0}, "style_layers": {"conv1_1": 0.4, "conv2_1": 0.6}}


def has_cuts_on_all_sides(tile: Tile, around_px: int) -> bool:
    outer = tile.outer(around_px)
    return outer.y0 > 0 and outer.x0 > 0 and outer.y1 < tile.height and outer.x1 < tile.width


@pytest.mark.parametrize(
    ("size", "tile_px", "scales", "network"),
    [
        ((50, 67), 96, 2, {}),  # one tile: one forward pass for each scale
        ((65, 97), 32, 2, {}),  # a last row and column that fill no block, in tiles of their own
        ((67, 133), 64, 3, {}),
        ((193, 230), 32, 2, SHALLOW),
        ((71, 421), 64, 3, SHALLOW),
    ],
)
def test_any_partition_gives_the_whole_images_gradient_at_all_scales(
    tmp_path, narrow_weights, size, tile_px, scales, network
):
    """A coarse scale reaches far over its tile: wrong there, the tiles would show as large squares."""
    styles = ((70, 83),)
    with prepared(tmp_path, narrow_weights, size, tile_px, scales=scales, network=network, style_sizes=styles) as case:
        if size[0] > 190:
            assert any(has_cuts_on_all_sides(tile, 64) for tile in case.stage.tiles)
        assert_exact(case)


@pytest.mark.parametrize(
    "values",
    [
        {"loss": {"kind": "wasserstein", "tv_weight": 0.5}, "optimizer": {"color_space": "decorrelated"}},
        {"loss": {"kind": "gatys"}, "color": "luminance", "network": {"pooling": "average"}},
        {"color": "content", "network": {"padding": "reflect"}},
    ],
    ids=["wasserstein", "luminance", "content"],
)
def test_every_loss_and_colour_is_exact_at_all_scales(tmp_path, narrow_weights, values):
    """Users combine them; the coarse scales must compare the same colours with the same loss."""
    values["network"] = {**SHALLOW, **values.get("network", {})}
    with prepared(tmp_path, narrow_weights, (75, 133), 64, scales=3, **values) as case:
        assert_exact(case)


@pytest.mark.parametrize("tile_px", [32, 128])
def test_masks_are_shrunk_with_the_canvas(tmp_path, narrow_weights, tile_px):
    """A mask that lay elsewhere at a coarse scale would paint a style over its border."""
    size = (67, 101)
    first, second = ramp(*size, 0.35, 0.6), 255 - ramp(*size, 0.1, 0.5)
    with prepared(
        tmp_path,
        narrow_weights,
        size,
        tile_px,
        scales=2,
        masks=(first, None, second),
        content_mask=ramp(*size, 0.2, 0.9),
        network=SHALLOW,
        style_sizes=((50, 67), (40, 33), (33, 48)),
        style_weights=(1.0, 2.0, 0.5),
    ) as case:
        assert case.stage.layer_use.guides.regions == 3
        assert_exact(case)


def test_a_coarse_window_that_is_smaller_is_seen(tmp_path, narrow_weights, monkeypatch):
    """If this error went unseen, the tests above would prove nothing of coarse scales."""
    # conv3_1 depends on 10 px, so its gradient on 20: more than the 16 that are left of 32
    network = {"content_layers": {"conv3_1": 1.0}, "style_layers": {"conv1_1": 1.0}}
    with prepared(tmp_path, narrow_weights, (75, 230), 32, scales=2, network=network) as case:
        wanted = case.problem.gradient(case.canvas)
        outer = Tile.outer
        # the window of scale 1 with the halo of scale 0
        monkeypatch.setattr(Tile, "outer", lambda tile, halo: outer(tile, 32 if halo == 64 else halo))
        case.iterate()
        assert relative(case.read("gradient"), wanted) > 1e-6


def test_the_next_gram_pass_waits_for_the_wider_windows(tmp_path, narrow_weights, monkeypatch):
    """A chunk farther away, read too early at a coarse scale, would mix two iterations into one picture."""
    # conv3_1 depends on 10 px: at scale 1 on 20, which are in the second of a tile's chunks of 16
    network = {"content_layers": {"conv1_1": 1.0}, "style_layers": {"conv3_1": 1.0}}
    values = {"size": (32, 288), "tile_px": 32, "scales": 2, "network": network, "chunk_px": 16}
    (tmp_path / "one").mkdir()
    with prepared(tmp_path / "one", narrow_weights, **values) as case:
        case.stage.executor = InOrder()
        expected = Rendering(case).finish()

    def update_task(spec, original=update.update_task):
        if (0, 17) in spec.chunks:  # the far half of the last tile, which only scale 1 of the tile before reads
            time.sleep(0.3)
        return original(spec)

    monkeypatch.setattr(update, "CHUNKS_PER_TASK", 1)
    monkeypatch.setattr(update, "update_task", update_task)
    (tmp_path / "many").mkdir()
    with prepared(tmp_path / "many", narrow_weights, **values) as case:
        assert Rendering(case).finish()[0] == expected[0]


def test_tasks_of_all_scales_give_the_same_bits_when_run_twice(tmp_path, narrow_weights):
    """A task that is repeated after a kill must not change the picture."""
    with prepared(tmp_path, narrow_weights, (65, 113), 32, scales=2, network=SHALLOW) as case:
        first = measured(case)
        assert measured(case) == first


def measured(case: Case) -> tuple[float, bytes, bytes]:
    return case.iterate().objective, case.read("gradient").tobytes(), case.read("canvas_1").tobytes()


def test_names_at_scale_0_are_those_of_runs_on_disk():
    """Runs from before this setting must resume; verify would move the arrays of coarse scales away as foreign."""
    assert layer_key("conv4_2", 0) == "conv4_2"
    for scale, region in ((0, None), (2, None), (0, 3), (2, 13)):
        key = layer_key("conv4_1", scale)
        key = key if region is None else style_key(key, region)
        assert (layer_of(key), scale_of(key)) == ("conv4_1", scale)
        assert gram_key(f"gram_{key}") == key
        assert is_stage_array(f"gram_{key}")
    assert is_stage_array("features_conv4_2") and is_stage_array("features_conv4_2_s3")
    for name in ("features_conv4_2_s0", "features_conv4_2_s", "features_conv4_2_r1", "gram_conv4_1_r1_s1"):
        assert not is_stage_array(name)
