"""algorithm.md once more, whole images and plain torch only: what the tiles are measured against.

Nothing here imports the program. The layer table is typed out, the padding is torch's own, the gradient is autograd's.
Axes in names: H rows, W columns, C channels, n positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TOPOLOGY = [
    *["conv1_1", "conv1_2", "pool"],
    *["conv2_1", "conv2_2", "pool"],
    *["conv3_1", "conv3_2", "conv3_3", "conv3_4", "pool"],
    *["conv4_1", "conv4_2", "conv4_3", "conv4_4", "pool"],
    "conv5_1",
]
CONVS = [name for name in TOPOLOGY if name != "pool"]
# features.N of torchvision.models.vgg19, N of each convolution
TORCHVISION_INDICES = [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28]
STRIDES = {name: 2 ** (int(name[4]) - 1) for name in CONVS}
_MODES = {"zeros": "constant", "replicate": "replicate", "reflect": "reflect"}


def narrow_state(widths: Sequence[int] = (4, 8, 8, 8, 8), seed: int = 0, last: str = "conv5_1") -> dict[str, Tensor]:
    """A small network under our names: `widths` per block, He-normal weights, biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    channels = 3
    for name in CONVS[: CONVS.index(last) + 1]:
        width = widths[int(name[4]) - 1]
        state[f"{name}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
        state[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.2
        channels = width
    return state


def torchvision_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under torchvision's keys."""
    indices = dict(zip(CONVS, TORCHVISION_INDICES, strict=True))
    return {f"features.{indices[key.split('.')[0]]}.{key.split('.')[1]}": value for key, value in state.items()}


def features(state: Mapping[str, Tensor], image_HWC: Tensor, padding: str, pooling: str) -> dict[str, Tensor]:
    """(C, H, W) after ReLU of every convolution that the image is large enough for."""
    x = image_HWC.permute(2, 0, 1)[None] / 255
    if "input.weight" in state:
        x = F.conv2d(x, state["input.weight"].to(x), state["input.bias"].to(x))
    else:
        mean = torch.tensor([0.485, 0.456, 0.406], dtype=x.dtype)[None, :, None, None]
        std = torch.tensor([0.229, 0.224, 0.225], dtype=x.dtype)[None, :, None, None]
        x = (x - mean) / std
    found: dict[str, Tensor] = {}
    for name in TOPOLOGY:
        if name == "pool":
            if min(x.shape[2:]) < 2:
                break
            x = F.max_pool2d(x, 2) if pooling == "max" else F.avg_pool2d(x, 2)
            continue
        if f"{name}.weight" not in state or (padding == "reflect" and min(x.shape[2:]) < 2):
            break
        x = F.pad(x, (1, 1, 1, 1), mode=_MODES[padding])
        x = F.relu(F.conv2d(x, state[f"{name}.weight"].to(x), state[f"{name}.bias"].to(x)))
        found[name] = x[0]
    return found


def gram(features_CHW: Tensor) -> Tensor:
    """Mean Gram matrix, (C, C)."""
    features_Cn = features_CHW.flatten(1)
    return features_Cn @ features_Cn.T / features_Cn.shape[1]


@dataclass(frozen=True)
class Problem:
    """Everything that J depends on but the canvas. Images are (H, W, 3) float64 arrays of 0..255."""

    state: Mapping[str, Tensor]
    content: np.ndarray
    styles: Sequence[tuple[np.ndarray, float]]
    content_layers: Mapping[str, float]
    style_layers: Mapping[str, float]
    kind: str = "normalized"
    padding: str = "replicate"
    pooling: str = "max"
    content_weight: float = 0.05
    style_weight: float = 1.0
    _cache: dict = field(default_factory=dict, compare=False, repr=False)

    def features(self, image: Tensor) -> dict[str, Tensor]:
        return features(self.state, image, self.padding, self.pooling)

    def content_features(self) -> dict[str, Tensor]:
        if "content" not in self._cache:
            with torch.no_grad():
                self._cache["content"] = self.features(torch.from_numpy(self.content))
        return self._cache["content"]

    def target_grams(self) -> dict[str, Tensor]:
        if "grams" not in self._cache:
            with torch.no_grad():
                total = sum(weight for _, weight in self.styles)
                grams = dict.fromkeys(self.style_layers, 0.0)
                for image, weight in self.styles:
                    found = self.features(torch.from_numpy(image))
                    grams = {layer: grams[layer] + weight / total * gram(found[layer]) for layer in grams}
                self._cache["grams"] = grams
        return self._cache["grams"]

    def losses(self, canvas: Tensor) -> tuple[Tensor, Tensor]:
        """(Lc, Ls)."""
        found = self.features(canvas)
        content_loss = style_loss = torch.zeros((), dtype=canvas.dtype)
        for layer, alpha in self.content_layers.items():
            target = self.content_features()[layer]
            squares = (found[layer] - target).square().sum()
            if self.kind == "normalized":
                content_loss = content_loss + alpha * squares / target.square().sum()
            else:
                content_loss = content_loss + alpha * squares / 2 / target.numel()
        for layer, weight in self.style_layers.items():
            target = self.target_grams()[layer]
            squares = (gram(found[layer]) - target).square().sum()
            if self.kind == "normalized":
                style_loss = style_loss + weight * squares / target.square().sum()
            else:
                style_loss = style_loss + weight * squares / (4 * len(target) ** 2)
        return content_loss, style_loss

    def objective(self, canvas: Tensor) -> Tensor:
        """J = N · (w_c·Lc + w_s·Ls)."""
        content_loss, style_loss = self.losses(canvas)
        pixels = canvas.shape[0] * canvas.shape[1]
        return pixels * (self.content_weight * content_loss + self.style_weight * style_loss)

    def gradient(self, canvas: np.ndarray) -> np.ndarray:
        """dJ/dp, (H, W, 3)."""
        leaf = torch.from_numpy(canvas.copy()).requires_grad_()
        (found,) = torch.autograd.grad(self.objective(leaf), leaf)
        return found.numpy()
