"""The wrong ways to render in tiles of the paper's Fig. 9: the program's own passes with modified specs.

no halo          a tile is read without its neighbours' pixels and padded on all sides, as if it were an image
own Grams        a tile is optimised with its own Gram matrices, as if it were an image

Fig. 9(c) has both faults, 9(d) the second, 9(e) none. No config can produce them: the faults are implemented here, in
tasks that replace the program's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline import store
from pipeline.config.config import Config
from pipeline.core.image_formats import RGB8
from pipeline.core.tiling import Rect, Tile
from pipeline.executors.graph import Graph
from pipeline.executors.threads import ThreadExecutor
from pipeline.losses import objective
from pipeline.losses.objective import Gram
from pipeline.plan.network_cost import layers_in_use
from pipeline.plan.plan import arrays_of
from pipeline.render import tile_specs, tile_tasks
from pipeline.render.stage import positions
from pipeline.store import metadata
from pipeline.store.layout import CONTENT, GRADIENT, content_features_name, gram_name

Task = Callable[[Any], Any]


class OtherTasks(ThreadExecutor):
    """An executor that replaces some of the program's tasks."""

    def __init__(self, tiles: int, tasks: Mapping[Task, Task]):
        super().__init__(tiles)
        self._tasks = tasks

    def run(self, graph: Graph, *arguments: Any, **named: Any) -> list[Any]:
        """As in ThreadExecutor."""
        nodes = {key: replace(node, function=self._other(node.function)) for key, node in graph.items()}
        return super().run(nodes, *arguments, **named)

    def _other(self, function: Task) -> Task:
        if not isinstance(function, partial):
            return function
        values = [self._tasks.get(value, value) if callable(value) else value for value in function.args]
        return partial(self._tasks.get(function.func, function.func), *values, **function.keywords)


@dataclass(frozen=True)
class Faults:
    """The faults of the tiles of a run of `config`; the passes over style images are correct."""

    config: Config
    halo: bool
    whole_grams: bool

    def executor(self, workers: int) -> ThreadExecutor:
        """An executor whose tile tasks have these faults."""
        return OtherTasks(workers, {tile_tasks.gram_task: self.gram, tile_tasks.gradient_task: self.gradient})

    def gram(self, spec: tile_specs.GramSpec) -> dict[str, Gram]:
        """The Gram pass of one tile."""
        on_canvas = spec.array.startswith("canvas")
        return tile_tasks.gram_task(spec if self.halo or not on_canvas else _alone(self.config, spec))

    def gradient(self, spec: tile_specs.GradientSpec) -> tile_specs.GradientResult:
        """The gradient pass of one tile."""
        if not self.whole_grams:
            spec = replace(spec, style_seeds_CM=self._own_seeds(spec))
        if self.halo:
            return tile_tasks.gradient_task(spec)
        alone = _alone(self.config, spec)
        result = tile_tasks.gradient_task(alone)
        values = store.open_array(alone.stage_dir, GRADIENT).read_window(alone.tile.inner)
        return replace(result, sums=store.open_array(spec.stage_dir, GRADIENT).write_window(spec.tile.inner, values))

    def _own_seeds(self, spec: tile_specs.GradientSpec) -> dict[str, Gram]:
        """The seeds of a tile from its own Gram matrices only."""
        layers, inner, loss = tuple(spec.style_seeds_CM), spec.tile.inner, self.config.loss
        sums = self.gram(
            tile_specs.GramSpec(spec.stage_dir, spec.array, spec.tile, spec.network, spec.checksums, layers)
        )
        return {
            layer: objective.StyleTarget(
                loss.kind,
                metadata.read_gram(spec.stage_dir, layer, spec.checksums[gram_name(layer)]),
                positions((inner.height, inner.width), layer),
                self.config.network.style_layers[layer],
                inner.area * loss.style_weight,
            )
            .term(sums[layer])
            .seed_CM
            for layer in sums
        }


def _alone(config: Config, spec: Any) -> Any:
    """`spec` for the tile's inner rectangle as an image of its own, in a folder of its own."""
    inner, folder = spec.tile.inner, spec.stage_dir / f"alone_{spec.tile.index}"
    tile = Tile(spec.tile.index, Rect(0, inner.height, 0, inner.width), inner.height, inner.width)
    if not folder.exists():
        _make_alone(config, spec, tile)
    pixels = spec.open(spec.array).read_window(inner)
    store.open_array(folder, "canvas_0").write_window(tile.inner, pixels)
    return replace(spec, stage_dir=folder, array="canvas_0", tile=tile, checksums={})


def _make_alone(config: Config, spec: Any, tile: Tile) -> None:
    """Create the arrays that the passes use, and compute the features of this part of the content alone."""
    folder, layers = spec.stage_dir / f"alone_{tile.index}", tuple(config.network.content_layers)
    store.create_stage(folder)
    arrays = arrays_of(config, (tile.height, tile.width), layers_in_use(config, spec.network.source.widths), RGB8)
    for name in (CONTENT, "canvas_0", GRADIENT, *map(content_features_name, layers)):
        store.create_array(folder, name, arrays[name].shape, arrays[name].chunk_px, arrays[name].form, "none")
    pixels = store.open_array(spec.stage_dir, CONTENT).read_window(spec.tile.inner)
    store.open_array(folder, CONTENT).write_window(tile.inner, pixels)
    tile_tasks.content_task(tile_specs.ContentSpec(folder, CONTENT, tile, spec.network, {}, layers))
