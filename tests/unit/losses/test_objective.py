"""The objective's pure functions: losses, and seeds that are their derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.losses.objective import (
    ROUNDING,
    StyleTarget,
    content_scale,
    gram_sum,
    mean_gram,
    objective,
    relative_error,
)

KINDS = ["normalized", "gatys"]


def features(channels: int, height: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.relu(torch.randn(channels, height, width, generator=generator, dtype=torch.float64))


def mean(features_CHW: torch.Tensor) -> torch.Tensor:
    features_Cn = features_CHW.flatten(1)
    return features_Cn @ features_Cn.T / features_Cn.shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_style_loss_and_seed_are_the_formula_and_its_derivative(kind):
    """A wrong constant would change the balance of style and content that the config sets."""
    phi, target = features(5, 6, 7, 1).requires_grad_(), mean(features(5, 9, 4, 2))
    weight, factor = 0.3, 1234.0
    squares = (mean(phi) - target).square().sum()
    loss = weight * squares / (target.square().sum() if kind == "normalized" else 4 * 5**2)
    (expected,) = torch.autograd.grad(factor * loss, phi)
    term = StyleTarget(kind, target.numpy(), 6 * 7, weight, factor).term(gram_sum(phi.detach()))
    assert term.loss == pytest.approx(loss.item(), rel=1e-13)
    seed = torch.from_numpy(term.seed_CM) @ phi.detach().flatten(1)
    assert (seed.reshape(expected.shape) - expected).abs().max() < 1e-13 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_content_scale_gives_the_formula_and_its_derivative(kind):
    """A wrong constant would change the balance of style and content that the config sets."""
    phi, target = features(5, 6, 7, 1).requires_grad_(), features(5, 6, 7, 2)
    weight, factor = 0.3, 1234.0
    squares, energy = (phi - target).square().sum(), target.square().sum()
    loss = weight * squares / energy if kind == "normalized" else weight * squares / 2 / (5 * 6 * 7)
    (expected,) = torch.autograd.grad(factor * loss, phi)
    scale = content_scale(kind, float(energy), 5, 6 * 7, weight)
    assert scale * squares.item() == pytest.approx(loss.item(), rel=1e-13)
    seed = factor * 2 * scale * (phi - target).detach()
    assert (seed - expected).abs().max() < 1e-13 * expected.abs().max()


def test_gram_sum_is_the_sum_of_outer_products():
    """The statistics of the style (eq. 14), as sums, so that tiles add up."""
    phi = features(3, 4, 5, 1)
    expected = sum(np.outer(phi[:, y, x], phi[:, y, x]) for y in range(4) for x in range(5))
    assert np.allclose(gram_sum(phi), expected, rtol=1e-13, atol=0)
    parts = gram_sum(phi[:, :1]) + gram_sum(phi[:, 1:, :2]) + gram_sum(phi[:, 1:, 2:])
    assert np.allclose(parts, expected, rtol=1e-13, atol=0)
    assert gram_sum(phi).dtype == np.float64


def test_gram_sum_of_bfloat16_is_accumulated_in_float32():
    """65,536 positions summed in 8 bits of mantissa would stop growing at 256: the style would be lost."""
    phi = torch.ones(2, 256, 256, dtype=torch.bfloat16)
    assert np.array_equal(gram_sum(phi), np.full((2, 2), 65536.0))


def test_style_weights_are_shares_of_their_sum():
    """Weights 3 and 1 must mean 75 and 25 per cent, and so must 30 and 10."""
    first, second = np.full((2, 2), 4.0), np.full((2, 2), 8.0)
    assert np.array_equal(mean_gram([first, second], [3, 1]), np.full((2, 2), 5.0))
    assert np.array_equal(mean_gram([first, second], [30, 10]), np.full((2, 2), 5.0))
    assert np.array_equal(mean_gram([first, second], [0, 1]), second)
    assert np.array_equal(mean_gram([first], [0.1]), first)


@pytest.mark.parametrize("energy", [0.0, float("nan")])
def test_targets_without_energy_are_refused(energy):
    """Dividing by it gives NaN, and after a day a black image."""
    with pytest.raises(ConfigError, match=r"loss\.kind.*content.*gatys"):
        content_scale("normalized", energy, 4, 10, 1.0)
    with pytest.raises(ConfigError, match=r"loss\.kind.*style.*gatys"):
        StyleTarget("normalized", np.full((2, 2), energy), 10, 1.0, 1.0).term(np.full((2, 2), 10.0))


def test_gatys_losses_need_no_energy():
    """The remedy that the error message names must work."""
    assert content_scale("gatys", 0.0, 4, 10, 1.0) == 0.5 / 40
    assert StyleTarget("gatys", np.zeros((2, 2)), 10, 1.0, 1.0).term(np.full((2, 2), 10.0)).loss == 4 / 16


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_itself_has_no_loss_and_no_seed(kind):
    """A canvas that equals its target must not change."""
    target = mean(features(5, 8, 4, 2)).numpy()
    term = StyleTarget(kind, target, 32, 1.0, 1e9).term(32 * target)  # a power of two, which loses nothing
    assert term.loss == term.relative_error == 0
    assert not term.seed_CM.any()


def test_relative_errors_are_those_of_norms_and_need_no_energy():
    """They separate rounding from a difference, whatever the family of losses and its weights."""
    term = StyleTarget("gatys", np.ones((2, 2)), 10, 1e-9, 1e-9).term(np.full((2, 2), 11.0))
    assert term.relative_error == pytest.approx(0.1)
    assert relative_error(0.04, 4.0) == pytest.approx(0.1)
    assert relative_error(0.0, 0.0) == 0
    assert relative_error(1e-300, 0.0) == np.inf


def test_rounding_is_separated_from_differences_for_every_dtype():
    """The bound is above the last place of the dtype, and below a change of one level."""
    units = {"float64": 2**-52, "float32": 2**-23, "tf32": 2**-10, "bfloat16": 2**-8}
    assert ROUNDING.keys() == units.keys()
    for dtype, unit in units.items():
        assert unit <= ROUNDING[dtype] * 1.03 and ROUNDING[dtype] <= 50 * unit


def test_objective_grows_with_the_pixels():
    """N makes a step mean the same at 256 and at 30,000 px."""
    assert objective(10, (0.05, 2.0), (1.0, 3.0)) == pytest.approx(31.0)
    assert objective(20, (0.05, 2.0), (1.0, 3.0)) == pytest.approx(62.0)
