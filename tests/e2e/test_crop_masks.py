"""Crops of runs with masks, where the region contains only a part of each mask."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips

import pipeline
from pipeline import CropSpec, crop, load_config, run
from pipeline.commands.preview.whole_image import WholeImage
from pipeline.core.errors import ConfigError
from pipeline.core.tiling import Rect
from pipeline.core.vgg_layers import LAYER_BY_NAME
from pipeline.executors.threads import ThreadExecutor
from pipeline.plan.device import Device
from pipeline.plan.plan import Plan
from pipeline.render.iteration import Iterations
from pipeline.render.preparation import Prepared, prepare
from pipeline.render.stage import Stage
from pipeline.store.array import open_array
from pipeline.store.guides import Guides
from tests.support.crops import CONTENT_PX, SHALLOW, no_estimate, stopped_before
from tests.support.e2e import read_picture, write_picture, write_run
from tests.support.inputs import write_config, write_image
from tests.support.masks import ramp
from tests.support.stages import EXACT, make_stage, read_whole, relative, write_mask

EVERYTHING = Rect(0, 110, 0, 150)
KEYS: dict[str, Any] = {
    "initial_size": 76,
    "network": SHALLOW,
    "optimizer": {"max_iterations": 4, "target_pixel_change": 6.0},
}


def squares(result: np.ndarray, real: np.ndarray) -> float:
    assert result.shape == real.shape
    return float(np.square(result.astype(float) - real).mean())


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on crops have no estimate of the whole image."""
    monkeypatch.setattr(WholeImage, "estimate", no_estimate)


# --- the objective ---


