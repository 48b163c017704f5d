"""How long a run takes: what was measured at some sizes, extrapolated to stages of others.

The time of an iteration is a + b·FLOP: `a` is what every iteration costs (the roots of the loss, starting tasks, the
journal), `b` is the speed of the device. All sizes that were measured give the curve, the largest ones most, because
small feature maps stay in a cache; the newest measurements give its height, because other programs come and go on the
machine. The first iteration of a stage takes longer (its update is not concurrent) and is not counted. The time of a
stage's preparation is extrapolated in the same way, by the FLOP of its passes over style and content.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

from pipeline.core.image_formats import format_of, is_jpeg_inside
from pipeline.plan.plan import Plan, StagePlan

# Times of a size that count: the newest. Nine of a small stage are 0.4 s, which a moment of other work doubles.
_NEWEST = 30
# A time beyond this multiple of the median is of a machine that was asleep.
_OUTLIER = 3.0
# Smaller sizes beside the largest that count for the curve, and how fast their weight falls with their FLOP.
_SIZES, _FALL = 4, 0.5
# The first iteration of a stage takes so many times as long as the others (1.1 to 2.3, vgg19-lite, 2 cores under load).
_FIRST_RATIO = 1.5
# a / b where it is not known: what an iteration of a small picture costs (vgg19-lite, 144 to 640 px in memory, one
# thread: 0.5e9). On a GPU it is more. It counts as one measurement of this weight.
_OVERHEAD_FLOP, _DOUBT = 1e9, 0.1
# So many measurements of a size need no extrapolation from others.
_ENOUGH = 4
# Writing the image, seconds of a core per pixel (2 cores, 2026-11-30): a deflated TIFF with pyramid 1.3e-7, PNG 1.0e-7,
# DeepZoom 0.6e-7, JPEG 0.1e-7; the rest is reading and checking the canvas. A profile of tables takes libvips 1.2e-6
# with 8 bits, 1.7e-6 with 16.
_READ_S, _WRITE_S = 0.3e-7, {"TIFF": 1.3e-7, "PNG": 1.0e-7, "DeepZoom": 0.6e-7, "JPEG": 0.1e-7, "OME-Zarr": 0.6e-7}
_TABLES_S = {8: 1.2e-6, 16: 1.7e-6}
_EXPORT_START_S = 0.3


class Costs:
    """Seconds of one kind of work, by its FLOP."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}  # the size that was measured last is the last

    def add(self, flop: int, seconds: float) -> None:
        """Count a measurement."""
        if flop <= 0 or seconds <= 0:
            return
        times = self._seconds.pop(flop, deque(maxlen=_NEWEST))
        self._seconds[flop] = times
        times.append(seconds)

    def seconds_for(self, flop: int) -> float | None:
        """Seconds of this work; None before the first measurement."""
        levels = {size: _level(times) for size, times in self._seconds.items()}
        for size, times in self._seconds.items():
            others = {other: seconds for other, seconds in levels.items() if other != size}
            if (number := len(times)) < _ENOUGH and others:  # one measurement may be of a busy moment
                levels[size] = (levels[size] ** number * _extrapolated(size, others)) ** (1 / (number + 1))
        if flop in levels:
            return levels[flop]
        return _extrapolated(flop, levels) if levels else None


def _extrapolated(flop: int, levels: dict[int, float]) -> float:
    """The time of a size on the curve through the times of others, at the height of the last of them."""
    a, b = _curve(levels)
    newest = next(reversed(levels))
    return levels[newest] * (a + b * flop) / (a + b * newest)


def _level(times: Sequence[float]) -> float:
    middle = median(times)
    return fmean(min(seconds, _OUTLIER * middle) for seconds in times)


def _curve(seconds: dict[int, float]) -> tuple[float, float]:
    """(a, b) of a + b·FLOP, but for a factor: least squares of the relative errors of these times. None is negative."""
    sizes = sorted(seconds, reverse=True)[:_SIZES]
    uu = uv = vv = u1 = v1 = 0.0
    for size in sizes:
        weight, relative = (size / sizes[0]) ** _FALL, size / sizes[0]
        u, v = 1 / seconds[size], relative / seconds[size]
        uu, uv, vv = uu + weight * u * u, uv + weight * u * v, vv + weight * v * v
        u1, v1 = u1 + weight * u, v1 + weight * v
    # between small sizes that were measured under unlike loads the slope says little
    doubt, ratio = _DOUBT / seconds[sizes[0]] ** 2, _OVERHEAD_FLOP / sizes[0]
    uu, uv, vv = uu + doubt, uv - doubt * ratio, vv + doubt * ratio**2
    determinant = uu * vv - uv * uv
    if len(sizes) > 1 and determinant > 1e-9 * uu * vv:
        a, b = (u1 * vv - v1 * uv) / determinant, (v1 * uu - u1 * uv) / determinant
        if a >= 0 and b > 0:
            return a, b / sizes[0]
    return _OVERHEAD_FLOP, 1.0  # one size, or noise, or a device that is slower at the larger size


@dataclass
class Speed:
    """What the iterations of a run and the preparations of its stages take. `export_s`: writing the image, alone."""

    iterations: Costs = field(default_factory=Costs)
    preparations: Costs = field(default_factory=Costs)
    export_s: float = 0.0

    def stage_s(self, stage: StagePlan) -> float | None:
        """Seconds of a whole stage; None before the first measurement."""
        iteration = self.iterations.seconds_for(stage.flop_per_iteration)
        if iteration is None:
            return None
        # without a preparation of its own kind, its passes are as fast as an iteration's
        prepared = self.preparations.seconds_for(stage.prepare_flop)
        if prepared is None:
            prepared = self.iterations.seconds_for(stage.prepare_flop) or 0.0
        return prepared + iteration * (stage.max_iterations - 1 + _FIRST_RATIO)

    def remaining_s(self, stages: Sequence[StagePlan], iteration: int) -> float | None:
        """Seconds to the end of a run that has `stages` left, of whose first this many iterations are done.

        None before the first measurement.
        """
        current, *later = stages
        each, rest = self.iterations.seconds_for(current.flop_per_iteration), [self.stage_s(stage) for stage in later]
        if each is None:
            return None
        return each * (current.max_iterations - iteration) + sum(filter(None, rest)) + self.export_s * slowness()


def export_s(planned: Plan, compression: str, by_tables: bool) -> float:
    """Seconds that writing the output images takes, roughly, if no other program runs.

    `by_tables`: their profile is one of tables.
    """
    seconds = _EXPORT_START_S
    for name, (height, width) in planned.outputs.items():
        output = format_of(Path(name))
        kind = "JPEG" if output is None or is_jpeg_inside(Path(name), compression) else output.name
        per_px = _READ_S + _WRITE_S[kind] + (_TABLES_S[planned.picture.bits] if by_tables else 0.0)
        seconds += per_px * height * width
    return seconds


def slowness() -> float:
    """How many times as long other programs make the work of one thread take, while a run uses all cores itself."""
    cores = os.cpu_count() or 1
    try:
        return max(1.0, (os.getloadavg()[0] - cores + 1) / cores)
    except (AttributeError, OSError):  # not on this system
        return 1.0
