"""The noise of a start from an image: without a trace of chunks, and what it is for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pyvips
import torch

import pipeline
from pipeline.config.config import load_config
from pipeline.core.tiling import Rect
from pipeline.executors.threads import ThreadExecutor
from pipeline.render.noise import uniform_noise
from pipeline.render.preparation import prepare
from pipeline.render.resample import tiles_of
from pipeline.rundir.journal import Journal
from pipeline.rundir.open import newest_canvas
from pipeline.rundir.position import position_of
from pipeline.store import open_array
from tests.support import reference
from tests.support.inputs import write_config, write_image
from tests.support.stages import make_stage, read_whole


def test_noise_depends_on_the_place_alone():
    """A canvas would start otherwise in other chunks, and a resume or a preview would have another picture."""
    whole = Rect(70_000, 70_100, 3, 203)
    noise = uniform_noise(7, whole)
    for part in tiles_of(whole, 37):
        assert np.array_equal(noise[part.within(whole)], uniform_noise(7, part))


def test_noise_is_uniform_and_no_pattern():
    """A pattern would be optimised into the picture; more than half a level would change its colours."""
    noise = uniform_noise(0, Rect(0, 512, 0, 512)).astype(float)
    assert noise.shape == (512, 512, 3) and noise.min() >= -0.5 and noise.max() < 0.5
    counts, _ = np.histogram(noise, 64, (-0.5, 0.5))
    assert ((counts - noise.size / 64) ** 2 / (noise.size / 64)).sum() < 120  # χ² with 63 degrees: 1 in 100,000
    others = [
        noise[1:, :][:, :512], noise[:, 1:], noise[:, :, [1, 2, 0]], uniform_noise(1, Rect(0, 512, 0, 512)),
        uniform_noise(0, Rect(512, 1024, 0, 512)),
    ]  # fmt: skip
    for other in others:
        same = noise[: other.shape[0], : other.shape[1]]
        assert abs(np.corrcoef(same.ravel(), other.ravel())[0, 1]) < 0.006  # five standard deviations
    assert len(np.unique(noise)) > 0.9 * noise.size


def flat_picture() -> np.ndarray:
    """A few flat areas, (H, W, 3)."""
    rows, columns = np.mgrid[:211, :155]
    return ((60 * ((rows // 30 + columns // 40) % 5))[:, :, None] * [1, 0.9, 0.8]).astype(np.uint8)


def flat_run(folder: Path, weights: Path, tile_px: int) -> np.ndarray:
    """Four iterations from a picture of a few flat areas."""
    folder.mkdir()
    picture = pyvips.Image.new_from_array(flat_picture(), interpretation="srgb")
    picture.write_to_file(str(folder / "content.png"))
    write_image(folder / "style.png", 60, 50, seed=2)
    config = load_config(
        write_config(
            folder,
            network={"weights": str(weights), "pooling": "max"},
            compute={"dtype": "float64", "device": "cpu", "tile_px": tile_px},
            optimizer={"max_iterations": 4},
            initial_size=211,
            store={"chunk_px": 48},
            dequantize=True,
        )
    )
    pipeline.run(config)
    return read_whole(newest_canvas(config.work_dir, position_of(Journal(config.work_dir / "journal.jsonl").read()), 0))


def tied(canvas: np.ndarray) -> float:
    """The share of the first pooling's windows whose two largest values differ by no more than rounding."""
    maps_CHW = reference.features(reference.narrow_state(), torch.from_numpy(canvas), "replicate", "max")["conv1_2"]
    largest = maps_CHW.unfold(1, 2, 2).unfold(2, 2, 2).flatten(-2).topk(2).values
    return float(((largest[..., 0] > 0) & (largest[..., 0] - largest[..., 1] < 1e-9)).double().mean())


def test_without_ties_one_tile_and_many_give_the_same_picture(tmp_path, narrow_weights):
    """With max pooling, a flat sky would be painted otherwise on a machine with less memory."""
    many, one = (flat_run(tmp_path / f"{px}", narrow_weights, px) for px in (96, 240))
    assert np.abs(many - one).max() < 1e-6
    flat = flat_picture().astype(np.float64)
    noisy = np.clip(flat + uniform_noise(0, Rect(0, 211, 0, 155)), 0, 255)
    # what the noise is for; which value of a tie the tiles take depends on the processor's kernels
    assert tied(noisy) == 0 and tied(flat) > 0.5


@pytest.mark.parametrize(
    ("init", "init_noise", "levels"),
    [("content", 0, 0.5), ("content.png", 0, 0.5), ("content", 40, 40), ("content.png", 40, 0.5)],
)
def test_the_start_is_the_image_and_its_noise(make_config, init, init_noise, levels):
    """The noise must not be missing where it is needed, nor leave 0..255, nor change a start of one's own."""
    config = make_config(
        init=init, init_noise=init_noise, dequantize=True, seed=3, initial_size=64, store={"chunk_px": 32}
    )
    with ThreadExecutor(2) as executor:
        stage = make_stage(config, pipeline.plan(config), executor)
        prepare(stage, None)
    start, content = (read_whole(open_array(stage.stage_dir, name)) for name in ("canvas_0", "content"))
    assert np.array_equal(start, np.clip(content + 2 * levels * uniform_noise(3, Rect(0, 48, 0, 64)), 0, 255))
