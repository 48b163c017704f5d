"""The iterations of a stage: Gram, gradient and update pass, what they measured, and what of them runs side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from pipeline import store
from pipeline.core import profiler
from pipeline.core.tiling import chunks_of
from pipeline.core.vgg_layers import halo_px
from pipeline.executors.threads import Engine
from pipeline.losses import objective as losses
from pipeline.losses.objective import Gram
from pipeline.losses.total_variation import CHANNELS
from pipeline.render import adam, tile_tasks, update
from pipeline.render.stage import Stage, content_scales, merged, style_targets
from pipeline.render.written import NotNeeded, Written
from pipeline.store.encodings import BFLOAT16_ROUNDING
from pipeline.store.layout import is_averaged, slot_names

S = TypeVar("S")


@dataclass(frozen=True)
class IterationResult:
    """What one iteration measured. Losses belong to the canvas it read; `alpha` is the stage's step size.

    `seconds`: of each pass. `busy`: thread seconds by kind of work (timeline.py) since the last commit, and as `wall`
    the seconds themselves. `checksums`: of the arrays it wrote for the next one to read.
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
class _Gradient:
    """The gradient pass: Σ(φ_l(p) − φ_l(o))² per content layer, Ltv and max|g|."""

    squares: Mapping[str, float]
    variation: float
    max_abs_gradient: float


@dataclass(frozen=True)
class _Updated:
    """The update pass: mean|u| and max|u| over the canvas, and the packed checksums of what it wrote."""

    mean_abs_u: float
    max_abs_u: float
    checksums: Mapping[str, str]


@dataclass
class _Step:
    """An iteration under way.

    `gradient`, `canvas`: chunks that are written of the gradient and of the next canvas. `found`: style terms, what the
    gradient pass measured, and the time of its end. `ended`: that of the update pass. `failed`: the passes that have
    failed, in that order.
    """

    iteration: int
    checksums: Mapping[str, str]
    commit: Callable[[IterationResult], bool]
    gradient: Written = field(default_factory=Written)
    canvas: Written = field(default_factory=Written)
    found: Future[tuple[Mapping[str, losses.StyleTerm], _Gradient, float]] = field(default_factory=Future)
    ended: float = 0.0
    failed: list[str] = field(default_factory=list)

    def fail(self, which: str) -> None:
        """The iteration has come to nothing: what waits for one of its passes gives up, what runs does so soon."""
        self.failed.append(which)
        self.gradient.close()
        self.canvas.close()

    def wanted(self, spec: S) -> S:
        """The spec itself. Raises NotNeeded once the iteration has come to nothing."""
        self.gradient.raise_if_closed()
        return spec


