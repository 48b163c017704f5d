"""How long a run takes: what was measured at some sizes, extrapolated to stages of others.

The time of an iteration is a + b·FLOP: `a` is what every iteration costs (the roots of the loss, starting tasks, the
journal), `b` is the speed of the device. Both come from the two largest sizes that were measured, because the slope
between small ones says little about large ones: small feature maps stay in a cache. The time of a stage's preparation
is extrapolated in the same way, by the FLOP of its passes over style and content.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from pipeline.plan.plan import StagePlan

# Times of a size that count: the newest, because other programs come and go on the machine.
_NEWEST = 9
# How much more work a size must be for the slope between the two to be more than noise.
_APART = 1.8
# Writing the image, per pixel. Measured: a deflated TIFF with pyramid 1.3e-7 s of a core, PNG 1.0e-7, DeepZoom 0.6e-7,
# JPEG 0.1e-7 (2 cores, 2026-11-30); the rest is reading and checking the canvas.
_EXPORT_S_PER_PX = 1.5e-7


class Costs:
    """Seconds of one kind of work, by its FLOP."""

    def __init__(self) -> None:
        self._seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_NEWEST))

    def add(self, flop: int, seconds: float) -> None:
        """Count a measurement."""
        if flop > 0 and seconds > 0:
            self._seconds[flop].append(seconds)

    def seconds_for(self, flop: int) -> float | None:
        """Seconds of this work; None before the first measurement."""
        if flop in self._seconds:
            return median(self._seconds[flop])
        if not self._seconds:
            return None
        (largest, seconds), *smaller = sorted(
            ((flop, median(times)) for flop, times in self._seconds.items()), reverse=True
        )
        less, less_s = next((point for point in smaller if point[0] * _APART <= largest), (0, 0.0))
        rate = (seconds - less_s) / (largest - less)
        overhead = seconds - rate * largest
        if rate <= 0 or overhead < 0:  # noise, or a device that is slower at the larger size
            return seconds * flop / largest
        return overhead + rate * flop


@dataclass
class Speed:
    """What the iterations of a run and the preparations of its stages take."""

    iterations: Costs = field(default_factory=Costs)
    preparations: Costs = field(default_factory=Costs)

    def stage_s(self, stage: StagePlan) -> float | None:
        """Seconds of a whole stage; None before the first measurement."""
        iteration = self.iterations.seconds_for(stage.flop_per_iteration)
        if iteration is None:
            return None
        # without a preparation of its own kind, its passes are as fast as an iteration's
        prepared = self.preparations.seconds_for(stage.prepare_flop)
        if prepared is None:
            prepared = self.iterations.seconds_for(stage.prepare_flop) or 0.0
        return prepared + iteration * stage.max_iterations

    def remaining_s(self, stages: Sequence[StagePlan], iteration: int) -> float | None:
        """Seconds to the end of a run that has `stages` left, of whose first this many iterations are done.

        None before the first measurement.
        """
        current, *later = stages
        each, rest = self.iterations.seconds_for(current.flop_per_iteration), [self.stage_s(stage) for stage in later]
        if each is None:
            return None
        return each * (current.max_iterations - iteration) + sum(filter(None, rest)) + export_s(stages[-1])


def export_s(last: StagePlan) -> float:
    """Seconds that writing the image takes, roughly: it depends on the picture and the format."""
    return _EXPORT_S_PER_PX * last.pixels
