"""The losses of a training against their formulas, differentiated by autograd."""

from __future__ import annotations

import pytest
import torch

from pipeline.core.tiling import Rect
from pipeline.feedforward.objective import LossWeights, TrainingObjective
from pipeline.network.vgg import Network
from tests.support.reference import narrow_state

CONTENT, STYLE = {"conv2_2": 1.0}, {"conv1_2": 0.6, "conv2_1": 0.4}


@pytest.fixture(scope="module")
def network():
    state = {key: value.double() for key, value in narrow_state().items()}
    return Network(state, padding="reflect", pooling="average", dtype=torch.float64, device="cpu")


def features(network, pixels):
    whole = Rect(0, pixels.shape[2], 0, pixels.shape[3])
    found = network.features(pixels, whole, tuple(pixels.shape[2:]), {*CONTENT, *STYLE}, whole)
    return {feature_map.layer.name: feature_map.features_1CHW for feature_map in found}


def style_distance(kind, features_CHW, target_CHW):
    """The style loss of one layer by its formula."""
    flat, target = features_CHW.flatten(1), target_CHW.flatten(1)
    gram, target_gram = flat @ flat.T / flat.shape[1], target @ target.T / target.shape[1]
    squares = (gram - target_gram).square().sum()
    if kind == "gatys":
        return squares / (4 * len(gram) ** 2)
    if kind == "normalized":
        return squares / target_gram.square().sum()
    mean, target_mean = flat.mean(1), target.mean(1)
    covariance, target_covariance = gram - torch.outer(mean, mean), target_gram - torch.outer(target_mean, target_mean)
    ridge = torch.eye(len(gram)) * (1e-4 * target_covariance.trace() / len(gram))
    covariance, target_covariance = covariance + ridge, target_covariance + ridge
    values, vectors = torch.linalg.eigh(target_covariance)
    root = vectors * values.sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ covariance @ root).sqrt().sum()
    trace = target_covariance.trace()
    return ((mean - target_mean).square().sum() + covariance.trace() + trace - 2 * overlap) / trace


def expected(network, kind, output, target, styles, weights, pictures):
    """J of LossWeights, as a function that autograd differentiates."""
    ours, theirs = features(network, output), features(network, target)
    targets = [features(network, picture) for picture in pictures]
    total = torch.zeros((), dtype=torch.float64)
    for index, style in enumerate(styles):
        for name, weight in CONTENT.items():
            squares = (ours[name][index] - theirs[name][index]).square()
            scale = squares.mean() / 2 if kind == "gatys" else squares.sum() / theirs[name][index].square().sum()
            total = total + weights.content * weight * scale
        for name, weight in STYLE.items():
            distance = style_distance(kind, ours[name][index], targets[style][name][0])
            total = total + weights.style * weight * distance
        x = output[index] / 255
        variation = x.diff(dim=1).square().sum() + x.diff(dim=2).square().sum()
        total = total + weights.variation * variation / x.numel()
    return total / len(output) + weights.pixels * ((output - target) / 255).square().mean()


@pytest.mark.parametrize("kind", ["wasserstein", "normalized", "gatys"])
def test_losses_and_gradient_are_those_of_the_formulas(network, kind):
    """Two styles in one batch: each picture is compared with its own."""
    generator = torch.Generator().manual_seed(3)
    output, target = (torch.rand(3, 3, 32, 48, generator=generator, dtype=torch.float64) * 255 for _ in range(2))
    pictures = [torch.rand(1, 3, 40, 36, generator=generator, dtype=torch.float64) * 255 for _ in range(2)]
    weights, styles = LossWeights(kind, 0.7, 1.3, 0.4, CONTENT, STYLE, 3.0), [0, 1, 1]
    losses, gradient = TrainingObjective(network, weights, [[picture] for picture in pictures]).evaluate(
        output, target, styles
    )
    variable = output.clone().requires_grad_()
    value = expected(network, kind, variable, target, styles, weights, pictures)
    (reference,) = torch.autograd.grad(value, variable)
    assert losses.objective == pytest.approx(float(value.detach()), rel=1e-10)
    torch.testing.assert_close(gradient, reference, rtol=1e-7, atol=1e-9 * float(reference.abs().max()))


def test_pixels_are_compared_without_a_network(network):
    """The loss of super-resolution beside the feature loss: the mean square in units of the whole range."""
    output = torch.full((2, 3, 16, 16), 100.0, requires_grad=True)
    target = torch.full((2, 3, 16, 16), 151.0)
    losses, gradient = TrainingObjective(network, LossWeights("normalized", 2.0, 0.0, 0.0, {}, {})).evaluate(
        output.detach(), target
    )
    value = 2 * ((output - target) / 255).square().mean()
    value.backward()
    assert losses.objective == pytest.approx(2 * 0.2**2) == pytest.approx(float(value.detach()))
    torch.testing.assert_close(gradient, output.grad)
