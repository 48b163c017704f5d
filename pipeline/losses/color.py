"""Colour preservation: colour transforms of pixels before the network, and the statistics they are computed from.

After Gatys et al., "Preserving color in neural artistic style transfer" and "Controlling perceptual factors". Every
transform is affine and per pixel, and its numbers are of whole images, so tiles stay exact. Colours are RGB, 0..255.

    color: style      no transform
    color: content    the style's pixels are given the content's mean and covariance
    color: luminance  the network receives luminance only, the style's with the content's mean and deviation; the canvas
                      moves along the grey axis, so that its chroma stays the content's
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
# (Σw, Σw·x, Σw·x·xᵀ) over pixels x with weights w: a number, (3,) and (3, 3).
Moments = tuple[float, Matrix, Matrix]

# Weights of R, G and B in Y of YIQ (Rec. 601); their sum is 1.
LUMINANCE_WEIGHTS = (0.299, 0.587, 0.114)
# A variance below one level squared is the rounding of 8 bits, which the inverse root would amplify to coloured noise.
_MIN_VARIANCE = 1.0


@dataclass(frozen=True)
class ColorMap:
    """x ↦ matrix·x + bias, clipped to 0..255 if `clip`. Small, picklable, comparable."""

    matrix: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float]
    clip: bool


@dataclass(frozen=True)
class ColorStatistics:
    """Mean (3,) and population covariance (3, 3) of an image's pixels."""

    mean: Matrix
    covariance: Matrix


def _color_map(matrix_33: Matrix, bias_3: Matrix, clip: bool) -> ColorMap:
    return ColorMap(tuple(tuple(row) for row in matrix_33.tolist()), tuple(bias_3.tolist()), clip)


_WEIGHTS = np.array(LUMINANCE_WEIGHTS)
# The luminance of a pixel in all three channels.
LUMINANCE = _color_map(np.tile(_WEIGHTS, (3, 1)), np.zeros(3), clip=False)


def matched_colors(style: ColorStatistics, content: ColorStatistics) -> ColorMap:
    """The map of `color: content`: A = Σ_content^½ · Σ_style^−½ with symmetric roots, applied about the means.

    A style that lacks a dimension of colour, such as a grey one, gets no colour in that dimension.
    """
    matrix = _power(content.covariance, 0.5, 0.0) @ _power(style.covariance, -0.5, _MIN_VARIANCE)
    return _color_map(matrix, content.mean - matrix @ style.mean, clip=True)


def matched_luminance(style: ColorStatistics, content: ColorStatistics) -> ColorMap:
    """The map of `color: luminance`: Y of the style, with mean and standard deviation of the content's Y."""
    style_variance, content_variance = (
        float(_WEIGHTS @ statistics.covariance @ _WEIGHTS) for statistics in (style, content)
    )
    gain = np.sqrt(max(content_variance, 0.0) / max(style_variance, _MIN_VARIANCE))
    bias = float(_WEIGHTS @ content.mean) - gain * float(_WEIGHTS @ style.mean)
    return _color_map(gain * np.tile(_WEIGHTS, (3, 1)), np.full(3, bias), clip=True)


def _power(covariance: Matrix, exponent: float, minimum: float) -> Matrix:
    """A symmetric matrix to a power, with eigenvalues below `minimum` raised to it."""
    variances, vectors = np.linalg.eigh(covariance)
    powers: Matrix = (vectors * np.maximum(variances, minimum) ** exponent) @ vectors.T
    return powers


def moments(pixels_HWC: NDArray[Any], weights_HW1: NDArray[Any] | None = None) -> Moments:
    """The moments of pixels x with weights w, 0..255; 1 by default.

    Of 8-bit pixels all three are whole numbers; without weights below 2^53, up to 1.4·10^11 pixels: they do not depend
    on the tiles.
    """
    pixels_n3 = pixels_HWC.reshape(-1, 3).astype(np.float64)
    if weights_HW1 is None:
        return float(len(pixels_n3)), pixels_n3.sum(0), pixels_n3.T @ pixels_n3
    weighted_n3 = weights_HW1.reshape(-1, 1) * pixels_n3
    return float(weights_HW1.sum(dtype=np.float64)), weighted_n3.sum(0), weighted_n3.T @ pixels_n3


def added(parts: Sequence[Moments]) -> Moments:
    """The moments of an image from those of all its parts."""
    count, total, squares = 0.0, np.zeros(3), np.zeros((3, 3))
    for part_count, part_total, part_squares in parts:
        count, total, squares = count + part_count, total + part_total, squares + part_squares
    return count, total, squares


def statistics_of(parts: Sequence[Moments]) -> ColorStatistics:
    """The statistics of an image from the moments of all its parts."""
    count, total, squares = added(parts)
    mean = total / count
    return ColorStatistics(mean, squares / count - np.outer(mean, mean))


def luminance(pixels_HWC: NDArray[Any]) -> NDArray[Any]:
    """Y of every pixel, (H, W, 1), in the dtype of the pixels."""
    y_HW1: NDArray[Any] = (pixels_HWC @ _WEIGHTS.astype(pixels_HWC.dtype))[..., None]
    return y_HW1
