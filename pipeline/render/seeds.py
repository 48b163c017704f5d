"""The seeds of a tile: the derivatives of J at the layers, from which the gradient is back-propagated.

Axes in names: 1 batch, C channels, H rows, W columns, R regions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.core.tiling import Rect
from pipeline.losses import objective
from pipeline.losses.masks import GuideMaps
from pipeline.losses.objective import Gram
from pipeline.network.vgg import FeatureMap
from pipeline.render.tile_specs import SeedSpec, Window

_PULL_ROWS = 16


@dataclass
class Seeds:
    """dJ/dφ of a tile at one scale, layer by layer, at all positions.

    `of` is called once per layer and frees the layer's content.

    `maps`: the masks, None without. `squares`: Σ(φ(p) − φ(o))² over the inner positions, of the content layers so far.
    `style_pulls`: of the style terms so far, ⟨dJ/dG, G of the inner positions⟩, estimated from a few rows.
    """

    spec: SeedSpec
    window: Window
    style_CM: dict[str, Gram]
    content: dict[str, tuple[Tensor, Rect]]
    maps: GuideMaps | None = None
    squares: dict[str, Tensor] = field(default_factory=dict)
    style_pulls: list[Tensor] = field(default_factory=list)

    def of(self, feature_map: FeatureMap) -> Tensor | None:
        """dJ/dφ, of the shape of the features; None for a layer that J does not use."""
        key, features_1CHW = self.window.key(feature_map.layer), feature_map.features_1CHW
        style = self._style(feature_map)
        if key not in self.content:
            return style
        target_1CHW, region = self.content.pop(key)
        rows, columns = feature_map.region.within(region)
        # subtract in the precision of the store: in bfloat16 the difference of nearly equal numbers would be lost
        difference = features_1CHW - target_1CHW[:, :, rows, columns]
        weight_1HW = None if self.maps is None else self.maps.content_weight(feature_map.layer, feature_map.region)
        rows, columns = self.window.tile.inner.positions(feature_map.layer).within(feature_map.region)
        inner_weight_1HW = None if weight_1HW is None else weight_1HW[:, rows, columns]
        self.squares[key] = objective.squares(difference[0, :, rows, columns], inner_weight_1HW)
        if weight_1HW is not None:
            difference *= weight_1HW
        content = (self.spec.content_factors[key] * difference).to(features_1CHW)
        return content if style is None else style + content

    def _style(self, feature_map: FeatureMap) -> Tensor | None:
        """d(N·w_s·Ls)/dφ at all positions of a layer, summed over the mask regions; None for a layer without style."""
        features_1CHW, guides, total = feature_map.features_1CHW, self.spec.guides, None
        guided = self.maps if guides.regions > 0 else None
        shares_RHW = None if guided is None else guided.shares(feature_map.layer, feature_map.region).to(features_1CHW)
        for region, key in enumerate(guides.keys(self.window.key(feature_map.layer))):
            if key in self.style_CM:
                seed_1CHW = objective.style_seed(features_1CHW, self.style_CM[key])
                if shares_RHW is not None:
                    seed_1CHW *= shares_RHW[region]
                self.style_pulls.append(self._pull(feature_map, seed_1CHW, self.style_CM[key]))
                total = seed_1CHW if total is None else total.add_(seed_1CHW)
        return total

    def _pull(self, feature_map: FeatureMap, seed_1CHW: Tensor, seed_CM: Gram) -> Tensor:
        """⟨dJ/dG, G of the inner positions⟩ of one style term, for the map of the losses (tile_losses.py)."""
        rows, columns = self.window.tile.inner.positions(feature_map.layer).within(feature_map.region)
        # a few rows are enough for a map, and all would take a hundredth of the pass
        chosen = slice(rows.start, rows.stop, max(1, (rows.stop - rows.start) // _PULL_ROWS))
        features_CHW = feature_map.features_1CHW[0, :, chosen, columns]
        count = max(1, features_CHW.shape[1])
        factor_CHW = seed_1CHW[0, :, chosen, columns]
        if seed_CM.shape[1] > len(features_CHW):  # dJ/dφ has the term of the mean once, ⟨dJ/dG, G⟩ twice
            factor_CHW = factor_CHW + torch.from_numpy(seed_CM[:, -1]).to(features_CHW)[:, None, None]
        total: Tensor = (features_CHW * factor_CHW).sum(dtype=torch.float64) * (rows.stop - rows.start)
        return total / (2 * count)
