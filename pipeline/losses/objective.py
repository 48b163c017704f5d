"""The objective and its seeds, as pure functions of whole-image numbers (algorithm.md, "The objective").

Axes in names: B blocks, C channels, M = C, or C + 1 for the Wasserstein loss (wasserstein.py), n positions, H rows,
W columns. Gram matrices are float64 numpy arrays: they are
small, and the exactness of the tiles rests on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.losses import wasserstein

Gram = NDArray[np.float64]
# Relative differences that count as rounding, by compute.dtype: a canvas and its target are summed in different orders
# if their tiles differ. Measured: 3 to 7 units in the last place, in bfloat16 none.
ROUNDING = {"float64": 1e-14, "float32": 4e-6, "tf32": 1e-3, "bfloat16": 4e-3}

# Positions that a GPU sums in float32, and the number of such blocks per matrix product, which bounds its memory.
_BLOCK, _BLOCKS_AT_ONCE = 1024, 4096


@dataclass(frozen=True)
class StyleTerm:
    """One style layer at one canvas: its term of Ls, ‖G(p) − G(s)‖/‖G(s)‖, and the matrix of the seed.

    The seed is seed_CM·φ, or with M = C + 1 seed_CM·(φ, 1).
    """

    loss: float
    relative_error: float
    seed_CM: Gram


def gram_sum(features_CHW: Tensor, share_HW: Tensor | None = None, *, with_mean: bool = False) -> Gram:
    """Σ φφᵀ over positions (eq. 14), (C, C), accumulated in at least float32.

    `share_HW`: the weight of each position, 1 by default. `with_mean`: of the features and a channel of ones, (M, M),
    whose last column is (Σ φ, Σ 1).
    """
    weighted_CHW = features_CHW
    if share_HW is not None:
        features_CHW = features_CHW.to(torch.promote_types(features_CHW.dtype, torch.float32))
        weighted_CHW = features_CHW * share_HW
    sum_CC = (_products_in_blocks if features_CHW.is_cuda else _products)(weighted_CHW, features_CHW)
    if not with_mean:
        return sum_CC
    # beside the product, not by a channel of ones: that would copy the largest feature map
    sum_C1 = weighted_CHW.sum((1, 2), dtype=torch.float64).cpu().numpy()[:, None]
    count = features_CHW[0].numel() if share_HW is None else float(share_HW.sum(dtype=torch.float64))
    return np.block([[sum_CC, sum_C1], [sum_C1.T, np.full((1, 1), count)]])


def _products(left_CHW: Tensor, right_CHW: Tensor) -> Gram:
    """Σ left·rightᵀ over positions, on the CPU."""
    right_Cn = right_CHW.flatten(1)
    if right_Cn.dtype == torch.bfloat16:
        right_Cn = right_Cn.float()
    left_Cn = right_Cn if left_CHW is right_CHW else left_CHW.flatten(1)
    return (left_Cn @ right_Cn.T).cpu().numpy().astype(np.float64)


def _products_in_blocks(left_CHW: Tensor, right_CHW: Tensor) -> Gram:
    """The same on a GPU: float32 within blocks of positions, float64 over the blocks.

    Products of bfloat16 are exact in float32, but matrix units truncate their sums: over four million positions the
    error was 3·10⁻⁴, over a block it is less than the rounding of the features.
    """
    right_nC = right_CHW.permute(1, 2, 0).flatten(0, 1)
    left_nC = right_nC if left_CHW is right_CHW else left_CHW.permute(1, 2, 0).flatten(0, 1)
    positions, channels = right_nC.shape
    total = torch.zeros((channels, channels), dtype=torch.float64, device=right_nC.device)
    whole = positions // _BLOCK * _BLOCK
    firsts = range(0, whole, _BLOCK * _BLOCKS_AT_ONCE)
    parts = [(slice(first, min(first + _BLOCK * _BLOCKS_AT_ONCE, whole)), _BLOCK) for first in firsts]
    parts += [(slice(whole, positions), positions - whole)] if whole < positions else []
    multiply = partial(torch.bmm, out_dtype=torch.float32) if right_nC.dtype == torch.bfloat16 else torch.bmm
    for part, length in parts:
        left_BnC, right_BnC = (x_nC[part].reshape(-1, length, channels) for x_nC in (left_nC, right_nC))
        total += multiply(left_BnC.mT, right_BnC).sum(0, dtype=torch.float64)
    return total.cpu().numpy()


def style_seed(features_1CHW: Tensor, seed_CM: Gram) -> Tensor:
    """dJ/dφ of a style layer at the positions of `features_1CHW`, of its shape and dtype."""
    channels = features_1CHW.shape[1]
    matrix_CC = torch.from_numpy(seed_CM[:, :channels]).to(features_1CHW)
    if features_1CHW.is_cuda:  # einsum would return another memory layout than channels-last
        seed_1CHW = F.conv2d(features_1CHW, matrix_CC[:, :, None, None])
    else:
        seed_1CHW = torch.einsum("cd,bdhw->bchw", matrix_CC, features_1CHW)
    if seed_CM.shape[1] > channels:
        seed_1CHW += torch.from_numpy(seed_CM[:, channels]).to(features_1CHW)[None, :, None, None]
    return seed_1CHW


def squares(difference_CHW: Tensor, weight_1HW: Tensor | None = None) -> Tensor:
    """Σ weight·difference² in float64, as a tensor on the same device: no wait for a GPU."""
    squares_CHW = difference_CHW.double().square()
    if weight_1HW is not None:
        squares_CHW *= weight_1HW
    return squares_CHW.sum()


def energy(features_CHW: Tensor) -> float:
    """‖φ‖², accumulated in float64."""
    if features_CHW.is_cuda:
        return float(squares(features_CHW))
    values: NDArray[Any] = (
        features_CHW.float().numpy() if features_CHW.dtype == torch.bfloat16 else features_CHW.numpy()
    )
    values_HWC = np.ascontiguousarray(values.transpose(1, 2, 0))
    return float(np.sum(np.square(values_HWC, dtype=np.float64)))


def mean_gram(grams: list[Gram], weights: list[float]) -> Gram:
    """The weighted mean of several styles' Gram matrices: the target of a style layer."""
    return np.average(np.stack(grams), axis=0, weights=weights)


