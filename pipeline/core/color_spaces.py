"""The colour spaces that a canvas may have: their primaries, and the matrices between them.

All have sRGB's tone curve, so that neutral colours have the same numbers in each of them, and the network, which was
trained on sRGB, sees the brightness that it knows. A larger space only makes saturated colours look paler to it.
Matrices are of linear RGB, XYZ is relative to D50, as in ICC profiles.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

SpaceName = Literal["srgb", "display-p3", "adobe-rgb", "rec2020", "prophoto"]
# By size, so that the first one that holds a gamut is the smallest.
# `auto` is chosen by the output's profile before a run begins (rundir/preflight.py).
WorkingSpace = Literal["auto"] | SpaceName
SPACES: tuple[SpaceName, ...] = get_args(SpaceName)

Matrix = NDArray[np.float64]
_D65, _D50_XY = (0.3127, 0.3290), (0.3457, 0.3585)
D50 = np.array([0.9642, 1.0, 0.8249])
# CIE xy of red, green, blue and white.
_CHROMATICITIES: dict[SpaceName, tuple[tuple[float, float], ...]] = {
    "srgb": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), _D65),
    "display-p3": ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06), _D65),
    "adobe-rgb": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), _D65),
    "rec2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),
    "prophoto": ((0.734699, 0.265301), (0.159597, 0.840403), (0.036598, 0.000105), _D50_XY),
}
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
# Profiles of one space differ in their last digits.
_TOLERANCE = 0.004


def to_d50(white_XYZ: Sequence[float] | Matrix) -> Matrix:
    """Bradford's matrix from XYZ relative to a white to XYZ relative to D50."""
    cones = (_BRADFORD @ D50) / (_BRADFORD @ np.asarray(white_XYZ))
    return np.asarray(np.linalg.inv(_BRADFORD) @ np.diag(cones) @ _BRADFORD)


def primaries_matrix(chromaticities: Sequence[tuple[float, float]]) -> Matrix:
    """Linear RGB to XYZ, from the xy of red, green, blue and white. Raises ValueError for impossible ones."""
    if min(y for _, y in chromaticities[3:]) <= 0:
        raise ValueError("a white without luminance")
    red, green, blue, white = (np.array([x, y, 1 - x - y]) for x, y in chromaticities)
    white = white / white[1]
    columns = np.stack([red, green, blue], axis=1)
    if abs(np.linalg.det(columns)) < 1e-4:
        raise ValueError("primaries that span no triangle")
    return np.asarray(to_d50(white) @ (columns * np.linalg.solve(columns, white)))


@functools.cache
def space_matrix(name: SpaceName) -> Matrix:
    """Linear RGB of a space to XYZ."""
    return primaries_matrix(_CHROMATICITIES[name])


def smallest_space(matrix: Matrix) -> SpaceName:
    """The smallest space that holds every colour of an RGB space; the largest one if none does."""
    for name in SPACES:
        if (np.linalg.inv(space_matrix(name)) @ matrix).min() >= -_TOLERANCE:
            return name
    return SPACES[-1]


def srgb_decoded(values: NDArray[Any]) -> NDArray[Any]:
    """Linear light of numbers 0..1 with sRGB's curve."""
    return np.where(values <= 0.04045, values / 12.92, ((np.maximum(values, 0.04045) + 0.055) / 1.055) ** 2.4)
