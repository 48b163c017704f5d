"""The style targets of styles with alpha."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pyvips
import torch
from safetensors.torch import load_file

from pipeline.config.config import load_config
from pipeline.core.errors import InputError
from pipeline.executors.threads import ThreadExecutor
from pipeline.losses.color import moments as pixel_moments
from pipeline.losses.color import statistics_of
from pipeline.render.preparation import prepare
from pipeline.render.stage import Stage
from pipeline.rundir.preflight import plan
from pipeline.store import gram_name
from pipeline.store.metadata import read_gram
from tests.support import reference
from tests.support.inputs import write_config, write_image
from tests.support.stages import EXACT, make_problem, make_stage, relative

SIZE = (70, 83)


def half_transparent() -> np.ndarray:
    """(H, W) alpha: opaque at the left, transparent at the right, a ramp between them."""
    return np.broadcast_to(np.clip(np.arange(SIZE[1]) - 30, 0, 10)[None] * -25.5 + 255, SIZE).astype(np.uint8)


def write_style(folder: Path, alpha_HW: np.ndarray) -> np.ndarray:
    """style.png with this alpha; gives its pixels on white."""
    pixels = write_image(folder / "opaque.png", *SIZE, seed=7)
    rgba = np.dstack([pixels, alpha_HW])
    image = pyvips.Image.new_from_array(rgba, interpretation="srgb")
    image.write_to_file(str(folder / "style.png"))
    return image.flatten(background=[255] * 3).numpy().astype(np.float64)


def stage_of(folder: Path, weights: Path, executor: ThreadExecutor, **values) -> Stage:
    write_image(folder / "content.png", 64, 64, seed=1)
    path = write_config(
        folder,
        initial_size=96,
        network={"weights": str(weights)},
        compute={"dtype": "float64", "device": "cpu", "tile_px": 48},
        store={"chunk_px": 48},
        **values,
    )
    config = load_config(path)
    return make_stage(config, plan(config), executor)


@pytest.mark.parametrize("kind", ["normalized", "wasserstein"])
def test_transparent_parts_of_a_style_have_no_weight(tmp_path, narrow_weights, kind):
    """Cut-out textures and signatures: their white background must not become a part of the style."""
    alpha = half_transparent()
    style = write_style(tmp_path, alpha)
    with ThreadExecutor(2) as executor:
        stage = stage_of(tmp_path, narrow_weights, executor, loss={"kind": kind})
        sums = prepare(stage, None).checksums
        problem = make_problem(stage.config, style, [style], load_file(narrow_weights))
        maps = problem.features(torch.from_numpy(style))
        for layer in stage.layer_use.style_layers:
            mean, second = reference.moments(maps[layer], reference.at_layer(alpha / 255, layer))
            found = read_gram(stage.stage_dir, layer, sums[gram_name(layer)])
            if kind == "wasserstein":
                assert relative(found[:-1, -1], mean) < EXACT
                found = found[:-1, :-1]
            assert relative(found, second) < EXACT
        assert not (stage.stage_dir / "style").exists() and not (stage.stage_dir / "guide_0").exists()


def test_an_opaque_alpha_changes_nothing(tmp_path, narrow_weights):
    """Most PNGs have an alpha that is opaque everywhere."""
    write_style(tmp_path, np.full(SIZE, 255, np.uint8))
    targets = []
    for image in ("style.png", "opaque.png"):
        with ThreadExecutor(2) as executor:
            stage = stage_of(tmp_path, narrow_weights, executor, styles=[{"image": image}])
            sums = prepare(stage, None).checksums
            targets.append(
                [read_gram(stage.stage_dir, key, sums[gram_name(key)]) for key in stage.layer_use.style_keys]
            )
    assert all(relative(found, wanted) < EXACT for found, wanted in zip(*targets, strict=True))


def test_a_style_that_is_transparent_all_over_is_refused(tmp_path, narrow_weights):
    """Without a weight anywhere its statistics are 0/0: a picture of NaN after a day."""
    write_style(tmp_path, np.zeros(SIZE, np.uint8))
    with ThreadExecutor(2) as executor:
        stage = stage_of(tmp_path, narrow_weights, executor)
        with pytest.raises(InputError, match=r"style\.png: is transparent all over"):
            prepare(stage, None)


def test_colours_of_transparent_pixels_are_not_matched():
    """`color: content` would otherwise darken a style whose background is a white that nobody sees."""
    pixels, alpha = np.zeros((4, 6, 3)), np.zeros((4, 6, 1), np.uint8)
    pixels[:, :3], pixels[:, 3:], alpha[:, :3] = 40, 255, 200
    found = statistics_of([pixel_moments(pixels, alpha)])
    assert np.allclose(found.mean, 40) and np.allclose(found.covariance, 0)
