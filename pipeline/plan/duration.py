"""How long a run takes: seconds per iteration as measured, extrapolated to stages of other sizes.

The time of an iteration is a + b·FLOP: `a` is what every iteration costs (the roots of the loss, starting tasks, the
journal), `b` is the speed of the device. Both come from the two largest sizes that were measured, because the slope
between small ones says little about large ones: small feature maps stay in a cache.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from pipeline.plan.plan import StagePlan

# Iterations of a stage that count: the newest, because other programs come and go on the machine.
_NEWEST = 9
_APART = 1.8
# Writing the image, per pixel: checking the canvas, converting, deflating it with a pyramid (docs/log.md, 2026-11-30).
_EXPORT_S_PER_PX = 1.5e-7


@dataclass
class Speed:
    """Seconds per iteration, by the FLOP of an iteration."""

    _seconds: defaultdict[int, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=_NEWEST)))

    def add(self, flop: int, seconds: float) -> None:
        """Count an iteration of this work."""
        if flop > 0 and seconds > 0:
            self._seconds[flop].append(seconds)

    def seconds_for(self, flop: int) -> float | None:
        """Seconds of an iteration of this work; None before the first measurement."""
        if flop in self._seconds:
            return median(self._seconds[flop])
        if not self._seconds:
            return None
        overhead, rate = self._line()
        return overhead + rate * flop

    def _line(self) -> tuple[float, float]:
        """(a, b) through the two largest sizes, neither below 0."""
        (flop, seconds), *smaller = sorted(
            ((flop, median(times)) for flop, times in self._seconds.items()), reverse=True
        )
        # the largest that is clearly smaller: between two like sizes the slope is noise
        less, less_s = next((point for point in smaller if point[0] * _APART <= flop), (0, 0.0))
        rate = (seconds - less_s) / (flop - less)
        overhead = seconds - rate * flop
        if rate <= 0 or overhead < 0:  # noise, or a device that is slower at the larger size
            return 0.0, seconds / flop
        return overhead, rate

    def stage_s(self, stage: StagePlan) -> float | None:
        """Seconds of a whole stage, with its preparation."""
        iteration = self.seconds_for(stage.flop_per_iteration)
        return None if iteration is None else self._line()[1] * stage.prepare_flop + iteration * stage.max_iterations

    def remaining_s(self, stages: Sequence[StagePlan], iteration: int) -> float | None:
        """Seconds to the end of a run that has `stages` left, of whose first this many iterations are done."""
        current, *later = stages
        each, rest = self.seconds_for(current.flop_per_iteration), [self.stage_s(stage) for stage in later]
        if each is None:
            return None
        return each * (current.max_iterations - iteration) + sum(filter(None, rest)) + export_s(stages[-1])


def export_s(last: StagePlan) -> float:
    """Seconds that writing the image takes, roughly: it depends on the picture and the format."""
    return _EXPORT_S_PER_PX * last.pixels
