"""The losses of a training step and their gradient at the network's output, by the code of the optimiser's run.

    J = mean over the batch of  w_c·Lc + w_s·Ls + w_tv·Ltv + w_p·Lp

Lc, Ls and Ltv are those of pipeline/losses, of each picture by itself; Lp is the mean square of the pixels. The
gradient passes through the loss network on its tape, as in a run, so no second implementation of the losses has to
agree with the first, and autograd only records the network that is trained. Axes in names: B batch, C channels, H
rows, W columns, M see losses/objective.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.core.tiling import Rect, Tile
from pipeline.losses.objective import Gram, StyleTarget, content_scale, energy, gram_sum, squares, style_seed
from pipeline.losses.total_variation import CHANNELS, variation
from pipeline.network.vgg import FeatureMap, Network, Step

_PIXEL_ENERGY = 255.0**2
# The content features of a crop are divided by their energy, and by no less than this part of the batch's mean.
_LEAST_ENERGY = 0.01


@dataclass(frozen=True)
class Losses:
    """Means over a batch, without the weights of the sum, and the weighted sum."""

    objective: float
    content: float
    style: float
    variation: float


@dataclass(frozen=True)
class LossWeights:
    """What is compared. `content_layers` may be empty: then Lc is Lp. `kind`: loss.kind."""

    kind: str
    content: float
    style: float
    variation: float
    content_layers: Mapping[str, float]
    style_layers: Mapping[str, float]
    pixels: float = 0.0


class TrainingObjective:
    """Compares a batch of outputs with their photographs, and with the target of a style."""

    def __init__(self, network: Network, weights: LossWeights, styles: Sequence[Sequence[Tensor]] = ()):
        """`styles`: for each style its pictures, (1, 3, H, W), 0..255, whose statistics are averaged."""
        self._network, self._weights = network, weights
        self._content_layers = set(weights.content_layers) if weights.content > 0 else set()
        self._style_layers = set(weights.style_layers) if weights.style > 0 and styles else set()
        self._targets = [self._style_grams(pictures) for pictures in styles] if self._style_layers else []

    def _style_grams(self, pictures: Sequence[Tensor]) -> dict[str, Gram]:
        """The mean Gram matrix of each style layer."""
        found: dict[str, list[Gram]] = {}
        for picture_1CHW in pictures:
            for feature_map in self._features(picture_1CHW, self._style_layers):
                sum_MM = gram_sum(feature_map.features_1CHW[0], with_mean=self._with_mean)
                positions = feature_map.features_1CHW[0, 0].numel()
                found.setdefault(feature_map.layer.name, []).append(sum_MM / positions)
        return {name: np.mean(grams, axis=0) for name, grams in found.items()}

    @property
    def _with_mean(self) -> bool:
        return self._weights.kind == "wasserstein"

    @torch.no_grad()
    def evaluate(self, output_BCHW: Tensor, target_BCHW: Tensor, styles: Sequence[int] = ()) -> tuple[Losses, Tensor]:
        """The losses of `output_BCHW` (0..255), and dJ/d(output), of its shape.

        `target_BCHW`: the photographs that the content loss compares with. `styles`: the style of each picture.
        """
        batch = len(output_BCHW)
        contents = {
            feature_map.layer.name: feature_map.features_1CHW
            for feature_map in self._features(target_BCHW, self._content_layers)
        }
        sums = _Sums(batch)
        gradient = torch.zeros_like(output_BCHW)
        names = self._content_layers | self._style_layers
        if names:
            tape: list[Step] = []
            for feature_map in self._features(output_BCHW, names, tape):
                del feature_map  # the tape has it
            gradient += self._network.gradient(tape, lambda layer: self._seed(layer, contents, styles, sums))
        weights = self._weights
        if weights.content > 0 and not self._content_layers:
            sums.content, by_pixels_BCHW = _pixels(output_BCHW, target_BCHW)
            gradient += weights.content * by_pixels_BCHW
        if weights.variation > 0:
            gradient += self._variation(output_BCHW, sums)
        objective = weights.content * sums.content + weights.style * sums.style + weights.variation * sums.variation
        if weights.pixels > 0:
            found, by_pixels_BCHW = _pixels(output_BCHW, target_BCHW)
            objective += weights.pixels * found
            gradient += weights.pixels * by_pixels_BCHW
        return Losses(objective, sums.content, sums.style, sums.variation), gradient

    def _features(self, pixels_BCHW: Tensor, names: set[str], tape: list[Step] | None = None) -> list[FeatureMap]:
        if not names:
            return []
        height, width = pixels_BCHW.shape[2:]
        whole = Rect(0, height, 0, width)
        with torch.no_grad():
            return list(self._network.features(pixels_BCHW, whole, (height, width), names, whole, tape))

    def _seed(
        self, layer: FeatureMap, contents: Mapping[str, Tensor], styles: Sequence[int], sums: _Sums
    ) -> Tensor | None:
        """dJ/dφ of one layer, (B, C, H, W); None if no loss uses it."""
        name, features_BCHW = layer.layer.name, layer.features_1CHW
        seed = None
        if name in contents:
            seed = self._content_seed(name, features_BCHW, contents[name], sums)
        if name in self._style_layers:
            seeds = [
                self._style_seed(name, features_BCHW[index : index + 1], style, sums)
                for index, style in enumerate(styles)
            ]
            style_seed_BCHW = torch.cat(seeds)
            seed = style_seed_BCHW if seed is None else seed + style_seed_BCHW
        return seed

    def _content_seed(self, name: str, features_BCHW: Tensor, target_BCHW: Tensor, sums: _Sums) -> Tensor:
        weight, seeds = self._weights.content_layers[name], []
        energies = [energy(target_CHW) for target_CHW in target_BCHW]
        # a crop of a black sky has next to no features, and divided by its own energy it would be all that counts
        least = _LEAST_ENERGY * sum(energies) / sums.batch
        if least == 0:
            return torch.zeros_like(features_BCHW)
        for features_CHW, target_CHW, own in zip(features_BCHW, target_BCHW, energies, strict=True):
            channels, positions = len(target_CHW), target_CHW[0].numel()
            scale = content_scale(self._weights.kind, max(own, least), channels, positions, weight)
            difference_CHW = features_CHW - target_CHW
            sums.content += scale * float(squares(difference_CHW)) / sums.batch
            seeds.append(self._weights.content / sums.batch * 2 * scale * difference_CHW)
        return torch.stack(seeds)

    def _style_seed(self, name: str, features_1CHW: Tensor, style: int, sums: _Sums) -> Tensor:
        target = StyleTarget(
            self._weights.kind,
            self._targets[style][name],
            features_1CHW[0, 0].numel(),
            self._weights.style_layers[name],
            self._weights.style / sums.batch,
        )
        term = target.term(gram_sum(features_1CHW[0], with_mean=self._with_mean))
        sums.style += term.loss / sums.batch
        return style_seed(features_1CHW, term.seed_CM)

    def _variation(self, output_BCHW: Tensor, sums: _Sums) -> Tensor:
        height, width = output_BCHW.shape[2:]
        tile, pixels, gradients = Tile(0, Rect(0, height, 0, width), height, width), height * width, []
        for picture_CHW in output_BCHW:
            found, gradient_CHW = variation(picture_CHW[None], 0, 0, tile)
            sums.variation += found / (CHANNELS * pixels) / sums.batch
            gradients.append(gradient_CHW * (self._weights.variation / (pixels * sums.batch)))
        return torch.stack(gradients)


def _pixels(output_BCHW: Tensor, target_BCHW: Tensor) -> tuple[float, Tensor]:
    """The mean squared difference of pixels, in units of the whole range, and its gradient."""
    difference = output_BCHW - target_BCHW
    number = difference.numel() * _PIXEL_ENERGY
    return float(squares(difference)) / number, 2 / number * difference


@dataclass
class _Sums:
    """The losses so far, means over `batch` pictures."""

    batch: int
    content: float = 0.0
    style: float = 0.0
    variation: float = 0.0
