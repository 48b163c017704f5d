"""Windows through an image transformation network, exact at any size: statistics of norms, and output pixels.

A norm is a scale and a shift of each channel once its statistics are known, so that it is part of the convolution
before it. Axes in names: 1 batch, C channels, H rows, W columns, S styles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.tiling import Rect
from pipeline.feedforward.geometry import Window
from pipeline.feedforward.network import NORM_EPS, enlarged, to_network, to_pixels
from pipeline.feedforward.network_file import TransformFile
from pipeline.feedforward.spec import Conv
from pipeline.feedforward.windows import run_window


@dataclass(frozen=True)
class Moments:
    """Sums over positions, by channel, in float64: Σx and Σx², and how many positions."""

    count: int
    sum_C: NDArray[np.float64]
    squares_C: NDArray[np.float64]

    def plus(self, other: Moments) -> Moments:
        """The sums over both."""
        return Moments(self.count + other.count, self.sum_C + other.sum_C, self.squares_C + other.squares_C)

    @property
    def is_finite(self) -> bool:
        """Whether no feature was infinite or not a number."""
        return bool(np.isfinite(self.sum_C).all() and np.isfinite(self.squares_C).all())

    def statistics(self) -> Statistics:
        """Mean and variance."""
        mean_C = self.sum_C / self.count
        return Statistics(mean_C.tolist(), np.maximum(self.squares_C / self.count - mean_C**2, 0).tolist())


@dataclass(frozen=True)
class Statistics:
    """Mean and variance of each channel before a norm, over all positions of an image."""

    mean_C: Sequence[float]
    variance_C: Sequence[float]


class TiledNetwork:
    """A network's weights on a device. `style_S`: the share of each of its styles."""

    def __init__(self, file: TransformFile, style_S: Sequence[float], dtype: torch.dtype, device: str) -> None:
        self.spec = file.spec
        self._state = {key: value.to(torch.float64) for key, value in file.state.items()}
        self._style_S = torch.tensor(style_S, dtype=torch.float64)
        self._dtype, self._device = dtype, device

    def input(self, pixels_1CHW: Tensor) -> Tensor:
        """Pixels 0..255 as the first layer takes them."""
        # scaled before it is converted: pixels 0..255 do not fit into a bfloat16 mantissa
        return to_network(pixels_1CHW, self.spec).to(self._dtype)

    def normed(
        self, conv: Conv, raw_1CHW: Tensor, skip_1CHW: Tensor | None, statistics: Mapping[str, Statistics]
    ) -> Tensor:
        """The map whose values before the norm of `conv` are `raw_1CHW`, which is overwritten, plus the skip."""
        gamma, beta, mean, variance = self._norm(conv, statistics)
        factor = gamma / torch.sqrt(variance + NORM_EPS)
        scale, shift = (values.to(raw_1CHW)[:, None, None] for values in (factor, beta - mean * factor))
        x = raw_1CHW.mul_(scale).add_(shift)
        if conv.has_relu:
            x = F.relu_(x)
        return (x if skip_1CHW is None else x.add_(skip_1CHW)).to(self._dtype)

    def output(
        self, window: Window, x_1CHW: Tensor, statistics: Mapping[str, Statistics], skip_1CHW: Tensor | None = None
    ) -> Tensor:
        """RGB 0..255 of the window, not clamped, (1, 3, H, W). `x_1CHW`: `window.pixels` of `input`, or of `normed`.

        `skip_1CHW`: see `enlarged_part`; used by a network with a skip alone.
        """
        y_1CHW = self._run(window, x_1CHW, statistics, None)
        return to_pixels(y_1CHW, self.spec, None if self.spec.skip == "none" else skip_1CHW)

    def before_norm(self, window: Window, x_1CHW: Tensor, statistics: Mapping[str, Statistics], conv: Conv) -> Tensor:
        """The map before the norm of `conv`, with which the window ends. `statistics`: of the norms before."""
        return self._run(window, x_1CHW, statistics, conv)

    def _run(self, window: Window, x_1CHW: Tensor, statistics: Mapping[str, Statistics], raw: Conv | None) -> Tensor:
        """The output of the window's last layer; of `raw` without norm and ReLU."""

        def parameters(conv: Conv) -> tuple[Tensor, Tensor, bool]:
            weight, bias = self._parameters(conv, None if conv == raw else statistics)
            return weight, bias, conv.has_relu and conv != raw

        return run_window(window, x_1CHW, parameters)

    def _parameters(self, conv: Conv, statistics: Mapping[str, Statistics] | None) -> tuple[Tensor, Tensor]:
        """Weight and bias, with the norm in them; computed in float64."""
        stem = f"layers.{conv.name}"
        weight, bias = self._state[f"{stem}.conv.weight"], self._state[f"{stem}.conv.bias"]
        if statistics is not None and conv.has_norm and self.spec.norm != "none":
            gamma, beta, mean, variance = self._norm(conv, statistics)
            factor = gamma / torch.sqrt(variance + NORM_EPS)
            weight, bias = weight * factor[:, None, None, None], (bias - mean) * factor + beta
        weight = weight.to(self._device, self._dtype).contiguous(memory_format=torch.channels_last)
        return weight, bias.to(self._device, self._dtype)

    def _norm(self, conv: Conv, statistics: Mapping[str, Statistics]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale, shift, mean and variance of a norm."""
        stem = f"layers.{conv.name}.norm"
        weight, bias = self._state[f"{stem}.weight"], self._state[f"{stem}.bias"]
        if self.spec.norm == "batch":
            return weight, bias, self._state[f"{stem}.running_mean"], self._state[f"{stem}.running_var"]
        own = statistics[conv.name]
        mean, variance = (torch.tensor(values, dtype=torch.float64) for values in (own.mean_C, own.variance_C))
        return self._style_S @ weight, self._style_S @ bias, mean, variance


def enlarged_part(pixels_1CHW: Tensor, read: Rect, wanted: Rect, factor: int) -> Tensor:
    """`wanted` of an image's bicubic enlargement, of which `pixels_1CHW` are `read`: see geometry.enlarged_from."""
    rows, columns = wanted.within(Rect(*(edge * factor for edge in read)))
    return enlarged(pixels_1CHW, factor)[:, :, rows, columns]


def moments_of(x_1CHW: Tensor) -> Moments:
    """The sums of a map. Channel by channel: a float64 copy of all channels would be larger than the map."""
    sums, squares = [], []
    for x_HW in x_1CHW[0]:
        x = x_HW.to(torch.float64)
        sums.append(float(x.sum()))
        squares.append(float((x * x).sum()))
    return Moments(x_1CHW.shape[2] * x_1CHW.shape[3], np.array(sums), np.array(squares))
