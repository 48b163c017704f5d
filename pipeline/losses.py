"""The objective and its seeds, as pure functions of whole-image numbers (algorithm.md, "The objective").

Axes in names: C channels, n positions. Grams are float64 numpy arrays: they are tiny, and they are what the
exactness of the tiles rests on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import ConfigError

Gram = NDArray[np.float64]
# Relative differences that are rounding and no difference, by compute.dtype: a canvas and its target are summed in
# other orders where their tiles are cut otherwise. Measured: 3 to 7 units of the last place, in bfloat16 none.
ROUNDING = {"float64": 1e-14, "float32": 4e-6, "tf32": 1e-3, "bfloat16": 4e-3}


@dataclass(frozen=True)
class StyleTerm:
    """One style layer at one canvas: its share of Ls, ‖G(p) − G(s)‖/‖G(s)‖, and what turns features into the seed."""

    loss: float
    relative_error: float
    seed_CC: Gram


def gram_sum(features_CHW: Tensor, share_HW: Tensor | None = None) -> Gram:
    """Sum over positions of the outer product of the features (eq. 14), (C, C), accumulated in at least float32.

    `share_HW`: how much each position counts, if not 1.
    """
    features_Cn = features_CHW.flatten(1)
    if features_Cn.dtype == torch.bfloat16:
        features_Cn = features_Cn.float()
    counted_Cn = features_Cn if share_HW is None else features_Cn * share_HW.flatten()
    return (counted_Cn @ features_Cn.T).cpu().numpy().astype(np.float64)


def mean_gram(grams: list[Gram], weights: list[float]) -> Gram:
    """The weighted mean of several styles' Grams: the target of a style layer."""
    return np.average(np.stack(grams), axis=0, weights=weights)


@dataclass(frozen=True)
class StyleTarget:
    """What one style layer is compared with, and how its difference counts.

    `target_CC`: G_l(s). `positions`: n_l. `weight`: λ_l. `factor`: N·w_s. Of a region (guidance.py), `positions` is
    n_r,l, the sum of its shares, and `area` n_r,l/n_l. `rest_CC`: where the canvas is a part of a
    picture, what is added to its mean Gram for that of the whole.
    """

    kind: str
    target_CC: Gram
    positions: float
    weight: float
    factor: float
    area: float = 1.0
    rest_CC: Gram | None = None

    def term(self, sum_CC: Gram) -> StyleTerm:
        """Loss and seed matrix of a canvas whose gram_sum over the whole image is `sum_CC`.

        The seed is d(N·w_s·Ls)/dφ = seed_CC · φ, exact on any subset of positions.
        Raises ConfigError if the target has no energy to normalise by.
        """
        gram_CC = sum_CC / self.positions + (0.0 if self.rest_CC is None else self.rest_CC)
        difference = gram_CC - self.target_CC
        squares, energy = float(np.sum(difference**2)), float(np.sum(self.target_CC**2))
        scale = self.area * self.weight / (4 * len(sum_CC) ** 2 if self.kind == "gatys" else _energy(energy, "style"))
        seed_CC = self.factor * scale * 4 / self.positions * difference
        return StyleTerm(scale * squares, relative_error(squares, energy), seed_CC)


def relative_error(squares: float, energy: float) -> float:
    """‖a − b‖/‖b‖ from their squares; 0 where both are nothing."""
    return math.sqrt(squares / energy) if energy > 0 else math.inf if squares > 0 else 0.0


def content_scale(kind: str, energy: float, channels: int, positions: int, weight: float) -> float:
    """What ‖φ_l(p) − φ_l(o)‖² is multiplied by in Lc; the seed is N·w_c·2·scale·(φ_l(p) − φ_l(o)).

    `energy`: ‖φ_l(o)‖² over the whole image. Raises ConfigError if it is zero and the family normalises by it.
    """
    if kind == "gatys":
        return weight * 0.5 / (channels * positions)
    return weight / _energy(energy, "content")


def _energy(energy: float, which: str) -> float:
    if not energy > 0:
        raise ConfigError(
            f"loss.kind: normalized divides by the energy of the {which} features, which is {energy:g}: the "
            f"{which} image says nothing to this network at one of its layers. Use another image, other layers, or "
            "loss.kind: gatys."
        )
    return energy


def objective(pixels: int, *parts: tuple[float, float]) -> float:
    """J = N·(w_c·Lc + w_s·Ls + w_tv·Ltv), of its (weight, loss) pairs."""
    return pixels * sum(weight * loss for weight, loss in parts)
