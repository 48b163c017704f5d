"""A stage of a run: one image size of the coarse-to-fine rendering, with its plan, folder, tiles and objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import store
from pipeline.config import Config
from pipeline.core.events import Sink, in_order, reporter
from pipeline.core.tiling import Tile, grid
from pipeline.core.vgg_layers import LAYER_BY_NAME
from pipeline.executors import Executor
from pipeline.losses import objective
from pipeline.losses.color import LUMINANCE, ColorMap
from pipeline.losses.color_space import DECORRELATED, Basis
from pipeline.losses.objective import Gram
from pipeline.network import NetworkSpec
from pipeline.plan import LayerUse, StagePlan
from pipeline.render import mask_tasks, tile_specs, tile_tasks
from pipeline.store import (
    ALPHA,
    GRADIENT,
    METADATA,
    UNGUIDED,
    Guides,
    content_features_name,
    gram_name,
    integrity,
    is_averaged,
    layer_of,
    metadata,
    scale_of,
    slot_names,
)


@dataclass
class Stage:
    """A stage of a run: its plan, its folder in the store, and what its passes need."""

    config: Config
    plan: StagePlan
    layer_use: LayerUse
    network: NetworkSpec
    stage_dir: Path
    executor: Executor
    sink: Sink
    tile_px: int

    @property
    def partial_dir(self) -> Path:
        """The folder in which the stage is prepared; it is renamed to `stage_dir` when it is complete."""
        return self.stage_dir.with_name(self.stage_dir.name + ".partial")

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """The tiles of the canvas."""
        return grid(*self.plan.size, self.tile_px)

    @property
    def color(self) -> ColorMap | None:
        """The colour map applied to canvas and content before the network; None: their pixels as they are."""
        return LUMINANCE if self.config.color == "luminance" else None

    @property
    def basis(self) -> Basis | None:
        """M of the optimiser's colour coordinates; None: RGB."""
        # with luminance the canvas moves along greys, which is one coordinate already
        decorrelated = self.config.optimizer.color_space == "decorrelated" and self.color is None
        return DECORRELATED if decorrelated else None

    def check(self, slot: int, checksums: Mapping[str, str]) -> None:
        """Raise ChunkError if an array that the stage still reads is damaged, or one that it writes is missing."""
        for name in checksums:
            if name.endswith(METADATA):
                metadata.check_metadata(self.stage_dir, name, checksums[name])
        for key in self.layer_use.style_keys:
            metadata.read_gram(self.stage_dir, key, checksums[gram_name(key)])
        features = map(content_features_name, self.layer_use.content_widths)
        newest, idle = (slot_names(number, averaged=is_averaged(checksums)) for number in (slot, 1 - slot))
        # only the export reads it: damage is better reported a day earlier
        alpha = [ALPHA] if ALPHA in checksums else []
        names = (*newest, *features, *self.layer_use.guides.arrays, *alpha)
        arrays = [store.open_array(self.stage_dir, name, checksums[name]) for name in names]
        # without checksums: their content is unused, but their chunks must exist to be overwritten in place
        arrays += [store.open_array(self.stage_dir, name) for name in (*idle, GRADIENT)]
        integrity.require_intact(arrays, self.executor, self.reporter("check"))

    def canvas_grams(self, canvas: str, checksums: Mapping[str, str]) -> list[tile_specs.GramSpec]:
        """The tasks of the Gram pass over a canvas."""
        # the content mask has no effect on Gram matrices
        guides = self.layer_use.guides if self.layer_use.guides.regions else UNGUIDED
        return self.gram_specs(self.stage_dir, canvas, self.tiles, checksums, self.color, guides)

    def gram_specs(
        self,
        folder: Path,
        array: str,
        tiles: Sequence[Tile],
        checksums: Mapping[str, str],
        color: ColorMap | None,
        guides: Guides,
    ) -> list[tile_specs.GramSpec]:
        """The tasks of the Gram pass over an image of the stage, or one that it is prepared from."""
        return [
            tile_specs.GramSpec(
                folder,
                array,
                tile,
                self.network,
                checksums,
                self.layer_use.style_layers,
                color=color,
                guides=guides,
                with_mean=self.layer_use.with_mean,
                scales=self.layer_use.scales,
            )
            for tile in tiles
        ]

    def gram_sums(self, specs: Sequence[tile_specs.GramSpec], what: str) -> dict[str, Gram]:
        """Gram pass over one image: gram_sum by style key, summed in tile order."""
        initial: dict[str, Gram] = {}
        counter = self.counter(what, len(specs))
        return self.executor.fold(tile_tasks.gram_task, specs, tile_tasks.add_grams, initial, counter)

    def mask_areas(
        self, folder: Path, tiles: Sequence[Tile], guides: Guides, checksums: Mapping[str, str]
    ) -> dict[str, float]:
        """The areas n_r,l of masks in `folder`, by style key. `checksums`: of the arrays of the masks."""
        use = self.layer_use
        specs = [mask_tasks.AreaSpec(folder, tile, guides, use.style_layers, checksums, use.scales) for tile in tiles]
        parts = self.executor.map(mask_tasks.area_task, specs)
        # fsum rounds once, so that the areas do not depend on the tiles
        keys = [key for layer in use.style_layer_keys for key in guides.keys(layer)]
        return {key: math.fsum(part.get(key, 0.0) for part in parts) for key in keys}

    def reporter(self, what: str) -> Callable[[int, int], None]:
        """Reports (done, total) of `what` to the sink."""
        return reporter(self.sink, self.plan.index, what)

    def counter(self, what: str, total: int) -> Callable[[], None]:
        """Reports, at every call, that one more of `total` is done; to be called from any thread."""
        return in_order(self.reporter(what), total)


def positions(size: tuple[int, int], key: str) -> int:
    """n_l: positions at a layer key or style key of an image of this (height, width)."""
    stride, scale = LAYER_BY_NAME[layer_of(key)].stride, scale_of(key)
    return ((size[0] >> scale) // stride) * ((size[1] >> scale) // stride)


def style_targets(
    stage: Stage, areas: Mapping[str, float], checksums: Mapping[str, str], known_grams: Mapping[str, tuple[Gram, Gram]]
) -> dict[str, objective.StyleTarget]:
    """By style key; without those of regions that have no position at a layer. `areas`: n_r,l of each."""
    targets = {}
    for key in stage.layer_use.style_keys:
        whole = positions(stage.plan.size, key)
        # at deep layers a small mask region may have no position: it has no term there
        if (area := areas.get(key, whole)) > 0:
            targets[key] = objective.StyleTarget(
                stage.config.loss.kind,
                metadata.read_gram(stage.stage_dir, key, checksums[gram_name(key)]),
                area,
                stage.config.network.style_layers[layer_of(key)] / stage.layer_use.scales,
                stage.plan.pixels * stage.config.loss.style_weight,
                area / whole,
                known_grams.get(key),
            )
    return targets


def content_scales(stage: Stage, energies: Mapping[str, float]) -> dict[str, float]:
    """By layer key: what Σ(φ_l(p) − φ_l(o))² is multiplied by. `energies`: ‖φ_l(o)‖² of each."""
    return {
        key: objective.content_scale(
            stage.config.loss.kind,
            energies[key],
            width,
            positions(stage.plan.size, key),
            stage.config.network.content_layers[layer_of(key)] / stage.layer_use.scales,
        )
        for key, width in stage.layer_use.content_widths.items()
    }
