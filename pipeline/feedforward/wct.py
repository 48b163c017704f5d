"""Whitening and colouring (Li et al. 2017): any style in one pass per level, without training, exact at any size.

    φ = encoder_l(image)        T φ = Σ_s^½ Σ_c^(−½) (φ − μ_c) + μ_s        image' = decoder_l(T φ)

for the levels 5 to 1, each on the image of the one before. Mean and covariance of content and style are sums over
all positions, the Gram pass of a run. T is a 1×1 convolution, and so part of the decoder's first one: reflection copies
positions, which a 1×1 convolution maps one by one. At odd sizes a pooling keeps the last half cell, where VGG drops
it, and the decoder's output is cut to the image. Axes in names: 1 batch, C channels, H rows, W columns, M = C + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.tiling import Rect, Size
from pipeline.feedforward import geometry
from pipeline.feedforward.spec import Conv
from pipeline.feedforward.wct_file import WctLevel
from pipeline.feedforward.windows import run_window
from pipeline.losses.objective import Gram, gram_sum
from pipeline.network.weights_file import load_tensors

# Directions in which the content varies less than this share of its largest variance are noise: they are left out.
_LEAST_VARIANCE = 1e-5


@dataclass(frozen=True)
class Transport:
    """T as matrix and bias: T φ = matrix·φ + bias."""

    matrix_CC: NDArray[np.float64]
    bias_C: NDArray[np.float64]


def transport(content_MM: Gram, style_MM: Gram, strength: float) -> Transport:
    """T from the Gram sums of content and style, mixed with the identity: 1 is T. Float64, on the CPU."""
    (mean, covariance), (style_mean, style_covariance) = _moments(content_MM), _moments(style_MM)
    whitening = _power(covariance, -0.5)
    matrix = strength * (_power(style_covariance, 0.5) @ whitening) + (1 - strength) * np.eye(len(mean))
    goal = strength * style_mean + (1 - strength) * mean
    return Transport(matrix, goal - matrix @ mean)


def _moments(gram_MM: Gram) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(μ, Σ) of features from the sum of φ̃φ̃ᵀ, φ̃ = (φ, 1)."""
    count = gram_MM[-1, -1]
    mean = gram_MM[:-1, -1] / count
    return mean, gram_MM[:-1, :-1] / count - np.outer(mean, mean)


def _power(covariance: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    """A symmetric power; directions without variance are left out of an inverse, and of a root."""
    variances, vectors = np.linalg.eigh(covariance)
    kept = variances > _LEAST_VARIANCE * max(float(variances[-1]), 1e-300)
    powers = np.where(kept, np.maximum(variances, 1e-300) ** exponent, 0.0)
    result: NDArray[np.float64] = (vectors * powers) @ vectors.T
    return result


class WctNetwork:
    """Encoder and decoder of one level on a device."""

    def __init__(self, state: Mapping[str, Tensor], level: WctLevel, dtype: torch.dtype, device: str) -> None:
        self.level = level
        self._state = {key: value.to(torch.float64) for key, value in state.items()}
        self._dtype, self._device = dtype, device

    def gram(self, window: geometry.Window, pixels_1CHW: Tensor) -> Gram:
        """The sum of φ̃φ̃ᵀ over the window, which ends with the encoder."""
        features = run_window(window, self._scaled(pixels_1CHW), lambda conv: self._parameters(conv, None))
        return gram_sum(features[0], with_mean=True)

    def output(self, window: geometry.Window, pixels_1CHW: Tensor, step: Transport) -> Tensor:
        """RGB 0..255 of the window, not clamped, (1, 3, H, W)."""
        return run_window(window, self._scaled(pixels_1CHW), lambda conv: self._parameters(conv, step)) * 255

    def _scaled(self, pixels_1CHW: Tensor) -> Tensor:
        return (pixels_1CHW / 255).to(self._dtype)

    def _parameters(self, conv: Conv, step: Transport | None) -> tuple[Tensor, Tensor, bool]:
        weight, bias = self._state[f"{conv.name}.weight"], self._state[f"{conv.name}.bias"]
        if conv == self.level.encoder[0]:
            stem = conv.name.replace("conv1_1", "input")
            before = self._state[f"{stem}.weight"][:, :, 0, 0], self._state[f"{stem}.bias"]
            weight, bias = _after(*before, weight, bias)
        elif conv == self.level.decoder[0] and step is not None:
            weight, bias = _after(torch.from_numpy(step.matrix_CC), torch.from_numpy(step.bias_C), weight, bias)
        weight = weight.to(self._device, self._dtype).contiguous(memory_format=torch.channels_last)
        return weight, bias.to(self._device, self._dtype), conv.has_relu


def _after(matrix_CC: Tensor, shift_C: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution of `matrix·x + shift` as one of x."""
    joined = torch.einsum("oikl,ij->ojkl", weight, matrix_CC)
    return joined, bias + torch.einsum("oikl,i->o", weight, shift_C)


def load_wct(path: Path, level: WctLevel, dtype: torch.dtype, device: str) -> WctNetwork:
    """One level of a file. Raises InputError if it cannot be read."""
    return WctNetwork(load_tensors(path), level, dtype, device)


def gram_window(level: WctLevel, size: Size, inner: Rect) -> geometry.Window | None:
    """The window of the encoder's positions that belong to a tile of an image of `size`; None where there are none."""
    wanted = geometry.owned(inner, size, geometry.grid_size(level, size, level.encoder))
    return geometry.window(level, size, level.encoder, wanted) if wanted.area else None