@dataclass
class _Measured:
    """A stage whose canvas is an image or a region of one: its weighted sums, and its gradient in float64."""

    stage: Stage
    prepared: Prepared

    def sums(self) -> dict[str, np.ndarray]:
        return self.stage.gram_sums(self.stage.canvas_grams("canvas_0", self.prepared.checksums), "Gram pass")

    def gradient(self, energies: dict[str, float], grams: dict[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        Iterations(self.stage, energies, self.prepared.areas, grams).iterate(
            0, None, self.prepared.checksums, lambda result: True
        )
        return read_whole(open_array(self.stage.stage_dir, "gradient"))


def part_of(folder: Path, weights: Path, executor: ThreadExecutor, rect: Rect, kind: str) -> _Measured:
    """A region of an image of 96×240 px with four styles, two masks, a rest and a content map."""
    folder.mkdir()
    size, rows, columns = (96, 240), slice(*rect[:2]), slice(*rect[2:])
    for name, seed in (("content", 1), ("start", 2)):
        pixels = np.ascontiguousarray(write_image(folder / f"{name}.png", *size, seed=seed)[rows, columns])
        pyvips.Image.new_from_array(pixels, interpretation="srgb").write_to_file(str(folder / f"{name}.png"))
    for index in range(4):
        write_image(folder / f"style{index}.png", 40, 50 - index, seed=3 + index)
    right, left = ramp(*size, 0.35, 0.5), 255 - ramp(*size, 0.1, 0.2)
    names = [write_mask(folder, mask[rows, columns]) for mask in (right, left, ramp(*size, 0.2, 0.7))]
    masks = [names[0], names[1], None, names[0]]
    config = load_config(
        write_config(
            folder,
            styles=[{"image": f"style{index}.png", "mask": mask} for index, mask in enumerate(masks)],
            initial_size=max(rect.height, rect.width),
            init="start.png",
            network={"weights": str(weights), **SHALLOW, "name": "vgg19"},
            loss={"content_mask": names[2], "kind": kind},
            compute={"dtype": "float64", "device": "cpu", "tile_px": 64},
            store={"chunk_px": 32},
        )
    )
    stage = make_stage(config, pipeline.plan(config), executor)
    return _Measured(stage, prepare(stage, None, is_region=True))


@pytest.mark.parametrize("kind", ["normalized", "gatys", "wasserstein"])
def test_with_the_wholes_grams_a_regions_gradient_is_the_wholes(tmp_path, narrow_weights, kind):
    """The strength of a style must not depend on how much of its mask is in the region."""
    everything, rect, halo = Rect(0, 96, 0, 240), Rect(0, 96, 80, 208), 32
    with ThreadExecutor(2) as executor:
        whole = part_of(tmp_path / "whole", narrow_weights, executor, everything, kind)
        region = part_of(tmp_path / "region", narrow_weights, executor, rect, kind)
        areas = whole.prepared.areas
        assert region.stage.layer_use.guides == Guides(masks=2, rest=True, content=True)
        assert 0 < region.prepared.areas["conv2_1_r0"] < 0.9 * areas["conv2_1_r0"]  # a part of the mask
        assert region.prepared.areas["conv2_1_r1"] == 0 < areas["conv2_1_r1"]  # nothing
        own, of_whole = region.sums(), whole.sums()
        grams = {
            key: (of_whole[key] / areas[key], own[key] / area)
            for key, area in region.prepared.areas.items()
            if area > 0
        }
        share = {
            layer: rect.positions(LAYER_BY_NAME[layer]).area / everything.positions(LAYER_BY_NAME[layer]).area
            for layer in SHALLOW["content_layers"]
        }
        energies = {layer: energy * share[layer] for layer, energy in whole.prepared.content_energies.items()}
        result = region.gradient(energies, grams)[:, halo:-halo]
        expected = whole.gradient(dict(whole.prepared.content_energies), {})[:, 80:208][:, halo:-halo]
        assert relative(result, expected) < EXACT


# --- against the run ---


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """The folder of a run of 76 and 150 px with masks whose first stage is finished, and its final image.

    One mask is black in the right half, one in the upper; two styles share the first, one has none.
    """
    folder = tmp_path_factory.mktemp("masked")
    for index in range(4):
        write_picture(folder / f"style{index}.png", 60 - 5 * index, 50, seed=20 + 7 * index)
    # smaller than the canvas, so every stage resizes them
    left, lower = 255 - ramp(55, 75, 0.2, 0.35), np.ascontiguousarray(ramp(75, 55, 0.7, 0.9).T)
    names = [write_mask(folder, left), write_mask(folder, lower), None, write_mask(folder, left)]
    styles = [{"image": f"style{index}.png", "mask": name} for index, name in enumerate(names)]
    content_mask = write_mask(folder, ramp(55, 75, 0.0, 0.8))
    config = write_run(folder, CONTENT_PX, styles=styles, loss={"content_mask": content_mask}, **KEYS)
    stopped_before(config, 1)
    shutil.copytree(folder, finished := folder.with_name("finished"))
    return folder, read_picture(run(load_config(finished / "config.yaml")))


@pytest.fixture
def config(begun, tmp_path) -> Path:
    """A copy of the run, which one test may change."""
    shutil.copytree(begun[0], tmp_path / "begun")
    return tmp_path / "begun" / "config.yaml"


def test_crop_of_everything_with_masks_is_the_run(config, begun):
    """Masks must be where they are in the run, to the pixel."""
    np.testing.assert_array_equal(read_picture(crop(load_config(config), CropSpec(EVERYTHING))), begun[1])


@pytest.mark.parametrize(
    ("rect", "black"),
    [(Rect(70, 110, 0, 40), ()), (Rect(0, 30, 110, 150), (0, 1)), (Rect(70, 110, 100, 150), (0,))],
    ids=["all", "rest", "one mask"],
)
def test_corner_is_closer_to_the_run_with_every_masks_own_grams(config, begun, monkeypatch, rect, black):
    """Without the estimate, each style would be matched within the region's part of its mask."""
    monkeypatch.setattr(sys.modules["pipeline.commands.preview.crop_rendering"], "_SPREAD_PX", 0)
    areas: list[Any] = []
    iterations = Iterations.__post_init__
    monkeypatch.setattr(Iterations, "__post_init__", lambda self: (areas.append(self.areas), iterations(self))[1])
    with_whole = read_picture(crop(load_config(config), CropSpec(rect)))
    (own,) = areas
    assert {key for key, area in own.items() if area == 0} == {
        f"{layer}_r{number}" for layer in SHALLOW["style_layers"] for number in black
    }
    alone(monkeypatch)
    without = read_picture(crop(load_config(config), CropSpec(rect)))
    real = begun[1][rect.y0 : rect.y1, rect.x0 : rect.x1]
    assert squares(with_whole, real) < 0.7 * squares(without, real)


def test_content_map_alone(tmp_path, monkeypatch):
    """The content map must have the effect that it has in the run."""
    content_mask = write_mask(tmp_path, ramp(110, 150, 0.4, 0.7))
    config = write_run(tmp_path, CONTENT_PX, loss={"content_mask": content_mask, "content_weight": 0.5}, **KEYS)
    stopped_before(config, 1)
    result = read_picture(crop(load_config(config), CropSpec(EVERYTHING)))
    monkeypatch.setattr(sys.modules["pipeline.commands.preview.crop_rendering"], "_SPREAD_PX", 0)
    rect = Rect(0, 30, 110, 150)
    with_whole = read_picture(crop(load_config(config), CropSpec(rect)))
    alone(monkeypatch)
    without = read_picture(crop(load_config(config), CropSpec(rect)))
    real = read_picture(run(load_config(config)))
    np.testing.assert_array_equal(result, real)
    part = real[rect.y0 : rect.y1, rect.x0 : rect.x1]
    assert squares(with_whole, part) < 0.7 * squares(without, part)


# --- masks with little or no area ---


@pytest.mark.parametrize(("tv_weight", "max_difference"), [(0.0, 0), (1.0, 3)])
def test_part_that_nothing_paints_is_left_as_the_run_leaves_it(tmp_path, monkeypatch, tv_weight, max_difference):
    """Without style and content the gradient is 0: the crop must be neither NaN nor noise of Adam's first step."""
    monkeypatch.setattr(sys.modules["pipeline.commands.preview.crop_rendering"], "_SPREAD_PX", 0)
    write_picture(tmp_path / "start.png", *CONTENT_PX, seed=5)
    styles = [{"image": "style.png", "mask": write_mask(tmp_path, 255 - ramp(110, 150, 0.1, 0.2))}]
    loss = {"content_weight": 0.0, "tv_weight": tv_weight}
    texture = {"content": None, "size": list(CONTENT_PX), "init": "start.png", "loss": loss}
    config = write_run(tmp_path, CONTENT_PX, styles=styles, **{**KEYS, **texture})
    stopped_before(config, 1)
    rect = Rect(20, 80, 110, 150)
    result = read_picture(crop(load_config(config), CropSpec(rect)))
    real = read_picture(run(load_config(config)))[rect.y0 : rect.y1, rect.x0 : rect.x1]
    assert np.abs(result.astype(int) - real).max() <= max_difference


def test_mask_that_the_finished_stage_has_nothing_of(tmp_path):
    """The finished stage may lack a mask, by its own styles or because it is too fine: then there is no estimate."""
    faint = np.zeros((110, 150), np.uint8)
    faint[50, 75] = 1
    early = {"up_to": 100, "styles": [{"image": "style.png"}]}
    styles = [{"image": "style.png"}, {"image": "content.png", "mask": write_mask(tmp_path, faint)}]
    config = write_run(tmp_path, CONTENT_PX, styles=styles, stages=[early], **KEYS)
    stopped_before(config, 1)
    result = read_picture(crop(load_config(config), CropSpec(EVERYTHING)))
    np.testing.assert_array_equal(result, read_picture(run(load_config(config))))


def test_grams_of_the_whole_are_planned(tmp_path):
    """Otherwise a crop would exceed its memory limit."""
    write_picture(tmp_path / "mask.png", *(size := (1000, 700)))
    styles = [{"image": "style.png", "mask": "mask.png"}, {"image": "style.png"}]
    network = {"name": "random", "style_layers": {"conv5_1": 1.0}}
    keys = {"network": network, "compute": {"device": "cpu", "tile_px": "auto"}, "store": {"chunk_px": 32}}
    config = load_config(write_run(tmp_path, size, styles=styles, **{**KEYS, **keys}))
    plan, held = pipeline.plan(config), 3 * 2 * 128**2 * 8
    module: Any = sys.modules["pipeline.commands.preview.crop"]

    def planned(limit: int) -> Plan:
        memory = config.memory.model_copy(update={"limit": limit})
        at_limit = config.model_copy(update={"memory": memory})
        assert pipeline.plan(at_limit).projected_mem_bytes <= limit
        return module._planned(at_limit, Device("cpu", "cpu", 0))

    result = planned(plan.projected_mem_bytes)
    assert result.tile_px < plan.tile_px and result.projected_mem_bytes + held <= plan.projected_mem_bytes
    least = config.model_copy(update={"compute": config.compute.model_copy(update={"tile_px": 32})})
    with pytest.raises(ConfigError, match=r"--crop: 1 MiB of memory.limit are for the whole image's Gram matrices"):
        planned(pipeline.plan(least).projected_mem_bytes)