@dataclass
class Iterations:
    """The iterations of one stage, one after another.

    The update runs beside the gradient pass, tile by tile as gradients are written (but for a stage's first, whose step
    size takes them all), and the Gram pass of the next iteration beside the update, as the canvas is written. `_ahead`
    keeps what it found; `_seconds` has of each pass the time that it took longer than the one before it.
    `content_energies`, `areas`: of the prepared stage.
    Of a canvas that is a part of a picture, `known_grams`: what its mean Grams lack to those of the whole, by style
    key; `least_max_u`: what max|u| of the whole's first iteration will be at least.
    """

    stage: Stage
    content_energies: Mapping[str, float]
    areas: Mapping[str, float] = field(default_factory=dict)
    known_grams: Mapping[str, Gram] = field(default_factory=dict)
    least_max_u: float = 0.0
    _ahead: dict[int, dict[str, Gram]] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        profiler.take()  # what was done before

    def iterate(
        self,
        iteration: int,
        alpha: float | None,
        checksums: Mapping[str, str],
        commit: Callable[[IterationResult], bool],
    ) -> None:
        """Read slot `iteration % 2`, write the other: Gram, gradient and update pass. May be repeated.

        `alpha`: the stage's step size, None in its first iteration, which sets it from its own max|u|. `checksums`: of
        all that is read; raises ChunkError where they do not fit. `commit` gets what was measured once everything is
        written, maybe on another thread, and says whether one more iteration follows.
        """
        stage, step = self.stage, _Step(iteration, checksums, commit)
        if alpha is None or len(stage.tiles) == 1:
            self._differentiate(step)
        if alpha is None:
            alpha = self._first_alpha(step)
        # beside, even if nothing else is done: there may be more threads
        finishing = stage.engine.beside(partial(self._finish, step, alpha))
        try:
            if not step.found.done():
                self._differentiate(step)
            one_more = iteration + 1 < stage.config.optimizer.max_iterations and alpha is not None
            if one_more and stage.layer_use.style_layers and len(stage.tiles) > 1:
                self._gram_ahead(step, finishing)
        except NotNeeded:
            pass
        except Exception:
            if step.failed[:1] != ["update"]:  # else that error came first, and is raised below
                raise
        finally:
            wait([finishing])
        finishing.result()

    def _first_alpha(self, step: _Step) -> float | None:
        """The step size that the stage's first gradient asks for; None where there is nothing to optimise."""
        settings = self.stage.config.optimizer
        terms, gradient, _ended = step.found.result()
        if self._is_rounding(terms, gradient):
            return None
        bias = adam.bias_correction(settings.beta1, settings.beta2, step.iteration)
        max_u = adam.first_max_update(settings.beta1, settings.beta2, settings.epsilon, gradient.max_abs_gradient)
        return settings.target_pixel_change / (bias * max(max_u, self.least_max_u)) if max_u > 0 else None

    def _differentiate(self, step: _Step) -> None:
        """Gram and gradient pass. Whoever waits for them is told how they ended."""
        try:
            terms, gradient = self._gradient(step)
        except BaseException as error:
            step.fail("gradient")
            step.found.set_exception(error)
            raise
        step.found.set_result((terms, gradient, time.perf_counter()))

    def _finish(self, step: _Step, alpha: float | None, engine: Engine) -> None:
        """Update and commit."""
        started = time.perf_counter()
        try:
            updated = _Updated(0.0, 0.0, {})
            if alpha is not None:
                updated = self._update_pass(step, alpha, engine)
            step.ended = time.perf_counter()
            terms, gradient, differentiated = step.found.result()
            self._seconds["update"] = max(0.0, step.ended - max(started, differentiated))
            if not step.commit(self._result(terms, gradient, alpha, updated)):
                step.canvas.close()
        except BaseException:
            step.fail("update")
            raise

    def _gram_ahead(self, step: _Step, finishing: Future[None]) -> None:
        """The next iteration's Gram pass."""
        stage, canvas = self.stage, f"canvas_{1 - step.iteration % 2}"
        chunk_px, halo = store.open_array(stage.stage_dir, canvas).chunk_px, halo_px(stage.layer_use.style_layers)

        def when_written(spec: tile_tasks.GramSpec) -> tile_tasks.GramSpec:
            step.canvas.wait_for((cy, cx) for cy, cx, _ in chunks_of(spec.tile.outer(halo), chunk_px))
            return spec

        # the canvas is not checked here: the next update reads every chunk whole, and checks it
        checksums = {name: step.checksums[name] for name in stage.layer_use.guides.arrays}
        sums = self._gram_sums(canvas, checksums, when_written, step.canvas.leave)
        self._ahead = {step.iteration + 1: sums}
        ended = time.perf_counter()
        finishing.result()
        self._seconds["gram"] = max(0.0, ended - step.ended)

    def _gram_sums(
        self,
        canvas: str,
        checksums: Mapping[str, str],
        before: Callable[[tile_tasks.GramSpec], tile_tasks.GramSpec],
        on_error: Callable[[], None] = lambda: None,
    ) -> dict[str, Gram]:
        """Gram pass over a canvas, the gradient pass of which comes next."""
        stage = self.stage
        return stage.gram_sums(stage.canvas_grams(canvas, checksums), "Gram pass", before=before, on_error=on_error)

    def _gradient(self, step: _Step) -> tuple[dict[str, losses.StyleTerm], _Gradient]:
        """Gram and gradient pass; of a canvas that is one tile, both in one."""
        stage, checksums, canvas = self.stage, step.checksums, f"canvas_{step.iteration % 2}"
        targets = style_targets(stage, self.areas, checksums, self.known_grams)
        how: dict[str, Any] = {
            "tv_weight": stage.config.loss.tv_weight,
            "color": stage.color,
            "guides": stage.layer_use.guides,
        }
        factor = 2 * stage.plan.pixels * stage.config.loss.content_weight
        factors = {layer: factor * scale for layer, scale in content_scales(stage, self.content_energies).items()}
        if len(stage.tiles) == 1:
            (tile,) = stage.tiles
            spec = tile_tasks.WholeSpec(
                stage.stage_dir, canvas, tile, stage.network, checksums, factors, targets, **how
            )
            with self._timed("gradient"):
                (found,) = stage.engine.map(tile_tasks.whole_task, [spec], stage.counter("gradient pass", 1))
            step.gradient.add(found.gradient.sums)
            return dict(found.terms), _gathered(stage, [found.gradient])
        terms = {}
        if targets:
            sums = self._ahead.pop(step.iteration, None)
            if sums is None:
                with self._timed("gram"):
                    sums = self._gram_sums(canvas, checksums, step.wanted)
            terms = {key: target.term(sums[key]) for key, target in targets.items()}
        seeds = {key: term.seed_CC for key, term in terms.items()}
        specs = [
            tile_tasks.GradientSpec(stage.stage_dir, canvas, tile, stage.network, checksums, factors, seeds, **how)
            for tile in stage.tiles
        ]
        with self._timed("gradient"):
            results = stage.engine.map(
                tile_tasks.gradient_task,
                specs,
                stage.counter("gradient pass", len(specs)),
                before=step.wanted,
                after=lambda result: step.gradient.add(result.sums),
                on_error=partial(step.fail, "gradient"),
            )
        return terms, _gathered(stage, results)

    def _is_rounding(self, terms: Mapping[str, losses.StyleTerm], gradient: _Gradient) -> bool:
        """Whether nothing but rounding is left to optimise: the first step, of fixed size, would make noise of it."""
        config = self.stage.config
        rounding = losses.ROUNDING[config.compute.dtype]
        kept = BFLOAT16_ROUNDING if config.store.state_dtype == "compact" else 0.0  # of the content's features
        squares = gradient.squares
        content = [losses.relative_error(squares[layer], energy) for layer, energy in self.content_energies.items()]
        return (
            gradient.variation == 0
            and all(term.relative_error <= rounding for term in terms.values())
            and all(error <= max(rounding, kept) for error in content)
        )

    def _update_pass(self, step: _Step, alpha: float, engine: Engine) -> _Updated:
        stage, settings = self.stage, self.stage.config.optimizer
        bias = adam.bias_correction(settings.beta1, settings.beta2, step.iteration)
        factor = adam.schedule_factor(settings.schedule, step.iteration, settings.max_iterations)
        averaged = is_averaged(step.checksums)
        adam_step = adam.AdamStep(
            settings.beta1,
            settings.beta2,
            settings.epsilon,
            alpha * factor * bias,
            settings.clip,
            adam.average_weight(settings.average, step.iteration) if averaged else None,
        )
        rounding = stage.config.seed, stage.plan.index, step.iteration
        slot, device = step.iteration % 2, stage.network.device
        canvas, *others = slot_names(1 - slot, averaged=averaged)
        specs = update.update_specs(stage.stage_dir, stage.tiles, slot, adam_step, step.checksums, rounding, device)
        results = engine.map(
            update.update_task,
            specs,
            stage.counter("update pass", len(specs)),
            before=lambda spec: replace(spec, gradient_sums=step.gradient.wait_for(spec.chunks)),
            after=lambda result: step.canvas.add(result.sums[canvas]),
            on_error=partial(step.fail, "update"),
        )
        total = math.fsum(value for result in results for value in result.sums_abs_u)
        packed = {
            name: store.open_array(stage.stage_dir, name).packed(merged(result.sums[name] for result in results))
            for name in (canvas, *others)
        }
        return _Updated(total / (3 * stage.plan.pixels), max(result.max_abs_u for result in results), packed)

    def _result(
        self, terms: Mapping[str, losses.StyleTerm], gradient: _Gradient, alpha: float | None, updated: _Updated
    ) -> IterationResult:
        stage, squares = self.stage, gradient.squares
        scales = content_scales(stage, self.content_energies)
        content = {layer: scale * squares[layer] for layer, scale in scales.items()}
        style = {key: term.loss for key, term in terms.items()}
        content_loss, style_loss = math.fsum(content.values()), math.fsum(style.values())
        loss, variation = stage.config.loss, gradient.variation
        seconds, self._seconds = self._seconds, {}
        wall, self._since = time.perf_counter() - self._since, time.perf_counter()
        return IterationResult(
            objective=losses.objective(
                stage.plan.pixels,
                (loss.content_weight, content_loss),
                (loss.style_weight, style_loss),
                (loss.tv_weight, variation),
            ),
            content_loss=content_loss,
            style_loss=style_loss,
            layer_losses={
                **{f"content.{layer}": value for layer, value in content.items()},
                **{f"style.{key}": value for key, value in style.items()},
                **({"variation": variation} if loss.tv_weight else {}),
            },
            mean_abs_u=updated.mean_abs_u,
            max_abs_u=updated.max_abs_u,
            alpha=alpha or 0.0,
            seconds=seconds,
            busy={**profiler.take(), "wall": wall},
            stepped=alpha is not None,
            checksums=updated.checksums,
        )

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[what] = time.perf_counter() - start


def _gathered(stage: Stage, results: Sequence[tile_tasks.GradientResult]) -> _Gradient:
    squares = {
        layer: math.fsum(result.content_squares.get(layer, 0.0) for result in results)
        for layer in stage.layer_use.content_layers
    }
    tv_sum = math.fsum(result.variation for result in results) / (CHANNELS * stage.plan.pixels)
    return _Gradient(squares, tv_sum, max(result.max_abs_gradient for result in results))
