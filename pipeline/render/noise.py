"""Noise for a start from an image.

Half a level takes the ties out of a picture of whole levels (algorithm.md, "A start without ties"): in a flat area the
maximum of a pooling window is taken by several equal values, and rounding decides which of them gets the gradient, so
one tile and many would part ways in the first iteration. Stronger noise gives every place of a flat area a form to
begin with: without it, only the image's border differs from the rest, and the style's forms gather there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.core.tiling import Rect

# SplitMix64 (Steele, Lea, Flood 2014): a hash of a counter, here of the place and the seed.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB))


def uniform_noise(seed: int, rect: Rect) -> NDArray[np.float32]:
    """Noise (H, W, 3), uniform from −½ to ½, for the pixels of `rect`: a function of (seed, y, x) alone."""
    y = np.arange(rect.y0, rect.y1, dtype=np.uint64)[:, None, None]
    x = np.arange(rect.x0, rect.x1, dtype=np.uint64)[None, :, None]
    channel = np.arange(3, dtype=np.uint64)
    bits = y << np.uint64(32) | x << np.uint64(2) | channel  # a side has less than 2^20 px
    bits *= _GOLDEN
    bits += _mixed(np.array([seed], np.uint64))  # neighbouring seeds must not give the same noise, moved
    return (_mixed(bits) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24) - np.float32(0.5)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, in place."""
    for shift, factor in _FACTORS:
        values ^= values >> shift
        values *= factor
    values ^= values >> np.uint64(31)
    return values
