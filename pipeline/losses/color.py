"""Whose colours the picture has: maps of pixels that come before the network, and the statistics they are made of.

After Gatys et al., "Preserving color in neural artistic style transfer" and "Controlling perceptual factors". Every map
is affine, pixel by pixel, so tiles stay exact; its numbers are of whole images. Colours are RGB, 0..255.

    color: style      nothing is mapped
    color: content    the style's pixels get the content's mean and covariance
    color: luminance  all is seen in luminance alone, the style with the mean and deviation of the content; the canvas
                      moves along the greys, so that its chroma stays the content's
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

# Of Y in YIQ (Rec. 601); their sum is 1.
LUMINANCE_WEIGHTS = (0.299, 0.587, 0.114)
# A variance below one level squared is the rounding of 8 bits, and no colour: it is not amplified beyond that.
_LEAST_VARIANCE = 1.0


@dataclass(frozen=True)
class ColorMap:
    """x ↦ matrix·x + bias, clipped to 0..255 if `clip`. Small, picklable, comparable."""

    matrix: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float]
    clip: bool


@dataclass(frozen=True)
class ColorStatistics:
    """Mean (3,) and covariance (3, 3) of an image's pixels, divided by their number."""

    mean: Matrix
    covariance: Matrix


def _map_of(matrix_33: Matrix, bias_3: Matrix, clip: bool) -> ColorMap:
    return ColorMap(tuple(tuple(row) for row in matrix_33.tolist()), tuple(bias_3.tolist()), clip)


_WEIGHTS = np.array(LUMINANCE_WEIGHTS)
# Pixels as their luminance, in all three channels.
LUMINANCE = _map_of(np.tile(_WEIGHTS, (3, 1)), np.zeros(3), clip=False)


def matched_colors(style: ColorStatistics, content: ColorStatistics) -> ColorMap:
    """The map of `color: content`: A = Σ_content^½ · Σ_style^−½, symmetric roots, about the means.

    A style with less than three dimensions of colour, a grey one for instance, gets no colour in those it lacks.
    """
    matrix = _power(content.covariance, 0.5, 0.0) @ _power(style.covariance, -0.5, _LEAST_VARIANCE)
    return _map_of(matrix, content.mean - matrix @ style.mean, clip=True)


def matched_luminance(style: ColorStatistics, content: ColorStatistics) -> ColorMap:
    """The map of `color: luminance`: Y of the style, with mean and deviation of Y of the content."""
    of_style, of_content = (float(_WEIGHTS @ one.covariance @ _WEIGHTS) for one in (style, content))
    gain = np.sqrt(max(of_content, 0.0) / max(of_style, _LEAST_VARIANCE))
    bias = float(_WEIGHTS @ content.mean) - gain * float(_WEIGHTS @ style.mean)
    return _map_of(gain * np.tile(_WEIGHTS, (3, 1)), np.full(3, bias), clip=True)


def _power(covariance: Matrix, exponent: float, least: float) -> Matrix:
    """A symmetric matrix to a power, its eigenvalues raised to at least `least`."""
    variances, vectors = np.linalg.eigh(covariance)
    powers: Matrix = (vectors * np.maximum(variances, least) ** exponent) @ vectors.T
    return powers


def style_map(color: str, style: ColorStatistics, content: ColorStatistics) -> ColorMap:
    """The map of the style's pixels for `color: content` or `luminance`."""
    return (matched_colors if color == "content" else matched_luminance)(style, content)


# --- statistics ------------------------------------------------------------------------------------------------------


def moments(pixels_HWC: NDArray[Any]) -> tuple[Matrix, Matrix]:
    """(Σx, Σx·xᵀ) of pixels."""
    pixels_n3 = pixels_HWC.reshape(-1, 3).astype(np.float64)
    return pixels_n3.sum(0), pixels_n3.T @ pixels_n3


def statistics_of(found: Sequence[tuple[Matrix, Matrix]], pixels: int) -> ColorStatistics:
    """The statistics of an image of so many pixels from the `moments` of all its parts."""
    mean = np.sum([total for total, _ in found], axis=0) / pixels
    second = np.sum([squares for _, squares in found], axis=0) / pixels
    return ColorStatistics(mean, second - np.outer(mean, mean))


# --- the canvas of `color: luminance` --------------------------------------------------------------------------------


def luminance(pixels_HWC: NDArray[Any]) -> NDArray[Any]:
    """Y of every pixel, (H, W, 1), in the precision of the pixels."""
    y_HW1: NDArray[Any] = (pixels_HWC @ _WEIGHTS.astype(pixels_HWC.dtype))[..., None]
    return y_HW1
