"""Estimates of the whole image's Gram matrices and feature energies, used when only a crop is rendered.

The last finished stage compares the whole with the region, per style term (formulas in crop.py). With masks, a Gram is
the mask-weighted mean of losses/masks.py over the whole image or over the region. The masks are those of the stage to
come, at the size of the finished one, whose own masks may have been others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline import store
from pipeline.core.text import stage_name
from pipeline.core.tiling import Rect, Size, Tile
from pipeline.core.vgg_layers import LAYER_BY_NAME
from pipeline.losses.objective import Gram
from pipeline.plan import fitting_scales
from pipeline.render.preparation import ingest_guides
from pipeline.render.resample import tiles_of
from pipeline.render.stage import Stage
from pipeline.store import UNGUIDED, Guides, layer_of, scale_of


@dataclass(frozen=True)
class WholeImageEstimate:
    """`grams`: (G_whole, G_region) by style key. `energies`: E_whole/E_region per position, by layer key.

    A key without an estimate is left out: its mask is black in the region or everywhere, or the finished stage is too
    small for its scale.
    """

    grams: Mapping[str, tuple[Gram, Gram]]
    energies: Mapping[str, float]


@dataclass(frozen=True)
class _Guided:
    """The style masks at the size of the finished stage: their folder, and their arrays' checksums."""

    folder: Path
    guides: Guides = UNGUIDED
    checksums: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WholeImage:
    """The finished stage `index`: its canvas, and the content at its size. `folder`: for the masks at that size."""

    index: int
    canvas: store.StageArray
    content: store.StageArray | None
    tile_px: int
    folder: Path

    @property
    def size(self) -> Size:
        """(height, width) in px."""
        return self.canvas.shape[:2]

    def estimate(self, stage: Stage, region: Rect) -> WholeImageEstimate:
        """What the whole image's mean Grams and energies are estimated from, beside a region's own.

        `stage`: the stage to come, with the masks of the whole image. `region`: in px of the finished stage. Raises
        InputError for a broken mask.
        """
        whole = Rect(0, self.size[0], 0, self.size[1])
        scales, padding = stage.layer_use.scales, stage.config.network.padding
        scales = fitting_scales(scales, self.size, stage.layer_use.names, padding)
        stage = replace(stage, layer_use=replace(stage.layer_use, scales=scales))
        guided = self._guided(stage)
        of_whole, of_region = (self._mean_grams(stage, self.canvas, rect, guided) for rect in (whole, region))
        # a region that is the whole needs no estimate, and has none of its rounding
        keys = of_region.keys() & of_whole.keys() if region != whole else ()
        grams = {key: (of_whole[key], of_region[key]) for key in keys}
        if self.content is None:
            return WholeImageEstimate(grams, {})
        # The energy per position is the trace of the mean Gram. The content's weight map is not part of it.
        layers, guided = stage.layer_use.content_layers, _Guided(self.folder)
        stage = replace(stage, layer_use=replace(stage.layer_use, style_layers=layers, with_mean=False))
        of_whole, of_region = (self._mean_grams(stage, self.content, rect, guided) for rect in (whole, region))
        return WholeImageEstimate(
            grams, {key: _ratio(of_whole[key].trace(), of_region[key].trace()) for key in of_region}
        )

    def _guided(self, stage: Stage) -> _Guided:
        """Create the masks of the stage's styles."""
        guides = replace(stage.layer_use.guides, content=False)
        store.create_stage(self.folder)
        for name in guides.arrays:
            store.create_array(self.folder, name, (*self.size, 1), stage.config.store.chunk_px, "uint8", "none")
        return _Guided(self.folder, guides, ingest_guides(stage, self.folder, guides.arrays))

    def _mean_grams(self, stage: Stage, array: store.StageArray, rect: Rect, guided: _Guided) -> dict[str, Gram]:
        """Mean Grams over a rectangle, read with its halo, by style key; masks without area are left out."""
        if not stage.layer_use.style_layers:
            return {}
        tiles = [Tile(index, inner, *self.size) for index, inner in enumerate(tiles_of(rect, self.tile_px))]
        folder, name = array.path.parent, array.path.name
        specs = stage.gram_specs(folder, name, tiles, guided.checksums, stage.color, guided.guides)
        specs = [replace(spec, guides_dir=guided.folder) for spec in specs]
        sums = stage.gram_sums(specs, f"Gram pass of {stage_name(self.index)}")
        areas = _areas(stage, tiles, guided)
        return {key: total / areas[key] for key, total in sums.items() if areas[key] > 0}


def _areas(stage: Stage, tiles: list[Tile], guided: _Guided) -> dict[str, float]:
    """Number of positions by style key; with masks, the sums of their weights."""
    if guided.guides.regions:
        return stage.mask_areas(guided.folder, tiles, guided.guides, guided.checksums)
    return {
        key: float(sum(tile.inner.shrunk(scale_of(key)).positions(LAYER_BY_NAME[layer_of(key)]).area for tile in tiles))
        for key in stage.layer_use.style_layer_keys
    }


def _ratio(whole_energy: float, part_energy: float) -> float:
    # Without energy in the region there is no estimate, and 1 leaves the region's own.
    return whole_energy / part_energy if part_energy > 0 else 1.0
