"""Masks with a soft edge."""

from __future__ import annotations

import numpy as np


def ramp(height: int, width: int, left: float, right: float) -> np.ndarray:
    """(height, width) uint8 mask with a slanted soft edge: black left of `left`, white right of `right`."""
    y, x = np.mgrid[0:height, 0:width]
    position = x / width + 0.1 * y / height
    return np.clip(255 * (position - left) / (right - left), 0, 255).astype(np.uint8)
