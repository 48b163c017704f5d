"""An image transformation network as a torch module, for training and for whole images.

The tiled pass (tiled.py) runs the same layers over windows, with the same paddings. Axes in names: 1 or B batch,
C channels, H rows, W columns, S styles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.feedforward.spec import Conv, Padding, Residual, TransformSpec, Upsampling

NORM_EPS = 1e-5  # of torch's norms, and of pytorch/examples
# What 1 in the output of a network with a skip is worth: in levels of 127.5 Adam's first steps would be far too long.
SKIP_LEVELS = 16.0


class TransformNetwork(nn.Module):
    """RGB 0..255 in, RGB 0..255 out, not clamped. Weights are torch's default initialisation."""

    def __init__(self, spec: TransformSpec) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleDict()
        for layer in spec.layers:
            if isinstance(layer, Residual):
                name = layer.convs[0].name.partition(".")[0]
                self.layers[name] = ResidualModule(layer, spec)
            else:
                self.layers[layer.name] = ConvModule(layer, spec)

    def forward(self, image_BCHW: Tensor, style_BS: Tensor | None = None) -> Tensor:
        """The transformed images, `factor` times as large.

        `style_BS`: the share of each style, for each image or (1, S) for all; None: the first style.
        """
        height, width = (side * self.spec.factor for side in image_BCHW.shape[2:])
        skip_BCHW = enlarged(image_BCHW, self.spec.factor) if self.spec.skip == "bicubic" else None
        x = padded(to_network(image_BCHW, self.spec), self.spec.start_padding_px, "reflect")
        if style_BS is None:
            style_BS = F.one_hot(torch.zeros(1, dtype=torch.int64), len(self.spec.styles)).to(x)
        for layer in self.layers.values():
            x = layer(x, style_BS)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16, of autocast, has no levels above 128
        # strides of 2 round sizes up: the map may be larger than the image
        return to_pixels(x[:, :, :height, :width], self.spec, skip_BCHW)


def to_network(image_BCHW: Tensor, spec: TransformSpec) -> Tensor:
    """RGB 0..255 as the numbers that the network was trained with."""
    return image_BCHW / 127.5 - 1 if spec.pixels == "unit" else image_BCHW


def enlarged(image_BCHW: Tensor, factor: int) -> Tensor:
    """The bicubic enlargement of an image; beyond its border are the pixels at the border."""
    return F.interpolate(image_BCHW, scale_factor=factor, mode="bicubic", align_corners=False)


def to_pixels(x_BCHW: Tensor, spec: TransformSpec, skip_BCHW: Tensor | None = None) -> Tensor:
    """The network's output as RGB 0..255, not clamped. `skip_BCHW`: what it is added to, of a spec with a skip."""
    if skip_BCHW is not None:
        return skip_BCHW + SKIP_LEVELS * x_BCHW
    if spec.output == "tanh":
        return 127.5 + 127.5 * torch.tanh(x_BCHW)
    return 127.5 + 127.5 * x_BCHW if spec.pixels == "unit" else x_BCHW


class ConvModule(nn.Module):
    """A layer of the table: enlargement, padding, convolution, norm, ReLU."""

    def __init__(self, layer: Conv, spec: TransformSpec) -> None:
        super().__init__()
        self.layer = layer
        self.conv = nn.Conv2d(layer.channels_in, layer.channels_out, layer.kernel, layer.stride)
        self.norm: StyleNorm | nn.BatchNorm2d | None = None
        if layer.has_norm and spec.norm == "batch":
            self.norm = nn.BatchNorm2d(layer.channels_out, NORM_EPS)
        elif layer.has_norm and spec.norm == "instance":
            self.norm = StyleNorm(layer.channels_out, len(spec.styles))

    def forward(self, x_BCHW: Tensor, style_BS: Tensor) -> Tensor:
        """The layer's output."""
        x = padded(upsampled(x_BCHW, self.layer.upsampling), self.layer.padding_px, self.layer.padding)
        x = self.conv(x)
        if isinstance(self.norm, StyleNorm):
            x = self.norm(x, style_BS)
        elif self.norm is not None:
            x = self.norm(x)
        return F.relu(x) if self.layer.has_relu else x


class ResidualModule(nn.Module):
    """A residual block."""

    def __init__(self, layer: Residual, spec: TransformSpec) -> None:
        super().__init__()
        self.conv1, self.conv2 = (ConvModule(conv, spec) for conv in layer.convs)
        self.margin = sum(conv.kernel // 2 - conv.padding_px for conv in layer.convs)

    def forward(self, x_BCHW: Tensor, style_BS: Tensor) -> Tensor:
        """The block's output; without padding its input is cut to that size."""
        height, width = (side - 2 * self.margin for side in x_BCHW.shape[2:])
        kept = x_BCHW[:, :, self.margin : self.margin + height, self.margin : self.margin + width]
        added: Tensor = self.conv2(self.conv1(x_BCHW, style_BS), style_BS)
        return kept + added


class StyleNorm(nn.Module):
    """Instance norm, whose scale and shift are those of a style (Dumoulin et al. 2017), or a mix of several."""

    def __init__(self, channels: int, styles: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(styles, channels))
        self.bias = nn.Parameter(torch.zeros(styles, channels))

    def forward(self, x_BCHW: Tensor, style_BS: Tensor) -> Tensor:
        """Mean and variance over the positions of each image."""
        normal = F.instance_norm(x_BCHW, eps=NORM_EPS)
        weight, bias = (style_BS @ table for table in (self.weight, self.bias))
        return normal * weight[:, :, None, None] + bias[:, :, None, None]


def upsampled(x_BCHW: Tensor, kind: Upsampling) -> Tensor:
    """×2: each position four times, or followed by zeros."""
    if kind == "none":
        return x_BCHW
    if kind == "nearest":
        return F.interpolate(x_BCHW, scale_factor=2, mode="nearest")
    batch, channels, height, width = x_BCHW.shape
    out = x_BCHW.new_zeros(batch, channels, 2 * height, 2 * width)
    out[:, :, ::2, ::2] = x_BCHW
    return out


def padded(x_BCHW: Tensor, by: int, kind: Padding) -> Tensor:
    """Padded on all four sides. By concatenation: torch's reflection has no deterministic gradient on CUDA."""
    if by == 0:
        return x_BCHW
    if kind == "zeros":
        return F.pad(x_BCHW, (by, by, by, by))
    for axis in (2, 3):
        size = x_BCHW.shape[axis]
        before = x_BCHW.narrow(axis, 1, by).flip(axis)
        after = x_BCHW.narrow(axis, size - 1 - by, by).flip(axis)
        x_BCHW = torch.cat([before, x_BCHW, after], axis)
    return x_BCHW
