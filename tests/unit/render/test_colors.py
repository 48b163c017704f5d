"""Whose colours the picture has: exact over tiles, for the whole run, and as the formulas say."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

import pipeline
from pipeline.core.events import IterationDone
from pipeline.losses import color as colors
from pipeline.losses.color import ColorStatistics
from pipeline.render import color_tasks
from pipeline.rundir.journal import Journal
from pipeline.rundir.open import newest_canvas
from pipeline.rundir.position import position_of
from pipeline.store.array import open_array
from tests.support import reference
from tests.support.configs import problems
from tests.support.inputs import write_config, write_image
from tests.support.stages import assert_exact, final_canvas, prepared, read_whole, relative


def statistics_of(pixels: np.ndarray) -> ColorStatistics:
    flat = pixels.reshape(-1, 3)
    return ColorStatistics(flat.mean(0), np.cov(flat, rowvar=False, ddof=0))


def mapped(color: colors.ColorMap, pixels: np.ndarray) -> np.ndarray:
    return pixels @ np.array(color.matrix).T + np.array(color.bias)


def chroma(pixels: np.ndarray) -> np.ndarray:
    return pixels - reference.luminance(torch.from_numpy(pixels)).numpy()


def picture(seed: int, low: float, high: float) -> np.ndarray:
    """Pixels whose channels depend on each other."""
    rng = np.random.default_rng(seed)
    return low + (high - low) * rng.uniform(0, 1, (20, 30, 3)) @ rng.dirichlet([1, 1, 1], 3).T


@pytest.mark.parametrize(("size", "tile_px"), [((64, 96), 96), ((65, 113), 48)])
@pytest.mark.parametrize("color", ["content", "luminance"])
@pytest.mark.parametrize("tv_weight", [0.0, 20.0])
def test_colors_are_exact_for_any_partition(tmp_path, narrow_weights, color, tv_weight, size, tile_px):
    """Statistics of a tile instead of the picture would paint each tile in colours of its own."""
    sizes, loss = ((50, 67), (40, 33)), {"tv_weight": tv_weight}
    values = {"style_sizes": sizes, "style_weights": (2.0, 1.0), "loss": loss, "color": color}
    with prepared(tmp_path, narrow_weights, size, tile_px, **values) as case:
        assert_exact(case)
        if color == "luminance":
            inside = (case.canvas > 0).all(-1) & (case.canvas < 255).all(-1)
            assert np.abs(chroma(case.canvas) - chroma(case.problem.content))[inside].max() < 1e-9
            assert inside.mean() > 0.3


@pytest.mark.e2e
@pytest.mark.parametrize("color", ["content", "luminance"])
def test_a_whole_run_gives_the_same_picture_with_one_tile_and_with_many(tmp_path, narrow_weights, color):
    """The statistics of every stage, and its start, must not depend on how much memory the machine had."""
    whole, _ = final_canvas(tmp_path / "one", narrow_weights, 144, color=color)
    parts, _ = final_canvas(tmp_path / "many", narrow_weights, 48, color=color)
    assert np.abs(whole - parts).max() <= 1e-6
    assert np.ptp(whole) > 50


def test_matched_colors_have_the_contents_mean_and_covariance():
    """The formula itself: another root of the covariance turns colours about."""
    style, content = picture(1, 20, 180), picture(2, 90, 230)
    found = statistics_of(mapped(colors.matched_colors(statistics_of(style), statistics_of(content)), style))
    wanted = statistics_of(content)
    assert relative(found.mean, wanted.mean) < 1e-12
    assert relative(found.covariance, wanted.covariance) < 1e-10
    same = colors.matched_colors(statistics_of(style), statistics_of(style))
    assert np.allclose(mapped(same, style), style, atol=1e-9)


def test_matched_luminance_has_the_contents_mean_and_deviation():
    """A dark style would make a bright picture dark."""
    style, content = picture(1, 20, 180), picture(2, 90, 230)
    found = mapped(colors.matched_luminance(statistics_of(style), statistics_of(content)), style)
    of_content = colors.luminance(content)
    assert np.ptp(found, axis=-1).max() < 1e-9
    assert found.mean() == pytest.approx(of_content.mean()) and found[..., 0].std() == pytest.approx(of_content.std())


@pytest.mark.parametrize("make", [colors.matched_colors, colors.matched_luminance], ids=["content", "luminance"])
@pytest.mark.parametrize("style", ["grey", "one colour", "nearly grey"])
def test_a_style_that_lacks_colors_gives_numbers_and_no_noise(make, style):
    """Of a drawing in ink the covariance has no inverse: NaN, or the rounding of a JPEG blown up into spots."""
    rng = np.random.default_rng(0)
    pixels = np.repeat(rng.integers(0, 256, (20, 30, 1)), 3, -1).astype(np.float64)
    if style == "one colour":
        pixels = np.full((20, 30, 3), 77.0)
    if style == "nearly grey":
        pixels += rng.integers(0, 2, pixels.shape)
    content = picture(2, 0, 255)
    color = make(statistics_of(pixels), statistics_of(content))
    assert np.isfinite(color.matrix).all() and np.isfinite(color.bias).all()
    grey = np.repeat(pixels.mean(-1, keepdims=True), 3, -1)
    spots = mapped(color, pixels) - mapped(color, grey)
    assert np.abs(spots).max() <= np.sqrt(np.linalg.eigvalsh(statistics_of(content).covariance).max())


def test_statistics_are_whole_numbers_until_they_are_divided(tmp_path, narrow_weights):
    """The same bits for every size of chunk: a run that goes on elsewhere, and a repair, find the same targets."""
    found = []
    for chunk_px in (16, 48):
        (folder := tmp_path / str(chunk_px)).mkdir()
        with prepared(folder, narrow_weights, (64, 96), 48, chunk_px=chunk_px) as case:
            array = open_array(case.stage.stage_dir, "content", case.started.checksums["content"])
            found.append(color_tasks.statistics(array, case.stage.executor))
            wanted = statistics_of(case.problem.content)
    assert np.array_equal(found[0].mean, found[1].mean) and np.array_equal(found[0].covariance, found[1].covariance)
    assert relative(found[0].mean, wanted.mean) < 1e-13 and relative(found[0].covariance, wanted.covariance) < 1e-10


def last_canvas(config) -> np.ndarray:
    position = position_of(Journal(config.work_dir / "journal.jsonl").read())
    return read_whole(newest_canvas(config.work_dir, position, position.stage))


class Killed(Exception):  # noqa: N818 - what happens, not an error
    """The process has ended, as far as the run is concerned."""


def after_one_iteration(event: object) -> None:
    if isinstance(event, IterationDone):
        raise Killed


@pytest.mark.parametrize("color", ["content", "luminance"])
def test_damaged_targets_are_made_again_as_they_were(make_config, color):
    """They depend on the content's colours: a stage that starts again must find the same."""
    config = make_config((48, 64), color=color, optimizer={"max_iterations": 3}, compute={"device": "cpu"})
    with pytest.raises(Killed):
        pipeline.run(config, sink=after_one_iteration)
    untouched = config.model_copy(update={"work_dir": config.work_dir.with_name("untouched")})
    shutil.copytree(config.work_dir, untouched.work_dir)
    for name in ("gram_conv2_1", "gram_conv5_1"):
        path = config.work_dir / "store.zarr" / "stage_0" / name / "c" / "0" / "0"
        path.write_bytes(bytes(reversed(path.read_bytes())))
    report = pipeline.verify(config.work_dir, repair=True)
    assert len(report.found) == 2 and report.clean and report.iterations_lost == 1
    pipeline.run(config)
    pipeline.run(untouched, force=True)
    assert np.array_equal(last_canvas(config), last_canvas(untouched))


def test_luminance_keeps_the_contents_colors_to_the_end(make_config):
    """That is what it is for: a red roof must stay red, however it is painted."""
    config = make_config((64, 96), color="luminance", initial_size=48, optimizer={"max_iterations": 5})
    content = write_image(config.content, 64, 96, seed=1).astype(np.float64)
    pipeline.run(config)
    moved = last_canvas(config) - content
    assert np.abs(moved).mean() > 2  # it was painted
    assert np.ptp(moved, axis=-1).mean() < 0.2 * np.abs(moved).mean()


def test_the_contents_colors_need_a_content(tmp_path):
    """A texture has none; a default in its place would be a picture that nobody asked for."""
    path = write_config(
        tmp_path, content=None, size=[64, 48], loss={"content_weight": 0.0}, init="noise", color="luminance"
    )
    (line,) = problems(path)
    assert "color" in line and "there is no content" in line
