"""Total variation: exact over tiles, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.core.tiling import grid
from pipeline.losses.total_variation import variation
from tests.support.inputs import write_image
from tests.support.stages import EXACT, assert_exact, final_canvas, prepared, relative


@pytest.mark.parametrize("kind", ["squared", "absolute"])
@pytest.mark.parametrize(("size", "tile_px"), [((64, 96), 96), ((65, 113), 48), ((33, 300), 96)])
def test_total_variation_is_exact_for_any_partition(tmp_path, narrow_weights, size, tile_px, kind):
    """A pair of pixels that no tile counts, or two do, draws the tiles' borders into the picture."""
    with prepared(tmp_path, narrow_weights, size, tile_px, loss={"tv_weight": 0.7, "tv_kind": kind}) as case:
        assert_exact(case)
        result = case.iterate()
        wanted = float(case.problem.variation(torch.from_numpy(case.canvas)))
        assert result.layer_losses["variation"] == pytest.approx(wanted, rel=EXACT)


@pytest.mark.parametrize("kind", ["squared", "absolute"])
def test_total_variation_alone_is_its_derivative_at_every_pixel(kind):
    """Beside the other losses, a wrong factor could hide in the rounding."""
    pixels = torch.rand(1, 3, 37, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 255
    leaf = pixels.clone().requires_grad_()
    down, right = leaf.diff(dim=2) / 255, leaf.diff(dim=3) / 255
    total = down.square().sum() + right.square().sum()
    if kind == "absolute":
        squares = F.pad(down, (0, 0, 0, 1)).square().sum(1) + F.pad(right, (0, 1)).square().sum(1)
        total = 3 * ((squares + (2 / 255) ** 2).sqrt() - 2 / 255).sum()
    (wanted,) = torch.autograd.grad(total / 3, leaf)
    found, sums = torch.zeros_like(pixels[0]), 0.0
    for tile in grid(37, 50, 16):
        outer = tile.outer(5)
        part, gradient_CHW = variation(
            pixels[:, :, outer.y0 : outer.y1, outer.x0 : outer.x1], outer.y0, outer.x0, tile, kind
        )
        rows, columns = tile.inner.within(tile.outer(0)._replace(y0=0, x0=0))
        found[:, rows, columns] = gradient_CHW
        sums += part
    assert sums == pytest.approx(total.item(), rel=1e-12)
    assert relative(found, wanted[0]) < 1e-14


def test_a_weight_smooths_the_picture(tmp_path, narrow_weights):
    """The sign of the gradient: a user who asks for less grain must not get more."""
    rough = {}
    for weight in (0.0, 300.0):
        canvas, records = final_canvas(tmp_path / str(weight), narrow_weights, 144, loss={"tv_weight": weight})
        rough[weight] = np.abs(np.diff(canvas, axis=0)).mean()
        told = [record["layer_losses"] for record in records if record["type"] == "iteration"]
        assert all(("variation" in losses) == (weight > 0) for losses in told)
    assert rough[300.0] < 0.9 * rough[0.0]


def test_a_picture_in_its_own_style_is_still_smoothed(make_config):
    """Nothing but rounding is left of content and style there; the weight asks for more than that."""
    import pipeline

    config = make_config(
        (32, 48), styles=[{"image": "content.png"}], loss={"tv_weight": 1.0}, optimizer={"max_iterations": 2}
    )
    write_image(config.content, 32, 48)
    pipeline.run(config)
    assert pipeline.status(config.work_dir)["iteration"] == 2
