"""The losses of the newest iteration tile by tile, in a file of the stage: a map for viewers, no state.

Content and total variation are sums over positions. A style loss compares the whole image, so a tile has no part of its
own. With D = dJ/dG and the Gram matrix G_t of a tile,

    J_t = J_s·n_t/N + (⟨D, G_t⟩ − n_t/N · ⟨D, G⟩) / 2

adds up to J_s, and is exact where the loss is a square of differences of Gram matrices. It says which tiles move the
image's statistics away from the style's; one that has them as the image should is below zero.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

from pipeline.render.measurements import GradientTotals
from pipeline.render.stage import Stage
from pipeline.store import TILE_LOSSES


def write_tile_losses(
    stage: Stage, iteration: int, totals: GradientTotals, scales: Mapping[str, float], style_loss: float
) -> None:
    """Replace the stage's map. `scales`: as of content_scales. A disk that refuses it stops no run."""
    path = stage.stage_dir / TILE_LOSSES
    partial = path.with_name(path.name + ".partial")
    text = json.dumps(tile_losses(stage, iteration, totals, scales, style_loss))
    with contextlib.suppress(OSError):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def tile_losses(
    stage: Stage, iteration: int, totals: GradientTotals, scales: Mapping[str, float], style_loss: float
) -> dict[str, Any]:
    """The map: per tile, row by row, the weighted losses as they would be if the whole image were like the tile."""
    loss, pixels, tiles = stage.config.loss, stage.plan.pixels, stage.tiles
    pulls = [pull / pixels for _, _, pull in totals.tiles]
    whole_pull = math.fsum(pulls)
    terms: dict[str, list[float]] = {"content": [], "style": [], "variation": []}
    for tile, (squares, variation, _), pull in zip(tiles, totals.tiles, pulls, strict=True):
        share = tile.inner.height * tile.inner.width / pixels
        content = math.fsum(scales[key] * square for key, square in squares.items())
        terms["content"].append(loss.content_weight * content / share)
        terms["style"].append(loss.style_weight * style_loss + (pull / share - whole_pull) / 2)
        terms["variation"].append(loss.tv_weight * variation / (3 * pixels) / share)
    return {"iteration": iteration, "tile_px": stage.tile_px, "terms": terms}
