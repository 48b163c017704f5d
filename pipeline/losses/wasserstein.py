"""The Gaussian Wasserstein loss of a style layer (algorithm.md, "Gaussian Wasserstein loss").

It compares the features' mean and covariance instead of the Gram matrix: the squared 2-Wasserstein distance of two
normal distributions, divided by the target's total variance, so that it does not depend on a network's scale.

    μ = E φ,  Σ = E φφᵀ − μμᵀ + εI,  R = Σ_s^½,  T = R (R Σ R)^(−½) R
    L = [ ‖μ − μ_s‖² + tr(Σ + Σ_s − 2 (R Σ R)^½) ] / tr Σ_s
    dL/dφ_i = 2/(n·tr Σ_s) · [ (I − T)(φ_i − μ) + (μ − μ_s) ]  =  A φ_i + b

Both moments come from one matrix, the mean Gram of the features with a channel of ones, φ̃ = (φ, 1):

    E φ̃φ̃ᵀ = [ E φφᵀ  μ ]
             [   μᵀ   1 ]

So sums over tiles, masks, means of several styles and the store are those of Gram matrices. Axes in names: C channels,
M = C + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ConfigError

Matrix = NDArray[np.float64]

# ε, in units of the target's mean variance. It bounds the map T where a channel of the canvas does not vary.
_EPSILON = 1e-4
# The same for the estimate of a crop, where the covariance of few positions is uncertain.
_KNOWN = 0.05
# Of a style's energy: a style that varies less, such as a flat colour, is divided by this. Pictures vary by a third.
_LEAST_VARIANCE = 0.01


@dataclass(frozen=True)
class Distance:
    """The loss L, and [A b], (C, M): dL/dφ = A φ + b, times the number of positions n."""

    loss: float
    gradient_CM: Matrix


def distance(moments_MM: Matrix, target_MM: Matrix) -> Distance:
    """L between two mean Grams of φ̃. Raises ConfigError if the target has no features.

    The roots are of float64 matrices, on the CPU.
    """
    mean, second = _split(moments_MM)
    target_mean, target_second = _split(target_MM)
    target_covariance = _covariance(target_mean, target_second)
    variance, channels = _total_variance(target_covariance, float(np.trace(target_second))), len(mean)
    ridge = np.eye(channels) * (_EPSILON * variance / channels)
    total = variance + np.trace(ridge)
    covariance, target_covariance = _covariance(mean, second) + ridge, target_covariance + ridge
    transport_CC, deviations = _transport(covariance, target_covariance, _EPSILON * ridge[0, 0])
    difference = mean - target_mean
    overlap = np.trace(covariance) + np.trace(target_covariance) - 2 * deviations.sum()
    matrix_CC = np.eye(channels) - transport_CC
    gradient_CM = np.column_stack([matrix_CC, difference - matrix_CC @ mean]) * (2 / total)
    return Distance(max(0.0, float((difference @ difference + overlap) / total)), gradient_CM)


def carried(moments_MM: Matrix, whole_MM: Matrix, region_MM: Matrix) -> Matrix:
    """An estimate of a whole image's mean Gram of φ̃ from that of a region, `moments_MM`.

    `whole_MM`, `region_MM`: of both at an earlier time. The map that carries the region's normal distribution from then
    to now is applied to that of the whole. The sum of the whole and the region's change, which serves for Gram
    matrices, is no covariance where the region's changes are larger than the whole's variance.
    """
    (mean, second), (whole_mean, whole_second), (then_mean, then_second) = map(
        _split, (moments_MM, whole_MM, region_MM)
    )
    whole = _covariance(whole_mean, whole_second)
    # A region has few positions at deep layers: where it varies less than this, it says nothing of the whole.
    ridge = np.eye(len(mean)) * (_KNOWN * np.trace(whole) / len(mean))
    now, then = _covariance(mean, second) + ridge, _covariance(then_mean, then_second) + ridge
    transport_CC, _ = _transport(then, now, _EPSILON * ridge[0, 0])
    estimate = transport_CC @ (whole_mean - then_mean) + mean
    estimated_second = transport_CC @ whole @ transport_CC + np.outer(estimate, estimate)
    return np.block([[estimated_second, estimate[:, None]], [estimate[None], np.ones((1, 1))]])


def _transport(covariance: Matrix, target: Matrix, least: float) -> tuple[Matrix, Matrix]:
    """(T, the roots of the eigenvalues of R Σ R), where T Σ T is the target; roots below `least` are raised to it."""
    values, vectors = np.linalg.eigh(target)
    root_CC = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    variances, vectors = np.linalg.eigh(root_CC @ covariance @ root_CC)
    # rounding may leave an eigenvalue of a positive matrix slightly below 0
    deviations = np.sqrt(np.maximum(variances, least**2))
    return root_CC @ (vectors / deviations) @ vectors.T @ root_CC, deviations


def _split(moments_MM: Matrix) -> tuple[Matrix, Matrix]:
    """(μ, E φφᵀ)."""
    return moments_MM[:-1, -1], moments_MM[:-1, :-1]


def _covariance(mean: Matrix, second: Matrix) -> Matrix:
    return second - np.outer(mean, mean)


def _total_variance(covariance: Matrix, energy: float) -> float:
    """What the distance is divided by: tr Σ_s, or a part of the energy where the style is flat or has one position."""
    if not energy > 0:
        raise ConfigError(
            f"loss.kind: wasserstein divides by the variance of the style features, whose energy is {energy:g}: the "
            "style image has no features at one of the layers. Use another image, other layers, or loss.kind: gatys."
        )
    return max(float(np.trace(covariance)), _LEAST_VARIANCE * energy)
