"""tools/paper/partition.py and tools/paper/figures.py on tiny images: they run, and their measures detect errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.support.inputs import write_image
from tools.paper import figures as paper_figures
from tools.paper import gatys as paper_gatys
from tools.paper import measures as paper_measures
from tools.paper import partition as paper_partition


@pytest.fixture
def inputs(tmp_path, narrow_weights) -> list[str]:
    write_image(tmp_path / "content.png", 128, 128, seed=1)
    write_image(tmp_path / "style.png", 64, 64, seed=2)
    names = {"content": "content.png", "style": "style.png", "weights": narrow_weights}
    return [word for name, file in names.items() for word in (f"--{name}", str(tmp_path / file))]


def run_tool(command, *arguments) -> None:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_partitions_have_the_same_gradient_and_diverge_by_rounding_only(tmp_path, inputs):
    """The tool would blame the partition into tiles for what other code does."""
    figures = tmp_path / "figures.json"
    run_tool(
        paper_partition.main, *inputs, "--scale", 0.125, "--iterations", 2, "--dtype", "float64", "--json", figures
    )
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["iteration"], row["tiles"]) for row in rows] == [(1, 4), (1, 6), (2, 4), (2, 6)]
    assert all(row["same_canvas_max"] < 1e-12 for row in rows)
    assert [row["canvas_max"] == 0 for row in rows] == [
        True,
        True,
        False,
        False,
    ]  # the canvases differ from the second iteration on


def figure(tmp_path, inputs, *command) -> list[dict]:
    """Make one figure; returns its table."""
    folder = tmp_path / "runs"
    options = ["--folder", folder, "--pictures", folder, "--size", 128, "--iterations", 2]
    run_tool(paper_figures.main, *inputs, *options, *command)
    assert (folder / f"paper_{command[0]}.jpg").stat().st_size > 0
    return json.loads((folder / f"{command[0]}.json").read_text())


def test_tiles_without_halo_differ_and_tiles_with_halo_equal_the_whole_image(tmp_path, inputs):
    """Fig. 9 would show seams that the program does not make, or hide those of the wrong variants."""
    rows = figure(tmp_path, inputs, "fig9", "--tile", 64)
    assert len({row["Ls"] for row in rows}) == 4

    experiment = paper_figures.Experiment(
        tmp_path / "content.png", tmp_path / "style.png", Path(inputs[-1]), tmp_path / "runs", tmp_path, 128, 2, 80
    )
    tiles = {"compute": {"tile_px": 64, "device": "cpu"}, "store": {"chunk_px": 64}}
    whole = experiment.render("whole", initial_size=64, **tiles)
    correct, wrong = (
        paper_measures.read(tmp_path / "runs" / f"fig9_{name}.png") for name in ("as_it_should_be", "no_halo")
    )
    np.testing.assert_array_equal(correct, paper_measures.read(whole))
    assert np.abs(wrong - correct).max() > 1


@pytest.mark.parametrize("name", ["fig4", "fig7", "fig8", "ratio", "texture", "reconstruction"])
def test_figures_are_made(tmp_path, inputs, name):
    """A figure of the paper could not be reproduced, or its table would hold NaN."""
    rows = figure(tmp_path, inputs, name)
    assert all(np.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))


def test_a_seam_is_measured_and_a_regular_lattice_is_not():
    """Texture with a period of its own would count as seams of the tiles."""
    image = np.random.default_rng(0).uniform(0, 255, (192, 192, 3))
    image[:, ::16] += 60  # a lattice everywhere
    assert abs(paper_measures.seams(image, 64).deviations) < 3
    image[:, 64::64] += 400
    assert paper_measures.seams(image, 64).deviations > 3


def test_normalised_filters_have_a_mean_of_one_and_features_are_only_scaled(tmp_path, inputs):
    """Gatys' figures need normalised weights: another network would be compared with the paper."""
    experiment = paper_figures.Experiment(
        tmp_path / "content.png", tmp_path / "style.png", Path(inputs[-1]), tmp_path, tmp_path, 128, 2, 80
    )
    spec, images = experiment.spec("average"), [tmp_path / "content.png"]
    target = paper_gatys.write_normalised(spec, images, 128, tmp_path / "normalised.safetensors")
    scaled = paper_figures.Experiment(
        tmp_path / "content.png", tmp_path / "style.png", target, tmp_path, tmp_path, 128, 2, 80
    ).spec("average")
    image = paper_measures.read(images[0])
    before, after = (paper_measures.features(network, image) for network in (spec, scaled))
    for layer, features in after.items():
        means = before[layer].mean((1, 2))
        torch.testing.assert_close(features.mean((1, 2)), (means > 0).float(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(features * means[:, None, None], before[layer], rtol=1e-3, atol=1e-3)