@dataclass(frozen=True)
class StyleTarget:
    """The target of one style layer, and the weight of its difference.

    `kind`: loss.kind. `target_MM`: G_l(s). `positions`: n_l. `weight`: λ_l. `factor`: N·w_s. In a region (masks.py),
    `positions` is n_r,l and `area` is n_r,l/n_l. `known`: for a crop, the mean Gram matrices of the whole
    image and of the region at the stage that it starts from, by which that of the whole is estimated.
    """

    kind: str
    target_MM: Gram
    positions: float
    weight: float
    factor: float
    area: float = 1.0
    known: tuple[Gram, Gram] | None = None

    @property
    def has_mean(self) -> bool:
        """Whether means are compared too: then M = C + 1."""
        return self.kind == "wasserstein"

    def term(self, sum_MM: Gram) -> StyleTerm:
        """Loss and seed matrix of a canvas whose gram_sum over the whole image is `sum_MM` (eq. 15).

        The seed is d(N·w_s·Ls)/dφ, exact at any subset of positions.
        Raises ConfigError if the target has no energy, or no variance, to normalise by.
        """
        gram_MM = self._of_whole(sum_MM / self.positions)
        difference = gram_MM - self.target_MM
        squares, energy = float(np.sum(difference**2)), float(np.sum(self.target_MM**2))
        error, scale = relative_error(squares, energy), self.area * self.weight
        if self.has_mean:
            found = wasserstein.distance(gram_MM, self.target_MM)
            return StyleTerm(scale * found.loss, error, self.factor * scale / self.positions * found.gradient_CM)
        scale /= 4 * len(sum_MM) ** 2 if self.kind == "gatys" else _energy(energy, "style")
        return StyleTerm(scale * squares, error, self.factor * scale * 4 / self.positions * difference)

    def _of_whole(self, gram_MM: Gram) -> Gram:
        """The mean Gram matrix of the whole image, of which the canvas is a region if `known` is given."""
        if self.known is None:
            return gram_MM
        whole_MM, region_MM = self.known
        return wasserstein.carried(gram_MM, whole_MM, region_MM) if self.has_mean else gram_MM + (whole_MM - region_MM)


def relative_error(squares: float, energy: float) -> float:
    """‖a − b‖/‖b‖ from the squared norms; 0 if both are 0."""
    return math.sqrt(squares / energy) if energy > 0 else math.inf if squares > 0 else 0.0


def content_scale(kind: str, energy: float, channels: int, positions: int, weight: float) -> float:
    """The factor of ‖φ_l(p) − φ_l(o)‖² in Lc (eq. 2 for gatys); the seed is N·w_c·2·scale·(φ_l(p) − φ_l(o)).

    `energy`: ‖φ_l(o)‖² over the whole image. Raises ConfigError if it is zero and the family normalises by it.
    """
    if kind == "gatys":
        return weight * 0.5 / (channels * positions)
    return weight / _energy(energy, "content")


def _energy(energy: float, which: str) -> float:
    if not energy > 0:
        raise ConfigError(
            f"loss.kind divides by the energy of the {which} features, which is {energy:g}: the "
            f"{which} image has no features at one of the layers. Use another image, other layers, or loss.kind: gatys."
        )
    return energy


def objective(pixels: int, *parts: tuple[float, float]) -> float:
    """J = N·(w_c·Lc + w_s·Ls + w_tv·Ltv), from the (weight, loss) pairs."""
    return pixels * sum(weight * loss for weight, loss in parts)
