"""Guided losses: the masks of regions (config/regions.py) at the positions of a layer.

    M_r,l(position) = mean of T_r over the stride×stride pixels of that position          n_r,l = Σ M_r,l
    G_r,l(p) = (1/n_r,l) · Σ M_r,l φ φ^T          Ls = Σ_r Σ_l λ_l · (n_r,l/n_l) · ‖G_r,l(p) − G_l(s_r)‖² / ‖G_l(s_r)‖²

T_r is the share of region r in a pixel. The factor n_r,l/n_l, the region's share of the image, makes the style weight
mean the same per pixel whatever the size of a region; a single mask that is white everywhere equals no mask. The
squared differences of the content are weighted by the content mask in the same way. Axes in names: 1 batch, K masks,
R regions, C channels, H rows, W columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.tiling import Rect
from pipeline.core.vgg_layers import Layer
from pipeline.store import Guides


class GuideMaps:
    """T_r of every region and the weight of the content, in one rectangle of the canvas, on a device."""

    def __init__(self, guides: Guides, pixels_HWK: NDArray[Any], rect: Rect, like: Tensor):
        """`pixels_HWK`: `guides.arrays` over `rect`, 0..255. `like`: a tensor of the target device and dtype.

        At a coarser scale both are of the canvas shrunk to it.
        """
        self._guides, self._rect = guides, rect
        maps_KHW = torch.from_numpy(pixels_HWK).to(like.device).permute(2, 0, 1).to(like.dtype) / 255
        masks_RHW = maps_KHW[: guides.masks]
        total_HW = masks_RHW.sum(0)
        shares = [masks_RHW / total_HW.clamp(min=1)]  # where masks overlap, each style gets its part of the pixel
        if guides.rest:
            shares.append((1 - total_HW).clamp(min=0)[None])
        self._shares_RHW = torch.cat(shares)
        self._content_1HW = maps_KHW[guides.masks :]

    def shares(self, layer: Layer, region: Rect) -> Tensor:
        """M_r,l of every region r at the positions `region` of a layer, (R, H, W)."""
        return self._at(self._shares_RHW, layer, region)

    def content_weight(self, layer: Layer, region: Rect) -> Tensor | None:
        """The weight of the content at these positions, (1, H, W); None without a content mask."""
        return self._at(self._content_1HW, layer, region) if self._guides.content else None

    def _at(self, maps_KHW: Tensor, layer: Layer, region: Rect) -> Tensor:
        rows, columns = Rect(*(edge * layer.stride for edge in region)).within(self._rect)
        return F.avg_pool2d(maps_KHW[None, :, rows, columns], layer.stride)[0]
