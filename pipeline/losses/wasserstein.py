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


@dataclass(frozen=True)
class Distance:
    """The loss L, and [A b], (C, M): dL/dφ = A φ + b, times the number of positions n."""

    loss: float
    gradient_CM: Matrix


def distance(moments_MM: Matrix, target_MM: Matrix) -> Distance:
    """L between two mean Grams of φ̃. Raises ConfigError if the target's features do not vary.

    The roots are of float64 matrices, on the CPU.
    """
    mean, second = _split(moments_MM)
    target_mean, target_second = _split(target_MM)
    target_covariance = target_second - np.outer(target_mean, target_mean)
    variance, channels = float(np.trace(target_covariance)), len(mean)
    _require_variance(variance, float(np.trace(target_second)))
    ridge = np.eye(channels) * (_EPSILON * variance / channels)
    covariance, target_covariance = second - np.outer(mean, mean) + ridge, target_covariance + ridge
    root_CC = _power(target_covariance, 0.5)
    between_CC = root_CC @ covariance @ root_CC  # its trace of roots is the overlap of the two distributions
    variances, vectors = np.linalg.eigh(between_CC)
    # rounding may leave an eigenvalue of a positive matrix slightly below 0
    deviations = np.sqrt(np.maximum(variances, (_EPSILON * ridge[0, 0]) ** 2))
    transport_CC = root_CC @ (vectors / deviations) @ vectors.T @ root_CC
    difference = mean - target_mean
    overlap = np.trace(covariance) + np.trace(target_covariance) - 2 * deviations.sum()
    total = np.trace(target_covariance)
    matrix_CC = np.eye(channels) - transport_CC
    gradient_CM = np.column_stack([matrix_CC, difference - matrix_CC @ mean]) * (2 / total)
    return Distance(max(0.0, float((difference @ difference + overlap) / total)), gradient_CM)


def _split(moments_MM: Matrix) -> tuple[Matrix, Matrix]:
    """(μ, E φφᵀ)."""
    return moments_MM[:-1, -1], moments_MM[:-1, :-1]


def _power(matrix_CC: Matrix, exponent: float) -> Matrix:
    """A symmetric positive matrix to a power."""
    values, vectors = np.linalg.eigh(matrix_CC)
    power_CC: Matrix = (vectors * np.maximum(values, 0.0) ** exponent) @ vectors.T
    return power_CC


def _require_variance(variance: float, energy: float) -> None:
    # below the rounding of float32 sums of the second moment, a variance is noise
    if not variance > 1e-6 * energy:
        raise ConfigError(
            f"loss.kind: wasserstein divides by the variance of the style features, which is {variance:.3g} at one of "
            "the layers: the style image is a flat colour there. Use another image, or loss.kind: normalized."
        )
