"""Adam as algorithm.md writes it (ε under the root, adaptive α, clipping), in place on numpy arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.losses.color_space import Basis, to_pixels

Array = NDArray[Any]

# |u| is summed in whole numbers of 1/SUM_SCALE. Such sums are exact in float64, in any order: a block of rows, a whole
# chunk and a GPU find the same mean. The mean of thousands of values is right to about 1e-9.
SUM_SCALE = 2.0**24


@dataclass(frozen=True)
class AdamStep:
    """One step: the constants of the moments, and `size` = α·c_j·b, which multiplies u.

    `average_weight`: of the new canvas in the average of all, None where there is no average. `basis`: M of the
    colour coordinates in which gradient, m, v and u are, None for RGB (losses/color_space.py).
    """

    beta1: float
    beta2: float
    epsilon: float
    size: float
    clip: bool
    average_weight: float | None = None
    basis: Basis | None = None


def bias_correction(beta1: float, beta2: float, iteration: int) -> float:
    """Give b of iteration j = 0, 1, …: sqrt(1 − β2^(j+1)) / (1 − β1^(j+1))."""
    step = iteration + 1
    return float(math.sqrt(1 - beta2**step) / (1 - beta1**step))


def schedule_factor(schedule: str, iteration: int, max_iterations: int) -> float:
    """c_j: 1 for the paper's constant schedule, falling from 1 towards 0.05 for cosine."""
    if schedule == "constant":
        return 1.0
    return 0.05 + 0.95 * (1 + math.cos(math.pi * iteration / max_iterations)) / 2


def first_max_update(beta1: float, beta2: float, epsilon: float, max_abs_gradient: float) -> float:
    """max|u| of a stage's first iteration, from max|g| alone.

    There m = (1−β1)·g and v = (1−β2)·g², so |u| grows with |g| and the largest gradient has the largest u.
    """
    return (1 - beta1) * max_abs_gradient / math.sqrt((1 - beta2) * max_abs_gradient**2 + epsilon)


def average_weight(decay: float, iteration: int) -> float:
    """w_j = (1 − d)/(1 − d^(j+1)) of the canvas that iteration j = 0, 1, … has made.

    The average with these weights is Σ_i d^(j−i)·p_i / Σ_i d^(j−i): an exponential moving average, as Adam's moments
    are, without their bias. The canvas that the stage started from is not in it.
    """
    return (1 - decay) / (1 - decay ** (iteration + 1))


def move_average(average: Array, canvas: Array, scratch: Array, weight: float) -> None:
    """Advance the average in place: a_j = a_{j−1} + w_j·(p_j − a_{j−1}).

    Of canvases within 0..255 it is within 0..255 itself, rounding included.
    """
    if weight == 1:  # a + 1·(p − a) would round
        np.copyto(average, canvas)
        return
    np.subtract(canvas, average, out=scratch)
    scratch *= weight
    average += scratch


def update(gradient: Array, canvas: Array, m: Array, v: Array, scratch: Array, step: AdamStep) -> Array:
    """Advance `canvas`, `m` and `v` by one step, in place, and give |u|.

    All five arrays have one shape, (…, 3), and dtype; `gradient` and `scratch` are overwritten, and |u| is `scratch`.
    """
    # separate multiplications and additions, in this order: fused ones would round differently from machine to machine
    m *= step.beta1
    np.multiply(gradient, 1 - step.beta1, out=scratch)
    m += scratch
    v *= step.beta2
    np.multiply(gradient, gradient, out=gradient)
    gradient *= 1 - step.beta2
    v += gradient
    # ε is under the root, as in the paper's formula; torch adds it to the root
    np.add(v, step.epsilon, out=scratch)
    np.sqrt(scratch, out=scratch)
    np.divide(m, scratch, out=scratch)
    if step.basis is None:
        np.multiply(scratch, step.size, out=gradient)
    else:
        to_pixels(scratch, step.basis, step.size, gradient)
    canvas -= gradient
    if step.clip:
        np.clip(canvas, 0, 255, out=canvas)
    return np.abs(scratch, out=scratch)
