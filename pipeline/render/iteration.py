"""The iterations of a stage. Each is one graph, run by the stage's executor:

    gram_t ─► sums, in tile order ─► terms ─► gradient_t ─► update_c ─► next gram_t ─► next sums
                                                    └─ α (first iteration) ─┘  └─► measured ─► commit

The edges are the chunks: an update of chunks needs the gradient of their tile, and the next iteration's Gram pass needs
the updates of all chunks that a tile and its halo read. So the update runs beside the gradient pass, and the next Gram
pass beside the end of the update. A stage's first iteration takes its step size α from the whole gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

from pipeline import store
from pipeline.core import profiler
from pipeline.core.tiling import Tile, chunks_of
from pipeline.executors import Key, Node, add_sum
from pipeline.losses import objective
from pipeline.losses.objective import Gram, StyleTerm
from pipeline.render import adam, tile_specs, tile_tasks, update
from pipeline.render.measurements import (
    FirstStep,
    IterationResult,
    Measured,
    PassClock,
    adam_step,
    gradient_totals,
    measured,
    style_terms,
)
from pipeline.render.stage import Stage, content_scales, style_targets
from pipeline.render.tile_losses import write_tile_losses
from pipeline.store import is_averaged, slot_names

T = TypeVar("T")
Sums = dict[str, Gram]

# Keys of single nodes.
CHECKSUMS: Key = ("checksums", 0)
TERMS: Key = ("terms", 0)
TOTALS: Key = ("totals", 0)
ALPHA: Key = ("alpha", 0)
MEASURED: Key = ("measured", 0)


@dataclass
class Iterations:
    """The iterations of one stage, one after another.

    `content_energies`, `areas`: of the prepared stage. Of a canvas that is a region of an image, `known_grams`: the
    mean Grams of the whole and of the region at an earlier stage, by style key; `least_max_u`: what max|u| of the whole
    image's first iteration will be at least. `adam_steps`: of the stages before that this one continues. `_ahead`: by
    iteration, the sums of a Gram pass that has run ahead.
    """

    stage: Stage
    content_energies: Mapping[str, float]
    areas: Mapping[str, float] = field(default_factory=dict)
    known_grams: Mapping[str, tuple[Gram, Gram]] = field(default_factory=dict)
    least_max_u: float = 0.0
    adam_steps: int = 0
    _at: int = 0
    _ahead: dict[int, Sums] = field(default_factory=dict)
    _clock: PassClock = field(default_factory=PassClock)

    def __post_init__(self) -> None:
        profiler.take()  # discards what was measured before the stage

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
        # repeatable: nothing that is read here is overwritten, and the journal decides which slot counts
        self._clock.begin()
        self._at = iteration
        graph = _IterationGraph(self, iteration, alpha, checksums)
        keys = [MEASURED, *graph.next_sums]
        _, *ahead = self.stage.executor.run(
            graph.nodes, keys, graph.progress, lambda value: commit(self._result(value))
        )
        self._clock.end()
        if ahead and ahead[0] is not None:  # None: no iteration follows, or no step was made
            self._ahead = {iteration + 1: ahead[0]}

    def take_ahead(self, iteration: int) -> Sums | None:
        """The Gram sums of the canvas that `iteration` reads, if its Gram pass has run already."""
        return self._ahead.pop(iteration, None)

    def done(self, key: Key) -> None:
        """Note the time at which a node was done."""
        self._clock.done(key)

    def _result(self, value: Measured) -> IterationResult:
        stage, squares = self.stage, value.gradient.squares
        scales = content_scales(stage, self.content_energies)
        content = {key: scale * squares[key] for key, scale in scales.items()}
        style = {key: term.loss for key, term in value.terms.items()}
        content_loss, style_loss = math.fsum(content.values()), math.fsum(style.values())
        loss, variation = stage.config.loss, value.gradient.variation
        write_tile_losses(stage, self._at, value.gradient, scales, style_loss)
        stage.executor.collect_profile()  # before the profiler is read: workers measure for themselves
        return IterationResult(
            objective=objective.objective(
                stage.plan.pixels,
                (loss.content_weight, content_loss),
                (loss.style_weight, style_loss),
                (loss.tv_weight, variation),
            ),
            content_loss=content_loss,
            style_loss=style_loss,
            layer_losses={
                **{f"content.{key}": loss for key, loss in content.items()},
                **{f"style.{key}": loss for key, loss in style.items()},
                **({"variation": variation} if loss.tv_weight else {}),
            },
            mean_abs_u=value.update.mean_abs_u,
            max_abs_u=value.update.max_abs_u,
            alpha=value.alpha or 0.0,
            seconds=self._clock.seconds(),
            busy={**profiler.take(), "wall": self._clock.wall()},
            stepped=value.alpha is not None,
            checksums=value.update.checksums,
        )


class _IterationGraph:
    """The nodes of one iteration. `next_sums`: the key of the next iteration's Gram sums; empty if none is made."""

    def __init__(self, iterations: Iterations, iteration: int, alpha: float | None, checksums: Mapping[str, str]):
        self._iterations, self._stage = iterations, iterations.stage
        self._iteration, self._checksums = iteration, checksums
        self._count = len(self._stage.tiles)
        self._canvas, self._next_canvas = f"canvas_{iteration % 2}", f"canvas_{1 - iteration % 2}"
        # with worker processes a value that many nodes need is sent to each once: checksums have megabytes
        self.nodes: dict[Key, Node] = {CHECKSUMS: Node(partial(_value, dict(checksums)))}
        self._counters: dict[str, Callable[[], None]] = {}
        if self._count == 1:
            self._add_whole()
        else:
            self._add_terms()
            self._add_gradients()
        self._add_totals(alpha)
        self._add_updates()
        self.next_sums = [self._add_next_grams()] if self._has_next() else []

    def progress(self, key: Key) -> None:
        """Report a node that is done."""
        self._iterations.done(key)
        if (counter := self._counters.get(key[0])) is not None:
            counter()

    def _add_whole(self) -> None:
        """Of a canvas that is one tile, Gram and gradient pass with one forward pass through the network."""
        (tile,) = self._stage.tiles
        spec = self._seed_spec(tile_specs.WholeSpec, tile, self._content_factors(), self._targets())
        task = partial(_with_checksums, tile_tasks.whole_task, spec)
        self.nodes["whole", 0] = Node(task, (CHECKSUMS,), tile=True)
        self.nodes[TERMS] = Node(attrgetter("terms"), (("whole", 0),))
        self.nodes["gradient", 0] = Node(attrgetter("gradient"), (("whole", 0),))
        self._counters["gradient"] = self._stage.counter("gradient pass", 1)

    def _add_terms(self) -> None:
        """The Gram pass, unless it has run ahead, and the style terms."""
        targets = self._targets()
        sums = self._iterations.take_ahead(self._iteration)
        if sums is not None or not targets:  # the first iteration after a start has no sums yet
            self.nodes[TERMS] = Node(partial(style_terms, targets, sums or {}))
            return
        for tile, spec in enumerate(self._stage.canvas_grams(self._canvas, {})):
            self.nodes["gram", tile] = Node(
                partial(_with_checksums, tile_tasks.gram_task, spec), (CHECKSUMS,), tile=True
            )
        last = self._add_sum("gram sum", "gram", tile_tasks.add_grams)
        self.nodes[TERMS] = Node(partial(style_terms, targets), (last,))
        self._counters["gram"] = self._stage.counter("Gram pass", self._count)

    def _add_gradients(self) -> None:
        factors = self._content_factors()
        for number, tile in enumerate(self._stage.tiles):
            spec = self._seed_spec(tile_specs.GradientSpec, tile, factors, {})
            task = partial(_gradient, tile_tasks.gradient_task, spec)
            self.nodes["gradient", number] = Node(task, (CHECKSUMS, TERMS), tile=True)
        self._counters["gradient"] = self._stage.counter("gradient pass", self._count)

    def _seed_spec(self, kind: Callable[..., T], tile: Tile, factors: Mapping[str, float], style: object) -> T:
        """The spec of one tile, without checksums; `style`: the targets, or the seeds."""
        stage = self._stage
        return kind(
            stage.stage_dir,
            self._canvas,
            tile,
            stage.network,
            {},
            factors,
            style,
            tv_weight=stage.config.loss.tv_weight,
            tv_kind=stage.config.loss.tv_kind,
            color=stage.color,
            guides=stage.layer_use.guides,
            basis=stage.basis,
            scales=stage.layer_use.scales,
        )

    def _add_totals(self, alpha: float | None) -> None:
        stage = self._stage
        gather = partial(gradient_totals, tuple(stage.layer_use.content_widths), stage.plan.pixels)
        self.nodes[TOTALS] = Node(gather, tuple(("gradient", tile) for tile in range(self._count)))
        if alpha is None:  # the update of a stage's first iteration waits for all gradients, because α needs max|g|
            first = FirstStep(
                stage.config, self._iteration, self._iterations.content_energies, self._iterations.least_max_u
            )
            self.nodes[ALPHA] = Node(first.alpha, (TERMS, TOTALS))
        else:
            self.nodes[ALPHA] = Node(partial(_value, alpha))

    def _add_updates(self) -> None:
        """The update of every chunk, and what the iteration measured."""
        stage, averaged = self._stage, is_averaged(self._checksums)
        settings, steps = stage.config.optimizer, self._iterations.adam_steps
        step = partial(adam_step, settings, self._iteration, averaged=averaged, steps_before=steps, basis=stage.basis)
        rounding = stage.config.seed, stage.plan.index, self._iteration
        every = update.UpdateSpec(stage.stage_dir, self._iteration % 2, None, {}, rounding)
        self._updates_of: dict[tuple[int, int], Key] = {}
        for number, tile in enumerate(stage.tiles):
            for spec in update.update_specs(every, [tile], stage.network.device):
                key = "update", len(self._updates_of)
                task = partial(_update, update.update_task, spec, step)
                self.nodes[key] = Node(task, (CHECKSUMS, ALPHA, ("gradient", number)))
                self._updates_of |= dict.fromkeys(spec.chunks, key)
        updates = tuple(dict.fromkeys(self._updates_of.values()))
        written = slot_names(1 - self._iteration % 2, averaged=averaged)
        measure = partial(measured, stage.stage_dir, written, stage.plan.pixels)
        self.nodes[MEASURED] = Node(measure, (TERMS, TOTALS, ALPHA, *updates))
        self._counters["update"] = stage.counter("update pass", len(updates))

    def _has_next(self) -> bool:
        # a canvas of one tile computes its Gram sums in the gradient pass itself
        one_more = self._iteration + 1 < self._stage.config.optimizer.max_iterations
        return one_more and bool(self._stage.layer_use.style_layers) and self._count > 1

    def _add_next_grams(self) -> Key:
        """The Gram pass of the next iteration."""
        stage = self._stage
        chunk_px = store.open_array(stage.stage_dir, self._next_canvas).chunk_px
        halo = stage.layer_use.gram_halo_px
        guide_checksums = {name: self._checksums[name] for name in stage.layer_use.guides.arrays}
        # the canvas is not checked here: the next update reads every chunk whole, and checks it
        for number, spec in enumerate(stage.canvas_grams(self._next_canvas, guide_checksums)):
            # the chunks under the tile and its halo: neighbours' updates, not the whole pass
            chunks = chunks_of(spec.reads(halo), chunk_px)
            needs = tuple(dict.fromkeys(self._updates_of[cy, cx] for cy, cx, _ in chunks))
            self.nodes["next gram", number] = Node(partial(_next_gram, tile_tasks.gram_task, spec), needs, tile=True)
        # last in the graph: tiles of this iteration's gradient pass begin before them
        self._counters["next gram"] = stage.counter("Gram pass", self._count)
        return self._add_sum("next sum", "next gram", _add_if_any)

    def _add_sum(self, kind: str, parts: str, combine: Callable[[Any, Any], Any]) -> Key:
        return add_sum(self.nodes, (kind, parts), self._count, combine, {}, self._stage.executor.most_ahead)

    def _targets(self) -> dict[str, objective.StyleTarget]:
        iterations = self._iterations
        return style_targets(self._stage, iterations.areas, self._checksums, iterations.known_grams)

    def _content_factors(self) -> dict[str, float]:
        """By layer key, what turns φ(p) − φ(o) into the seed of its gradient."""
        factor = 2 * self._stage.plan.pixels * self._stage.config.loss.content_weight
        scales = content_scales(self._stage, self._iterations.content_energies)
        return {key: factor * scale for key, scale in scales.items()}


