"""Decorrelated colour coordinates for the optimiser (`optimizer.color_space`).

A pixel is p = M·θ with luminance, blue-yellow and green-magenta coordinates θ, Lucid's colour matrix (Olah et al.,
"Feature Visualization"). Adam's moments and steps are of θ: g_θ = Mᵀ·g_p, and the canvas moves by M·u. M is scaled so
that a unit step of luminance moves each channel by about one level; a unit step of colour moves them less. So a step
has less colour than brightness, as natural images have, and colours grain less. Per pixel, so exact in tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Basis = tuple[tuple[float, float, float], ...]

_LUCID = np.array([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]])
# Rows R, G, B; columns luminance, blue-yellow, green-magenta.
DECORRELATED: Basis = tuple(tuple(row) for row in (_LUCID / _LUCID[:, 0].mean()).tolist())


def to_pixels(theta_HWC: NDArray[Any], basis: Basis, scale: float, out_HWC: NDArray[Any]) -> None:
    """Write scale·M·θ of every pixel to `out_HWC`, which is contiguous as `theta_HWC` is."""
    matrix = (scale * np.array(basis)).astype(theta_HWC.dtype)
    np.matmul(theta_HWC.reshape(-1, 3), matrix.T, out=out_HWC.reshape(-1, 3))
