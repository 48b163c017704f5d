"""What an iteration measures: losses, step sizes and times, and the nodes of its graph that compute them.

All functions here are pure and can be pickled: with worker processes, they run there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import store
from pipeline.config import Config, OptimizerConfig
from pipeline.executors import Key
from pipeline.losses import objective
from pipeline.losses.color_space import Basis
from pipeline.losses.objective import Gram, StyleTarget, StyleTerm
from pipeline.losses.total_variation import CHANNELS
from pipeline.render import adam
from pipeline.render.tile_specs import GradientResult
from pipeline.render.update import UpdateResult
from pipeline.store import BFLOAT16_ROUNDING, merged


@dataclass(frozen=True)
class IterationResult:
    """What one iteration measured. Losses belong to the canvas it read; `alpha` is the stage's step size.

    `seconds`: of each pass. `busy`: thread seconds by kind of work (core/profiler.py) since the last commit, and as
    `wall` the seconds themselves. `checksums`: of the arrays it wrote for the next one to read.
    `max_abs_u` is zero where there is nothing to optimise; then `stepped` is False if no step was made.
    """

    objective: float
    content_loss: float
    style_loss: float
    layer_losses: Mapping[str, float]
    mean_abs_u: float
    max_abs_u: float
    alpha: float
    seconds: Mapping[str, float]
    busy: Mapping[str, float]
    stepped: bool
    checksums: Mapping[str, str]


@dataclass(frozen=True)
class GradientTotals:
    """The gradient pass over the whole canvas: Σ(φ_l(p) − φ_l(o))² by layer key, Ltv and max|g|.

    `tiles`: (the squares, the share of 3N·Ltv, the style's pull) of each tile.
    """

    squares: Mapping[str, float]
    variation: float
    max_abs_gradient: float
    tiles: Sequence[tuple[Mapping[str, float], float, float]] = ()


@dataclass(frozen=True)
class UpdateTotals:
    """The update pass over the whole canvas: mean|u|, max|u|, and the packed checksums of what it wrote, by array."""

    mean_abs_u: float = 0.0
    max_abs_u: float = 0.0
    checksums: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What the nodes of an iteration found. `alpha`: None where nothing but rounding was left to optimise."""

    terms: Mapping[str, StyleTerm]
    gradient: GradientTotals
    alpha: float | None
    update: UpdateTotals


@dataclass(frozen=True)
class FirstStep:
    """Chooses a stage's step size α from its first gradient (algorithm.md, "adaptive α").

    `content_energies`: ‖φ_l(o)‖² of each content layer. `least_max_u`: for a region of an image, the max|u| of the
    whole image's first iteration is at least this.
    """

    config: Config
    iteration: int
    content_energies: Mapping[str, float]
    least_max_u: float

    def alpha(self, terms: Mapping[str, StyleTerm], gradient: GradientTotals) -> float | None:
        """The step size; None where there is nothing to optimise."""
        settings = self.config.optimizer
        if self._is_rounding(terms, gradient):
            return None
        bias = adam.bias_correction(settings.beta1, settings.beta2, self.iteration)
        # max|u| follows from max|g| in the first iteration: no extra sweep over the canvas
        max_u = adam.first_max_update(settings.beta1, settings.beta2, settings.epsilon, gradient.max_abs_gradient)
        return settings.target_pixel_change / (bias * max(max_u, self.least_max_u)) if max_u > 0 else None

    def _is_rounding(self, terms: Mapping[str, StyleTerm], gradient: GradientTotals) -> bool:
        """Whether only rounding is left to optimise: the first step has a fixed size and would turn it into noise."""
        rounding = objective.ROUNDING[self.config.compute.dtype]
        # the content's features are stored in 16 bits there, which rounds them further
        stored_rounding = BFLOAT16_ROUNDING if self.config.store.state_dtype == "compact" else 0.0
        content_errors = [
            objective.relative_error(gradient.squares[key], energy) for key, energy in self.content_energies.items()
        ]
        return (
            gradient.variation == 0
            and all(term.relative_error <= rounding for term in terms.values())
            and all(error <= max(rounding, stored_rounding) for error in content_errors)
        )


def style_terms(targets: Mapping[str, StyleTarget], sums: Mapping[str, Gram]) -> dict[str, StyleTerm]:
    """The style terms of a canvas, by style key, from its Gram sums (eqs. 14 to 16)."""
    return {key: target.term(sums[key]) for key, target in targets.items()}


def gradient_totals(content_keys: Sequence[str], pixels: int, *tiles: GradientResult) -> GradientTotals:
    """Sums over the tiles, in their order; `pixels` of the canvas."""
    # fsum rounds once: the losses in the journal do not depend on the number of tiles
    squares = {key: math.fsum(tile.content_squares.get(key, 0.0) for tile in tiles) for key in content_keys}
    tv_sum = math.fsum(tile.variation for tile in tiles) / (CHANNELS * pixels)
    parts = [(tile.content_squares, tile.variation, tile.style_pull) for tile in tiles]
    return GradientTotals(squares, tv_sum, max(tile.max_abs_gradient for tile in tiles), parts)


def adam_step(
    settings: OptimizerConfig,
    iteration: int,
    alpha: float,
    *,
    averaged: bool,
    steps_before: int = 0,
    basis: Basis | None = None,
) -> adam.AdamStep:
    """The step of iteration j: its size is α·c_j·b. `steps_before`: in the moments that the stage started from."""
    # both factors are folded into the size, so that the update pass multiplies each pixel once
    bias = adam.bias_correction(settings.beta1, settings.beta2, steps_before + iteration)
    factor = adam.schedule_factor(settings.schedule, iteration, settings.max_iterations)
    return adam.AdamStep(
        settings.beta1,
        settings.beta2,
        settings.epsilon,
        alpha * factor * bias,
        settings.clip,
        adam.average_weight(settings.average, iteration) if averaged else None,
        basis,
    )


def measured(
    stage_dir: Path,
    written: Sequence[str],
    pixels: int,
    terms: Mapping[str, StyleTerm],
    gradient: GradientTotals,
    alpha: float | None,
    *updates: UpdateResult,
) -> Measured:
    """Puts together what the passes found. `written`: the arrays that the update pass wrote."""
    if alpha is None:
        return Measured(terms, gradient, None, UpdateTotals())
    total = math.fsum(value for update in updates for value in update.sums_abs_u)
    packed = {
        name: store.open_array(stage_dir, name).packed(merged(update.sums[name] for update in updates))
        for name in written
        if all(name in update.sums for update in updates)  # not where the arrays are in a device's memory
    }
    largest = max(update.max_abs_u for update in updates)
    return Measured(terms, gradient, alpha, UpdateTotals(total / (3 * pixels), largest, packed))


class PassClock:
    """Measures the passes of an iteration, which overlap: of each the time that it took longer than the one before.

    The Gram pass of the next iteration, which runs ahead, is counted for that iteration.
    """

    def __init__(self) -> None:
        self._begun = self._since = time.perf_counter()
        self._ended: dict[str, float] = {}
        self._gram_ahead_s = 0.0

    def begin(self) -> None:
        """An iteration begins."""
        self._begun, self._ended = time.perf_counter(), {}

    def done(self, key: Key) -> None:
        """A node is done."""
        self._ended[key[0]] = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """Seconds of the iteration's passes, once its update has ended."""
        seconds, last = {}, self._begun
        if self._gram_ahead_s:
            seconds["gram"] = self._gram_ahead_s
        for name in ("gram", "gradient", "update"):
            if (ended := self._ended.get(name)) is not None:
                seconds[name] = seconds.get(name, 0.0) + max(0.0, ended - last)
                last = max(last, ended)
        return seconds

    def end(self) -> None:
        """The iteration and the Gram pass ahead have ended."""
        last = max(self._ended.get("update", 0.0), self._ended.get("gradient", 0.0))
        self._gram_ahead_s = max(0.0, self._ended.get("next gram", 0.0) - last)

    def wall(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        return elapsed
