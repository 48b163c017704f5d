"""The Gaussian Wasserstein loss, against a reference by Cholesky factors and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.losses.objective import StyleTarget, gram_sum, style_seed
from pipeline.losses.wasserstein import carried, distance
from tests.support import reference


def features(channels: int, height: int, width: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Correlated features with means, (C, H, W) float64."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    noise = torch.randn(channels, height * width, generator=generator, dtype=torch.float64)
    return scale * torch.relu(mixed @ noise + mixed[:, :1]).reshape(channels, height, width)


def moments(phi: torch.Tensor) -> np.ndarray:
    return gram_sum(phi, with_mean=True) / phi[0].numel()


def wanted(phi: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    ones = [torch.ones_like(features[0]) for features in (phi, target)]
    return reference.wasserstein(*reference.moments(phi, ones[0]), *reference.moments(target, ones[1]))


@pytest.mark.parametrize("shape", [(6, 9), (2, 3)], ids=["more positions than channels", "fewer"])
def test_loss_and_seed_are_the_formula_and_its_derivative(shape):
    """A wrong constant, or a transposed map, would give another picture than the formula."""
    phi, target = features(8, *shape, 1).requires_grad_(), features(8, 11, 7, 2)
    weight, factor = 0.3, 1234.0
    loss = weight * wanted(phi, target)
    (expected,) = torch.autograd.grad(factor * loss, phi)
    sums = gram_sum(phi.detach(), with_mean=True)
    term = StyleTarget("wasserstein", moments(target), phi[0].numel(), weight, factor).term(sums)
    assert term.loss == pytest.approx(loss.item(), rel=1e-11)
    seed = style_seed(phi.detach()[None], term.seed_CM)[0]
    assert (seed - expected).abs().max() < 1e-9 * expected.abs().max()


def test_one_step_lands_on_the_statistics():
    """What the loss is chosen for: the step n·tr Σ_s/2 along its gradient carries the canvas to the style's moments."""
    phi, target = features(5, 40, 40, 1), features(5, 30, 50, 2)
    goal = moments(target)
    total = np.trace(goal[:-1, :-1] - np.outer(goal[:-1, -1], goal[:-1, -1]))
    before = distance(moments(phi), goal)
    moved = phi - style_seed(phi[None], before.gradient_CM)[0] * float(total / 2)
    assert before.loss > 0.1
    assert distance(moments(moved), goal).loss < 1e-4 * before.loss


def test_the_loss_does_not_depend_on_the_scale_of_a_network():
    """One set of weights serves every network only if a network whose features are larger has the same loss."""
    losses = [distance(moments(features(5, 9, 9, 1, s)), moments(features(5, 9, 9, 2, s))).loss for s in (1.0, 1e3)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_the_target_itself_has_no_loss():
    """A canvas that has the style's statistics must not change."""
    goal = moments(features(5, 9, 9, 1))
    found = distance(goal, goal)
    assert found.loss < 1e-12 and np.abs(found.gradient_CM).max() < 1e-10


def test_a_channel_that_never_fires_gives_numbers():
    """Compressed networks have such channels; a covariance without full rank has no inverse root."""
    phi, target = features(5, 9, 9, 1), features(5, 9, 9, 2)
    phi[2], target[3] = 0.0, 0.0
    found = distance(moments(phi), moments(target))
    assert np.isfinite(found.loss) and np.isfinite(found.gradient_CM).all()


def test_sums_with_weights_are_the_moments_of_the_weighted_positions():
    """Masks weigh positions; a mean over all of them would mix the regions' colours."""
    phi, share = features(4, 6, 7, 1), torch.rand(6, 7, dtype=torch.float64)
    sums = gram_sum(phi, share, with_mean=True)
    mean, second = reference.moments(phi, share)
    assert sums[-1, -1] == pytest.approx(share.sum().item(), rel=1e-13)
    assert np.allclose(sums[:-1, -1] / sums[-1, -1], mean, rtol=1e-12)
    assert np.allclose(sums[:-1, :-1] / sums[-1, -1], second, rtol=1e-12)


def test_a_style_of_one_flat_colour_gives_numbers():
    """Artists fill an area with a colour: its variance is 0, and dividing by it would amplify rounding to a picture."""
    flat = torch.full((3, 8, 8), 5.0, dtype=torch.float64)
    found = distance(moments(features(3, 8, 8, 1)), moments(flat))
    assert 0.1 < found.loss < 1e4 and np.isfinite(found.gradient_CM).all()
    with pytest.raises(ConfigError, match=r"no features.*loss\.kind: gatys"):
        distance(moments(features(3, 8, 8, 1)), moments(0 * flat))


def test_the_estimate_of_a_whole_follows_its_region():
    """A crop knows the whole at an earlier time: brighter and stronger in the region means so in the whole."""
    whole, region = features(5, 60, 60, 1), features(5, 60, 60, 2)
    assert np.allclose(carried(moments(region), moments(whole), moments(region)), moments(whole), rtol=1e-9)
    changed, wanted = (1.3 * phi + 0.7 for phi in (region, whole))
    found = carried(moments(changed), moments(whole), moments(region))
    before = np.abs(moments(whole) - moments(wanted)).max()
    assert np.abs(found - moments(wanted)).max() < 0.25 * before
    assert np.allclose(found[:-1, -1], moments(wanted)[:-1, -1], rtol=0.05)


def test_the_estimate_is_a_covariance_where_the_sum_is_none():
    """A region of few positions: G_whole + (G_now − G_then) has negative variances, whose roots ruined crops."""
    whole, then, now = features(8, 40, 40, 1), features(8, 2, 3, 2, 3.0), features(8, 2, 3, 3, 0.2)
    added = moments(whole) + moments(now) - moments(then)
    found = carried(moments(now), moments(whole), moments(then))

    def least_variance(gram: np.ndarray) -> float:
        return float(np.linalg.eigvalsh(gram[:-1, :-1] - np.outer(gram[:-1, -1], gram[:-1, -1])).min())

    assert least_variance(added) < 0 <= least_variance(found) + 1e-9
