"""A second implementation of algorithm.md, with whole images and plain torch, to which the tiles are compared.

It imports nothing of the program: the layer table is typed out, the padding is torch's, the gradient is autograd's.
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
    """A small network under our names: `widths` per block, He-normal weights, non-zero biases."""
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


def pooled(x: Tensor, padding: str, pooling: str) -> Tensor:
    """A map of half the size: tent is a convolution by (1, 3, 3, 1)/8 ⊗ (1, 3, 3, 1)/8 with stride 2."""
    if pooling == "max":
        return F.max_pool2d(x, 2)
    if pooling == "average":
        return F.avg_pool2d(x, 2)
    if pooling == "l2":
        return (F.avg_pool2d(x.square(), 2) + 1e-12).sqrt()
    tent = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    kernel = torch.outer(tent, tent).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode=_MODES[padding]), kernel, stride=2, groups=x.shape[1])


def features(
    state: Mapping[str, Tensor], image_HWC: Tensor, padding: str, pooling: str, pooling_scale: float = 1.0
) -> dict[str, Tensor]:
    """φ_l after ReLU, (C, H, W), of every convolution that the image is large enough for."""
    x = image_HWC.permute(2, 0, 1)[None] / 255
    if "input.weight" in state:
        x = F.conv2d(x, state["input.weight"].to(x), state["input.bias"].to(x))
    else:
        mean = torch.tensor([0.485, 0.456, 0.406], dtype=x.dtype)[None, :, None, None]
        std = torch.tensor([0.229, 0.224, 0.225], dtype=x.dtype)[None, :, None, None]
        x = (x - mean) / std
    features_CHW: dict[str, Tensor] = {}
    for name in TOPOLOGY:
        if name == "pool":
            if min(x.shape[2:]) < 2:
                break
            kind = ("max" if "conv2_1" in features_CHW else "average") if pooling == "mixed" else pooling
            x = pooling_scale * pooled(x, padding, kind)
            continue
        if f"{name}.weight" not in state or (padding == "reflect" and min(x.shape[2:]) < 2):
            break
        x = F.pad(x, (1, 1, 1, 1), mode=_MODES[padding])
        x = F.relu(F.conv2d(x, state[f"{name}.weight"].to(x), state[f"{name}.bias"].to(x)))
        features_CHW[name] = x[0]
    return features_CHW


def gram(features_CHW: Tensor) -> Tensor:
    """G_l, the mean Gram matrix, (C, C)."""
    features_Cn = features_CHW.flatten(1)
    return features_Cn @ features_Cn.T / features_Cn.shape[1]


def moments(features_CHW: Tensor, share_HW: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ w·φ, Σ w·φφᵀ) / Σ w over positions with weights w: mean and raw second moment."""
    features_Cn, share_n = features_CHW.flatten(1), share_HW.flatten() / share_HW.sum()
    return features_Cn @ share_n, features_Cn * share_n @ features_Cn.T


def wasserstein(mean: Tensor, second: Tensor, target_mean: Tensor, target_second: Tensor) -> Tensor:
    """The squared distance of two normal distributions over the target's variance, by Cholesky factors.

    tr (R Σ R)^½ with R = Σ_s^½ is the sum of the singular values of LᵀK, where Σ = LLᵀ and Σ_s = KKᵀ.
    """
    covariance = second - torch.outer(mean, mean)
    target = target_second - torch.outer(target_mean, target_mean)
    variance = max(float(target.trace()), 0.01 * float(target_second.trace()))  # of a style that is nearly flat
    ridge = 1e-4 * variance / len(mean) * torch.eye(len(mean), dtype=mean.dtype)
    left, right = torch.linalg.cholesky(covariance + ridge), torch.linalg.cholesky(target + ridge)
    overlap = torch.linalg.svdvals(left.T @ right).sum()
    distance = (mean - target_mean).square().sum() + left.square().sum() + right.square().sum() - 2 * overlap
    return distance / (variance + ridge.trace())


# Lucid's colour matrix; its luminance column has a mean of 1.
DECORRELATED = torch.tensor([[26, 9, 2], [27, 0, -5], [27, -9, 3]], dtype=torch.float64) * 3 / 80


def luminance(image_HWC: Tensor) -> Tensor:
    """Y of YIQ in all three channels."""
    y_HW = 0.299 * image_HWC[..., 0] + 0.587 * image_HWC[..., 1] + 0.114 * image_HWC[..., 2]
    return torch.stack([y_HW] * 3, -1)