# --- functions of nodes: found by name in worker processes ------------------------------------------------------------


def _value(value: T) -> T:
    return value


def _with_checksums(task: Callable[[Any], T], spec: Any, checksums: Mapping[str, str]) -> T:
    return task(replace(spec, checksums=checksums))


def _gradient(
    task: Callable[[tile_specs.GradientSpec], tile_specs.GradientResult],
    spec: tile_specs.GradientSpec,
    checksums: Mapping[str, str],
    terms: Mapping[str, StyleTerm],
) -> tile_specs.GradientResult:
    seeds = {key: term.seed_CM for key, term in terms.items()}
    return task(replace(spec, checksums=checksums, style_seeds_CM=seeds))


def _update(
    task: Callable[[update.UpdateSpec], update.UpdateResult],
    spec: update.UpdateSpec,
    step: Callable[[float], adam.AdamStep],
    checksums: Mapping[str, str],
    alpha: float | None,
    gradient: tile_specs.GradientResult,
) -> update.UpdateResult | None:
    """None where there is nothing to optimise."""
    if alpha is None:
        return None
    # none of chunks in a device's memory; the update does not check those
    sums = {chunk: gradient.sums[chunk] for chunk in spec.chunks} if gradient.sums else {}
    return task(replace(spec, step=step(alpha), checksums=checksums, gradient_sums=sums))


def _next_gram(
    task: Callable[[tile_specs.GramSpec], Sums], spec: tile_specs.GramSpec, *updates: update.UpdateResult | None
) -> Sums | None:
    """None where no step was made: then there is no next canvas."""
    return None if None in updates else task(spec)


def _add_if_any(total: Sums | None, tile: Sums | None) -> Sums | None:
    return None if total is None or tile is None else tile_tasks.add_grams(total, tile)
