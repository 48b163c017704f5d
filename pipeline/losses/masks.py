"""Guided losses: what the masks of regions.py mean at the positions of a layer.

    M_r,l(position) = mean of T_r over the stride×stride pixels of that position          n_r,l = Σ M_r,l
    G_r,l(p) = (1/n_r,l) · Σ M_r,l φ φ^T          Ls = Σ_r Σ_l λ_l · (n_r,l/n_l) · ‖G_r,l(p) − G_l(s_r)‖² / ‖G_l(s_r)‖²

The factor n_r,l/n_l, the region's share of the picture, makes the style's weight mean the same per pixel however small
a region is; one mask that is white everywhere is no mask. The content's squared differences are weighted by its map in
the same way. Axes in names: 1 batch, K guides, R regions, C channels, H rows, W columns.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.tiling import Rect
from pipeline.core.vgg_layers import Layer
from pipeline.store.guides import Guides


class GuideMaps:
    """The guides of a rectangle of the canvas: T_r of every region, and the content's weight, on a device."""

    def __init__(self, guides: Guides, pixels_HWK: NDArray[np.uint8], rect: Rect, like: Tensor):
        """`pixels_HWK`: of `guides.arrays` over `rect`, as read. `like`: a tensor of the device and dtype to have."""
        self._guides, self._rect = guides, rect
        maps_KHW = torch.from_numpy(pixels_HWK).to(like.device).permute(2, 0, 1).to(like.dtype) / 255
        masks_RHW = maps_KHW[: guides.masks]
        total_HW = masks_RHW.sum(0)
        shares = [masks_RHW / total_HW.clamp(min=1)]
        if guides.rest:
            shares.append((1 - total_HW).clamp(min=0)[None])
        self._shares_RHW = torch.cat(shares)
        self._content_1HW = maps_KHW[guides.masks :]

    def shares(self, layer: Layer, region: Rect) -> Tensor:
        """M_r,l of every region of the canvas at the positions `region` of a layer, (R, H, W)."""
        return self._at(self._shares_RHW, layer, region)

    def content_weight(self, layer: Layer, region: Rect) -> Tensor | None:
        """How much the content counts at these positions, (1, H, W); None where it is not guided."""
        return self._at(self._content_1HW, layer, region) if self._guides.content else None

    def _at(self, maps_KHW: Tensor, layer: Layer, region: Rect) -> Tensor:
        rows, columns = Rect(*(edge * layer.stride for edge in region)).within(self._rect)
        return F.avg_pool2d(maps_KHW[None, :, rows, columns], layer.stride)[0]
