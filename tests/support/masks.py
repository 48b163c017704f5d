"""Masks with a gradient."""

from __future__ import annotations

import numpy as np


def ramp(height: int, width: int, left: float, right: float) -> np.ndarray:
    """A mask with a soft edge that leans: black before `left` of the width, white behind `right`."""
    y, x = np.mgrid[0:height, 0:width]
    place = x / width + 0.1 * y / height
    return np.clip(255 * (place - left) / (right - left), 0, 255).astype(np.uint8)
