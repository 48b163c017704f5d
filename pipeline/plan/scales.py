"""How many scales of `loss.scales` a stage uses (algorithm.md, "Several scales at once")."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import Config
from pipeline.core.tiling import Size
from pipeline.core.vgg_layers import min_side_px
from pipeline.plan.network_cost import LayerUse


def scales_in_use(config: Config, layer_use: LayerUse, first_px: int, canvas: Size, styles: Sequence[Size]) -> int:
    """The scales that a stage is large enough for: none is smaller than the first stage, or lacks a layer.

    `first_px`: the long side of the first stage.
    """
    padding, scales = config.network.padding, 1
    while scales < config.loss.scales and max(canvas) >= first_px << scales:
        scales += 1
    scales = fitting_scales(scales, canvas, layer_use.names, padding)
    for style in styles:
        scales = fitting_scales(scales, style, layer_use.style_layers, padding)
    return scales


def fitting_scales(scales: int, size: Size, layers: Sequence[str], padding: str) -> int:
    """The first of `scales` at which an image of this size has a position at every layer; at least one."""
    while scales > 1 and layers and min(size) >> scales - 1 < min_side_px(layers, padding):
        scales -= 1
    return scales
