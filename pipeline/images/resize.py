"""Enlarging a window of an image by centred bicubic interpolation, with the same bits whatever the window.

libvips' affine is exact in double only, and even then its bits depend on the window at ratios other than 2 (measured:
1.5e-5 levels), because it computes positions in floating point. A crop of the preview must equal the run bit for bit.

Axes in names: H rows, W columns, C channels. Rectangles are ``(y0, y1, x0, x1)`` in px, half-open; sizes ``(H, W)``.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]
FloatT = TypeVar("FloatT", np.float32, np.float64)

# A source window reaches this far beyond the outermost sample; the bicubic kernel needs 2 px, `smoothed` 1 more.
_MARGIN_PX = 4


def source_window(target: Box, source_size: tuple[int, int], target_size: tuple[int, int]) -> Box:
    """The rectangle of the source that `resize_window` needs for one rectangle of the target."""
    y0, y1, x0, x1 = target
    rows = _source_range(y0, y1, source_size[0], target_size[0])
    columns = _source_range(x0, x1, source_size[1], target_size[1])
    return (*rows, *columns)


def resize_window(
    window_HWC: NDArray[FloatT],
    window: Box,
    source_size: tuple[int, int],
    target_size: tuple[int, int],
    target: Box,
    *,
    linear: bool = False,
) -> NDArray[FloatT]:
    """Enlarge one rectangle, centred bicubic (Catmull-Rom) or bilinear, edges repeated. Values are not clipped.

    window_HWC holds the rectangle `window` of the source; the result is the rectangle `target` of the target. Taps and
    weights depend on a target pixel's own coordinates alone, so any partition gives the bits of the whole image.
    """
    assert window_HWC.shape[:2] == (window[1] - window[0], window[3] - window[2])
    y0, y1, x0, x1 = target
    taps_y, weights_y = _taps(y0, y1, source_size[0], target_size[0], linear)
    taps_x, weights_x = _taps(x0, x1, source_size[1], target_size[1], linear)
    dtype = window_HWC.dtype
    rows = _weighted(window_HWC, 0, taps_y - window[0], weights_y.astype(dtype)[:, :, None, None])
    return _weighted(rows, 1, taps_x - window[2], weights_x.astype(dtype)[:, None, :, None])


def smoothed(window_HWC: NDArray[FloatT]) -> NDArray[FloatT]:
    """The binomial filter 1-2-1 along rows and columns, edges repeated.

    Of a window that `source_window` gives, the pixels that `resize_window` reads are those of the whole image: the
    outermost ones inside the image, which lack a neighbour here, are in its margin.
    """
    padded: NDArray[Any] = np.pad(window_HWC, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    result: NDArray[FloatT] = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
    return result


def _source_range(t0: int, t1: int, source: int, target: int) -> tuple[int, int]:
    """Range of source pixels for the target pixels [t0, t1), with the margin, clipped to the image."""
    first, last = (((2 * t + 1) * source - target) // (2 * target) for t in (t0, t1 - 1))
    return max(first - _MARGIN_PX, 0), min(last + 1 + _MARGIN_PX, source)


def _taps(t0: int, t1: int, source: int, target: int, linear: bool) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Indices and weights, each (4, t1 − t0), of the taps of the target pixels [t0, t1) on one axis."""
    assert source <= target, f"resize_window only enlarges, not {source} to {target} px"
    # The position (t + ½)·source/target − ½ is a fraction of integers, so the phase is exact whatever the window.
    numerator = (2 * np.arange(t0, t1, dtype=np.int64) + 1) * source - target
    base = numerator // (2 * target)
    f = (numerator - base * 2 * target) / (2 * target)
    g = 1 - f
    bilinear = [np.zeros_like(f), g, f, np.zeros_like(f)]
    bicubic = [-0.5 * f * g * g, 1 + f * f * (1.5 * f - 2.5), 1 + g * g * (1.5 * g - 2.5), -0.5 * f * f * g]
    weights = np.stack(bilinear if linear else bicubic)
    return np.clip(base + np.arange(-1, 3)[:, None], 0, source - 1), weights  # clipping an index repeats the edge


def _weighted(values: NDArray[FloatT], axis: int, taps: NDArray[np.int64], weights: NDArray[Any]) -> NDArray[FloatT]:
    """Sum over the four taps of weight × value, in a fixed order."""
    total: NDArray[FloatT] = np.take(values, taps[0], axis) * weights[0]
    for tap, weight in zip(taps[1:], weights[1:], strict=True):
        total += np.take(values, tap, axis) * weight
    return total