def color_matched(style: np.ndarray, content: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Pixels of the style by the linear map that gives it the content's mean and covariance, clipped."""
    style_n3, content_n3 = style.reshape(-1, 3), content.reshape(-1, 3)

    def power(pixels_n3: np.ndarray, exponent: float, minimum: float) -> np.ndarray:
        vectors, variances, _ = np.linalg.svd(np.cov(pixels_n3, rowvar=False, ddof=0))
        return vectors @ np.diag(np.maximum(variances, minimum) ** exponent) @ vectors.T

    a = power(content_n3, 0.5, 0.0) @ power(style_n3, -0.5, 1.0)
    return np.clip((pixels - style_n3.mean(0)) @ a.T + content_n3.mean(0), 0, 255)


def luminance_matched(style: np.ndarray, content: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Y of the style's pixels by the map that gives it mean and deviation of the content's Y, clipped, three times."""
    style_y, content_y = (luminance(torch.from_numpy(image)).numpy() for image in (style, content))
    gain = content_y.std() / max(style_y.std(), 1.0)
    pixels_y = luminance(torch.from_numpy(pixels)).numpy()
    return np.clip((pixels_y - style_y.mean()) * gain + content_y.mean(), 0, 255)


def at_layer(mask_HW: np.ndarray, layer: str) -> Tensor:
    """M_r,l: the mean of a mask over the pixels of each position of a layer."""
    stride = STRIDES[layer]
    height, width = (side // stride for side in mask_HW.shape)
    blocks = mask_HW[: height * stride, : width * stride].reshape(height, stride, width, stride)
    return torch.from_numpy(blocks.mean((1, 3)))


def shrunk(image_HWC: Tensor, scale: int) -> Tensor:
    """The means of blocks of 2^scale × 2^scale px."""
    return F.avg_pool2d(image_HWC.permute(2, 0, 1), 2**scale).permute(1, 2, 0)


@dataclass(frozen=True)
class Problem:
    """Everything that J depends on, except the canvas. Images are (H, W, 3) float64 arrays of 0..255.

    `masks`: per style its (H, W) share of each pixel, 0..1, or None; styles with equal masks share a region.
    `content_mask`: the (H, W) weight of the content, 0..1, or None. `scales`: of which the losses are the mean.
    """

    state: Mapping[str, Tensor]
    content: np.ndarray
    styles: Sequence[tuple[np.ndarray, float]]
    content_layers: Mapping[str, float]
    style_layers: Mapping[str, float]
    kind: str = "normalized"
    padding: str = "replicate"
    pooling: str = "max"
    pooling_scale: float = 1.0
    content_weight: float = 0.05
    style_weight: float = 1.0
    tv_weight: float = 0.0
    tv_kind: str = "squared"
    color: str = "style"
    color_space: str = "rgb"
    masks: Sequence[np.ndarray | None] = ()
    content_mask: np.ndarray | None = None
    scales: int = 1
    _cache: dict = field(default_factory=dict, compare=False, repr=False)

    def features(self, image: Tensor) -> dict[str, Tensor]:
        return features(self.state, image, self.padding, self.pooling, self.pooling_scale)

    def network_input(self, image: Tensor) -> Tensor:
        """The canvas or the content as the network receives it."""
        return luminance(image) if self.color == "luminance" else image

    def style_input(self, style: np.ndarray, scale: int) -> Tensor:
        pixels = shrunk(torch.from_numpy(style), scale).numpy()
        if self.color == "content":
            pixels = color_matched(style, self.content, pixels)
        if self.color == "luminance":
            pixels = luminance_matched(style, self.content, pixels)
        return torch.from_numpy(pixels)

    def content_features(self, scale: int = 0) -> dict[str, Tensor]:
        if ("content", scale) not in self._cache:
            with torch.no_grad():
                content = shrunk(torch.from_numpy(self.content), scale)
                self._cache["content", scale] = self.features(self.network_input(content))
        return self._cache["content", scale]

    def regions(self, scale: int = 0) -> list[tuple[np.ndarray, list[tuple[np.ndarray, float]]]]:
        """(share of every pixel, styles with their weights) of every region: of each mask, then of the rest."""
        masks = [self.mask_at(mask, scale) for mask in self.masks] or [None] * len(self.styles)
        distinct: list[np.ndarray] = []
        for mask in masks:
            if mask is not None and not any(np.array_equal(mask, other) for other in distinct):
                distinct.append(mask)
        covered = np.sum(distinct, 0) if distinct else np.zeros([side >> scale for side in self.content.shape[:2]])
        regions = []
        for region_mask in distinct:
            members = [
                style
                for style, mask in zip(self.styles, masks, strict=True)
                if mask is not None and np.array_equal(mask, region_mask)
            ]
            regions.append((region_mask / np.maximum(1, covered), members))
        if rest := [style for style, mask in zip(self.styles, masks, strict=True) if mask is None]:
            regions.append((np.maximum(0, 1 - covered), rest))
        return regions

    def mask_at(self, mask: np.ndarray | None, scale: int) -> np.ndarray | None:
        return None if mask is None else shrunk(torch.from_numpy(mask)[..., None], scale)[..., 0].numpy()

    def target_grams(self, region: int = 0, scale: int = 0) -> dict[str, Tensor]:
        if ("grams", region, scale) not in self._cache:
            _, styles = self.regions()[region]
            with torch.no_grad():
                total = sum(weight for _, weight in styles)
                grams = dict.fromkeys(self.style_layers, 0.0)
                for image, weight in styles:
                    maps = self.features(self.style_input(image, scale))
                    grams = {layer: grams[layer] + weight / total * gram(maps[layer]) for layer in grams}
                self._cache["grams", region, scale] = grams
        return self._cache["grams", region, scale]

    def target_moments(self, layer: str, region: int = 0, scale: int = 0) -> tuple[Tensor, Tensor]:
        """The weighted means of the styles' moments."""
        if ("moments", region, layer, scale) not in self._cache:
            _, styles = self.regions()[region]
            with torch.no_grad():
                total, mean, second = sum(weight for _, weight in styles), 0.0, 0.0
                for image, weight in styles:
                    phi = self.features(self.style_input(image, scale))[layer]
                    own_mean, own_second = moments(phi, torch.ones_like(phi[0]))
                    mean, second = mean + weight / total * own_mean, second + weight / total * own_second
                self._cache["moments", region, layer, scale] = mean, second
        return self._cache["moments", region, layer, scale]

    def losses(self, canvas: Tensor) -> tuple[Tensor, Tensor]:
        """(Lc, Ls), the means over the scales."""
        parts = [self.losses_at(canvas, scale) for scale in range(self.scales)]
        content_losses, style_losses = zip(*parts, strict=True)
        return sum(content_losses) / self.scales, sum(style_losses) / self.scales

    def losses_at(self, canvas: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        maps = self.features(self.network_input(shrunk(canvas, scale)))
        content_mask = self.mask_at(self.content_mask, scale)
        content_loss = style_loss = torch.zeros((), dtype=canvas.dtype)
        for layer, alpha in self.content_layers.items():
            target = self.content_features(scale)[layer]
            squares_HW = (maps[layer] - target).square().sum(0)
            if content_mask is not None:
                squares_HW = squares_HW * at_layer(content_mask, layer)
            if self.kind != "gatys":
                content_loss = content_loss + alpha * squares_HW.sum() / target.square().sum()
            else:
                content_loss = content_loss + alpha * squares_HW.sum() / 2 / target.numel()
        for region, (share_HW, _) in enumerate(self.regions(scale)):
            for layer, weight in self.style_layers.items():
                guide_HW = at_layer(share_HW, layer)
                if not guide_HW.any():
                    continue
                if self.kind == "wasserstein":
                    found = wasserstein(*moments(maps[layer], guide_HW), *self.target_moments(layer, region, scale))
                    style_loss = style_loss + weight * guide_HW.mean() * found
                    continue
                target = self.target_grams(region, scale)[layer]
                guided_Cn = (maps[layer] * guide_HW).flatten(1)
                guided = guided_Cn @ maps[layer].flatten(1).T / guide_HW.sum()
                squares = guide_HW.mean() * (guided - target).square().sum()
                if self.kind == "normalized":
                    style_loss = style_loss + weight * squares / target.square().sum()
                else:
                    style_loss = style_loss + weight * squares / (4 * len(target) ** 2)
        return content_loss, style_loss

    def variation(self, canvas: Tensor) -> Tensor:
        """Ltv."""
        x_HWC = self.network_input(canvas) / 255
        down, right = x_HWC[1:] - x_HWC[:-1], x_HWC[:, 1:] - x_HWC[:, :-1]
        if self.tv_kind == "absolute":
            per_pixel = torch.zeros(x_HWC.shape[:2], dtype=x_HWC.dtype)
            per_pixel[:-1] += down.square().sum(2)
            per_pixel[:, :-1] += right.square().sum(2)
            small = 2 / 255
            return ((per_pixel + small**2).sqrt() - small).mean()
        return (down.square().sum() + right.square().sum()) / x_HWC.numel()

    def objective(self, canvas: Tensor) -> Tensor:
        """J = N · (w_c·Lc + w_s·Ls + w_tv·Ltv)."""
        content_loss, style_loss = self.losses(canvas)
        pixels = canvas.shape[0] * canvas.shape[1]
        loss = self.content_weight * content_loss + self.style_weight * style_loss
        return pixels * (loss + self.tv_weight * self.variation(canvas))

    def gradient(self, canvas: np.ndarray) -> np.ndarray:
        """dJ/dp, (H, W, 3), or dJ/dθ in decorrelated colours.

        For luminance the derivative along the grey axis, in all three channels.
        """
        leaf = torch.from_numpy(canvas.copy()).requires_grad_()
        (gradient,) = torch.autograd.grad(self.objective(leaf), leaf)
        if self.color == "luminance":
            gradient = gradient.sum(-1, keepdim=True).expand_as(gradient)
        elif self.color_space == "decorrelated":
            gradient = gradient @ DECORRELATED
        return gradient.numpy()
