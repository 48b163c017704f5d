"""One stage: preparing its arrays, and one iteration of its three passes. No decisions about the run are made here."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import adam, integrity, losses, passes, store, transfer
from pipeline.checksums import ChunkSums
from pipeline.config import Config
from pipeline.cost import Model
from pipeline.engine import Engine
from pipeline.errors import ConfigError
from pipeline.layers import LAYER_BY_NAME
from pipeline.losses import Gram
from pipeline.plan import StagePlan
from pipeline.progress import Sink, WorkDone
from pipeline.tiling import Tile, grid
from pipeline.weights import NetworkSpec

# Chunks per update task: enough to make the scheduler's cost per chunk small, few enough to keep workers busy.
_CHUNKS_PER_TASK = 8


@dataclass(frozen=True)
class IterationResult:
    """What one iteration measured. Losses belong to the canvas it read; `alpha` is the stage's step size.

    `checksums`: of the arrays it wrote for the next one to read.
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
    stepped: bool
    checksums: Mapping[str, str]


@dataclass(frozen=True)
class Prepared:
    """What a stage starts from: each content layer's energy ‖φ_l(o)‖², and the checksums of all that was written."""

    content_energies: Mapping[str, float]
    checksums: Mapping[str, str]


@dataclass
class Stage:
    """A stage of a run: its plan, its folder in the store, and what its passes need."""

    config: Config
    plan: StagePlan
    model: Model
    network: NetworkSpec
    stage_dir: Path
    engine: Engine
    sink: Sink
    tile_px: int
    _seconds: dict[str, float] = field(default_factory=dict)

    @property
    def partial_dir(self) -> Path:
        """Where the stage is prepared, before it is whole."""
        return self.stage_dir.with_name(self.stage_dir.name + ".partial")

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """The tiles of the canvas."""
        return grid(*self.plan.size, self.tile_px)

    # --- preparation -------------------------------------------------------------------------------------------

    def prepare(self, previous_canvas: store.StageArray | None) -> Prepared:
        """Make all arrays of the stage, and fill its inputs and slot 0.

        `previous_canvas`: the result of the stage before, or None for the first. May be repeated from the start.
        Raises SpaceError, InputError for a broken image, ConfigError for features that are not numbers, ChunkError if
        the previous canvas is damaged.
        """
        try:
            return self._prepare(self.partial_dir, previous_canvas)
        except OSError as error:
            if (told := store.space_error(self.partial_dir, error)) is error:
                raise
            raise told from error

    def _prepare(self, folder: Path, previous_canvas: store.StageArray | None) -> Prepared:
        if previous_canvas is not None:
            integrity.require_intact([previous_canvas], self.engine, self._told("check"))
        store.create_stage(folder)
        self._create_arrays(folder)
        content = store.open_array(folder, "content")
        sums = {"content": transfer.ingest(self.config.content, content, self.engine, self._told("content"))}
        sums |= self._store_style_targets(folder)
        sums["canvas_0"] = self._start_canvas(folder, previous_canvas, sums)
        sums |= {name: store.open_array(folder, name).packed_zeros() for name in ("m_0", "v_0")}
        energies, feature_sums = self._content_pass(folder, sums)
        sums |= feature_sums | store.metadata_checksums(folder)
        store.commit_stage(folder, self.stage_dir)
        return Prepared(energies, sums)

    def _create_arrays(self, folder: Path) -> None:
        height, width = self.plan.size
        chunk_px, codec = self.config.store.chunk_px, self.config.store.codec
        state = f"float{8 * self.model.itemsize}"
        store.create_array(folder, "content", (height, width, 3), chunk_px, "uint8", codec)
        for name in ("canvas_0", "canvas_1", "gradient", "m_0", "m_1", "v_0", "v_1"):
            store.create_array(folder, name, (height, width, 3), chunk_px, state, codec)
        for layer in self.model.content_layers:
            stride = LAYER_BY_NAME[layer].stride
            shape = (height // stride, width // stride, self.model.widths[layer])
            name = passes.content_features_name(layer)
            store.create_array(folder, name, shape, chunk_px // stride, state, codec)

    def _store_style_targets(self, folder: Path) -> dict[str, str]:
        """Writes the mean Gram of all styles for every layer; gives the checksums."""
        if not self.model.style_layers:
            return {}
        grams: list[dict[str, Gram]] = []
        for style, size in zip(self.config.styles, self.plan.style_sizes, strict=True):
            store.create_array(
                folder, "style", (*size, 3), self.config.store.chunk_px, "uint8", self.config.store.codec
            )
            array = store.open_array(folder, "style")
            sums = {"style": transfer.ingest(style.image, array, self.engine, self._told("style"))}
            grams.append(self._mean_grams(folder, "style", grid(*size, self.tile_px), "style Gram", sums))
            store.delete_array(folder, "style")
        weights = [style.weight for style in self.config.styles]
        written: dict[str, str] = {}
        for layer in self.model.style_layers:
            target = losses.mean_gram([gram[layer] for gram in grams], weights)
            self._check_finite(float(target.sum()), "style", layer)
            written[store.gram_name(layer)] = store.write_gram(folder, layer, target)
        return written

    def _start_canvas(
        self, folder: Path, previous_canvas: store.StageArray | None, checksums: Mapping[str, str]
    ) -> str:
        canvas = store.open_array(folder, "canvas_0")
        if previous_canvas is None and self.config.init == "noise":
            return canvas.packed(
                {
                    (cy, cx): canvas.write_chunk(cy, cx, passes.initial_noise(self.config.seed, canvas, cy, cx))
                    for cy, cx in self.engine.checked(canvas.chunk_indices())
                }
            )
        source = previous_canvas or store.open_array(folder, "content", checksums["content"])
        return transfer.fill_canvas(source, canvas, self.engine, self._told("canvas"))

    def _content_pass(self, folder: Path, checksums: Mapping[str, str]) -> tuple[dict[str, float], dict[str, str]]:
        """(‖φ_l(o)‖² of each content layer, checksums of its features)."""
        layers = self.model.content_layers
        if not layers:
            return {}, {}
        specs = [passes.ContentSpec(folder, "content", tile, self.network, checksums, layers) for tile in self.tiles]
        results = self.engine.map(passes.content_task, specs, self._counter("content features", len(specs)))
        energies, packed = {}, {}
        for layer in layers:
            energies[layer] = math.fsum(result.energies.get(layer, 0.0) for result in results)
            self._check_finite(energies[layer], "content", layer)
            name = passes.content_features_name(layer)
            sums = _merged(result.sums.get(layer, {}) for result in results)
            packed[name] = store.open_array(folder, name).packed(sums)
        return energies, packed

    def _check_finite(self, total: float, which: str, layer: str) -> None:
        if not math.isfinite(total):
            raise ConfigError(
                f"the {which} image's features at {layer} are not finite: the network's weights are not, or "
                f"compute.dtype {self.network.dtype} overflows with them. Use other weights, or float32."
            )

    # --- one iteration -----------------------------------------------------------------------------------------

    def check(self, slot: int, checksums: Mapping[str, str]) -> None:
        """Raise ChunkError if anything that the next iteration reads is not what was written."""
        for name in checksums:
            if name.endswith(store.METADATA):
                store.check_metadata(self.stage_dir, name, checksums[name])
        features = map(passes.content_features_name, self.model.content_layers)
        names = (*passes.slot_names(slot), *features)
        arrays = [store.open_array(self.stage_dir, name, checksums[name]) for name in names]
        integrity.require_intact(arrays, self.engine, self._told("check"))

    def iterate(
        self,
        iteration: int,
        alpha: float | None,
        content_energies: Mapping[str, float],
        checksums: Mapping[str, str],
    ) -> IterationResult:
        """Read slot `iteration % 2`, write the other: Gram, gradient and update pass. May be repeated.

        `alpha`: the stage's step size, None in its first iteration, which sets it from its own max|u|. `checksums`: of
        all that is read; raises ChunkError where they do not fit.
        """
        slot = iteration % 2
        self._seconds = {}
        with self._timed("gram"):
            terms = self._style_terms(f"canvas_{slot}", checksums)
        with self._timed("gradient"):
            found = self._gradient_pass(f"canvas_{slot}", terms, content_energies, checksums)
        settings = self.config.optimizer
        bias = adam.bias_correction(settings.beta1, settings.beta2, iteration)
        if alpha is None and not self._is_rounding(terms, found.squares, content_energies):
            max_u = adam.first_max_update(settings.beta1, settings.beta2, settings.epsilon, found.max_abs_gradient)
            alpha = settings.target_pixel_change / (bias * max_u) if max_u > 0 else None
        updated = _Updated(0.0, 0.0, {})
        if alpha is not None:
            factor = adam.schedule_factor(settings.schedule, iteration, settings.max_iterations)
            with self._timed("update"):
                read = {**checksums, "gradient": found.checksums}
                updated = self._update_pass(slot, alpha * factor * bias, read)
        return self._result(terms, found.squares, content_energies, alpha, updated)

    def _is_rounding(
        self, terms: Mapping[str, losses.StyleTerm], squares: Mapping[str, float], energies: Mapping[str, float]
    ) -> bool:
        """Whether nothing but rounding is left to optimise: the first step, of fixed size, would make noise of it."""
        errors = [term.relative_error for term in terms.values()]
        errors += [losses.relative_error(squares[layer], energies[layer]) for layer in self.model.content_layers]
        return max(errors) <= losses.ROUNDING[self.config.compute.dtype]

    def _style_terms(self, canvas: str, checksums: Mapping[str, str]) -> dict[str, losses.StyleTerm]:
        if not self.model.style_layers:
            return {}
        grams = self._mean_grams(self.stage_dir, canvas, self.tiles, "Gram pass", checksums)
        factor = self.plan.pixels * self.config.loss.style_weight
        return {
            layer: losses.style_term(
                self.config.loss.kind,
                gram,
                store.read_gram(self.stage_dir, layer, checksums[store.gram_name(layer)]),
                _positions(self.plan.size, layer),
                self.config.network.style_layers[layer],
                factor,
            )
            for layer, gram in grams.items()
        }

    def _mean_grams(
        self, folder: Path, array: str, tiles: tuple[Tile, ...], what: str, checksums: Mapping[str, str]
    ) -> dict[str, Gram]:
        """Gram pass over one image: the mean Gram of every style layer, summed in tile order."""
        layers = self.model.style_layers
        specs = [passes.GramSpec(folder, array, tile, self.network, checksums, layers) for tile in tiles]
        told = self._counter(what, len(specs))
        sums = self.engine.fold(passes.gram_task, specs, passes.add_grams, dict[str, Gram](), told)
        size = (tiles[0].height, tiles[0].width)
        return {layer: sums[layer] / _positions(size, layer) for layer in layers}

    def _content_scales(self, energies: Mapping[str, float]) -> dict[str, float]:
        return {
            layer: losses.content_scale(
                self.config.loss.kind,
                energies[layer],
                self.model.widths[layer],
                _positions(self.plan.size, layer),
                self.config.network.content_layers[layer],
            )
            for layer in self.model.content_layers
        }

    def _gradient_pass(
        self,
        canvas: str,
        terms: Mapping[str, losses.StyleTerm],
        energies: Mapping[str, float],
        checksums: Mapping[str, str],
    ) -> _Gradient:
        factor = 2 * self.plan.pixels * self.config.loss.content_weight
        seeds = {layer: term.seed_CC for layer, term in terms.items()}
        factors = {layer: factor * scale for layer, scale in self._content_scales(energies).items()}
        specs = [
            passes.GradientSpec(self.stage_dir, canvas, tile, self.network, checksums, seeds, factors)
            for tile in self.tiles
        ]
        results = self.engine.map(passes.gradient_task, specs, self._counter("gradient pass", len(specs)))
        squares = {
            layer: math.fsum(result.content_squares.get(layer, 0.0) for result in results)
            for layer in self.model.content_layers
        }
        sums = store.open_array(self.stage_dir, "gradient").packed(_merged(result.sums for result in results))
        return _Gradient(squares, max(result.max_abs_gradient for result in results), sums)

    def _update_pass(self, slot: int, size: float, checksums: Mapping[str, str]) -> _Updated:
        settings = self.config.optimizer
        step = adam.AdamStep(settings.beta1, settings.beta2, settings.epsilon, size, settings.clip)
        gradient = store.open_array(self.stage_dir, "gradient")
        indices = gradient.chunk_indices()
        specs = [
            passes.UpdateSpec(self.stage_dir, tuple(indices[first : first + _CHUNKS_PER_TASK]), slot, step, checksums)
            for first in range(0, len(indices), _CHUNKS_PER_TASK)
        ]
        results = self.engine.map(passes.update_task, specs, self._counter("update pass", len(specs)))
        total = math.fsum(value for result in results for value in result.sums_abs_u)
        packed = {
            name: gradient.packed(_merged(result.sums[name] for result in results))
            for name in passes.slot_names(1 - slot)
        }
        return _Updated(total / (3 * self.plan.pixels), max(result.max_abs_u for result in results), packed)

    def _result(
        self,
        terms: Mapping[str, losses.StyleTerm],
        squares: Mapping[str, float],
        energies: Mapping[str, float],
        alpha: float | None,
        updated: _Updated,
    ) -> IterationResult:
        content = {layer: scale * squares[layer] for layer, scale in self._content_scales(energies).items()}
        style = {layer: term.loss for layer, term in terms.items()}
        content_loss, style_loss = math.fsum(content.values()), math.fsum(style.values())
        loss = self.config.loss
        return IterationResult(
            objective=losses.objective(
                self.plan.pixels, loss.content_weight, content_loss, loss.style_weight, style_loss
            ),
            content_loss=content_loss,
            style_loss=style_loss,
            layer_losses={
                **{f"content.{layer}": value for layer, value in content.items()},
                **{f"style.{layer}": value for layer, value in style.items()},
            },
            mean_abs_u=updated.mean_abs_u,
            max_abs_u=updated.max_abs_u,
            alpha=alpha or 0.0,
            seconds=dict(self._seconds),
            stepped=alpha is not None,
            checksums=updated.checksums,
        )

    # --- telling -----------------------------------------------------------------------------------------------

    def _told(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.sink(WorkDone(self.plan.index, what, done, total))

    def _counter(self, what: str, total: int) -> Callable[[], None]:
        counter = itertools.count(1)
        return lambda: self.sink(WorkDone(self.plan.index, what, next(counter), total))

    @contextmanager
    def _timed(self, what: str) -> Iterator[Any]:
        start = time.perf_counter()
        yield
        self._seconds[what] = time.perf_counter() - start


@dataclass(frozen=True)
class _Gradient:
    """The gradient pass: Σ(φ_l(p) − φ_l(o))² per content layer, max|g|, and the gradient's packed checksums."""

    squares: Mapping[str, float]
    max_abs_gradient: float
    checksums: str


@dataclass(frozen=True)
class _Updated:
    """The update pass: mean|u| and max|u| over the canvas, and the packed checksums of what it wrote."""

    mean_abs_u: float
    max_abs_u: float
    checksums: Mapping[str, str]


def _merged(parts: Iterable[ChunkSums]) -> ChunkSums:
    return {index: value for part in parts for index, value in part.items()}


def _positions(size: tuple[int, int], layer: str) -> int:
    """n_l: positions of a layer on an image of this (height, width)."""
    stride = LAYER_BY_NAME[layer].stride
    return (size[0] // stride) * (size[1] // stride)
