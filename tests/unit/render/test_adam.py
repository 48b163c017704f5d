"""The optimiser against algorithm.md's lines, and against torch's own where the two agree."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.losses.color_space import DECORRELATED
from pipeline.render.adam import AdamStep, bias_correction, first_max_update, schedule_factor, update

BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-6


def gradients(iterations: int, size: int, seed: int = 0) -> np.ndarray:
    """Gradients of many magnitudes, as a picture has them: 1e-6 to 1e2, and exact zeros."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-6, 2, (1, size, 1, 1))
    found = rng.normal(size=(iterations, size, 4, 3)) * scale
    found[:, 0, 0] = 0
    return found


def literal(canvas, all_gradients, target_pixel_change=12.8, schedule="constant", clip=True):
    """algorithm.md, "Stages", line by line; gives the canvas and u after every iteration."""
    p, m, v, alpha = canvas.astype(np.float64), 0.0, 0.0, None
    total = len(all_gradients)
    states = []
    for j, g in enumerate(all_gradients):
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g**2
        u = m / np.sqrt(v + EPSILON)
        b = math.sqrt(1 - BETA2 ** (j + 1)) / (1 - BETA1 ** (j + 1))
        if alpha is None:
            alpha = target_pixel_change / (b * np.abs(u).max())
        c = 1 if schedule == "constant" else 0.05 + 0.95 * (1 + math.cos(math.pi * j / total)) / 2
        p = p - alpha * c * b * u
        if clip:
            p = np.clip(p, 0, 255)
        states.append((p, np.abs(u)))
    return states


def ours(canvas, all_gradients, dtype, target_pixel_change=12.8, schedule="constant", clip=True):
    """The same with render/adam.py, chained as stage.py chains it."""
    p, m, v = canvas.astype(dtype), np.zeros(canvas.shape, dtype), np.zeros(canvas.shape, dtype)
    scratch, alpha, states = np.empty_like(p), None, []
    for j, gradient in enumerate(all_gradients):
        g = gradient.astype(dtype)
        b = bias_correction(BETA1, BETA2, j)
        if alpha is None:
            alpha = target_pixel_change / (b * first_max_update(BETA1, BETA2, EPSILON, float(np.abs(g).max())))
        size = alpha * schedule_factor(schedule, j, len(all_gradients)) * b
        abs_u = update(g, p, m, v, scratch, AdamStep(BETA1, BETA2, EPSILON, size, clip))
        states.append((p.copy(), abs_u.copy()))
    return states


def start(size: int) -> np.ndarray:
    return np.random.default_rng(9).uniform(0, 255, (size, 4, 3))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("clip", [True, False])
def test_float64_steps_are_the_algorithms(schedule, clip):
    """Another optimiser paints another picture than the paper's."""
    all_gradients, canvas = gradients(25, 6), start(6)
    wanted = literal(canvas, all_gradients, schedule=schedule, clip=clip)
    found = ours(canvas, all_gradients, np.float64, schedule=schedule, clip=clip)
    for (canvas_found, u_found), (canvas_wanted, u_wanted) in zip(found, wanted, strict=True):
        assert np.abs(canvas_found - canvas_wanted).max() < 1e-10
        assert np.abs(u_found - u_wanted).max() < 1e-12


def test_float32_steps_stay_near_the_algorithms():
    """The state is float32: sixty steps must not drift by a visible level."""
    all_gradients, canvas = gradients(60, 6), start(6)
    wanted = literal(canvas, all_gradients, schedule="cosine")
    found = ours(canvas, all_gradients, np.float32, schedule="cosine")
    assert found[-1][0].dtype == np.float32
    assert max(np.abs(f - w).max() for (f, _), (w, _) in zip(found, wanted, strict=True)) < 0.01


def test_it_is_torchs_adam_where_epsilon_does_not_matter():
    """An optimiser that others know and have tested. Torch adds its ε after the root and bias correction, we before.

    Torch: p −= lr · m̂ / (sqrt(v̂) + ε'), m̂ = m/(1 − β1^t), v̂ = v/(1 − β2^t), t = j + 1. With ε → 0 this is
    lr · b · m/sqrt(v), our step of size lr·b.
    """
    all_gradients, canvas = gradients(30, 6), start(6)
    all_gradients[all_gradients == 0] = 1e-3
    leaf = torch.tensor(canvas, requires_grad=True)
    adam = torch.optim.Adam([leaf], lr=0.7, betas=(BETA1, BETA2), eps=1e-30)
    p, m, v, scratch = canvas.copy(), np.zeros_like(canvas), np.zeros_like(canvas), np.empty_like(canvas)
    for j, gradient in enumerate(all_gradients):
        leaf.grad = torch.from_numpy(gradient.copy())
        adam.step()
        size = 0.7 * bias_correction(BETA1, BETA2, j)
        update(gradient.copy(), p, m, v, scratch, AdamStep(BETA1, BETA2, 1e-60, size, clip=False))
        assert np.abs(p - leaf.detach().numpy()).max() < 1e-10


@given(st.floats(0, 0.99), st.floats(0.5, 0.9999), st.floats(1e-12, 1e-2), st.lists(st.floats(-1e6, 1e6), min_size=1))
@settings(max_examples=200)
def test_first_max_update_is_that_of_the_first_step(beta1, beta2, epsilon, values):
    """α is set from it before the update pass has run: a wrong one makes the first step too long for the picture."""
    gradient = np.array(values)
    arrays = [np.zeros_like(gradient) for _ in range(4)]
    abs_u = update(gradient.copy(), *arrays, AdamStep(beta1, beta2, epsilon, 1.0, clip=False))
    largest = first_max_update(beta1, beta2, epsilon, float(np.abs(gradient).max()))
    assert largest == pytest.approx(abs_u.max(), rel=1e-9, abs=1e-300)


def test_the_first_step_moves_the_farthest_pixel_by_the_target_change():
    """target_pixel_change is what the user sets: 12.8 of 255 by default."""
    all_gradients, canvas = gradients(1, 6), np.full((6, 4, 3), 128.0)
    ((moved, _),) = ours(canvas, all_gradients, np.float64)
    assert np.abs(moved - canvas).max() == pytest.approx(12.8, rel=1e-12)


def test_no_gradient_leaves_everything_as_it_is():
    """Where content and style agree nothing may become NaN."""
    canvas = start(2)
    p, m, v, scratch = canvas.copy(), np.zeros_like(canvas), np.zeros_like(canvas), np.empty_like(canvas)
    abs_u = update(np.zeros_like(canvas), p, m, v, scratch, AdamStep(BETA1, BETA2, EPSILON, 12.8, clip=True))
    assert np.array_equal(p, canvas)
    assert not abs_u.any() and not m.any() and not v.any()
    assert first_max_update(BETA1, BETA2, EPSILON, 0.0) == 0


def test_clipping_can_be_switched_off():
    """The paper does not clip; with clipping the canvas stays a picture."""
    canvas, gradient = np.array([1.0, 254.0, 128.0]), np.array([1.0, -1.0, 1.0])
    results = []
    for clip in (True, False):
        p, m, v, scratch = canvas.copy(), np.zeros(3), np.zeros(3), np.empty(3)
        update(gradient.copy(), p, m, v, scratch, AdamStep(BETA1, BETA2, EPSILON, 10.0, clip))
        results.append(p)
    clipped, free = results
    assert clipped.tolist() == [0, 255, free[2]]
    assert free[0] < 0 and free[1] > 255


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_decorrelated_steps_are_adam_on_the_coordinates(dtype):
    """The store has no coordinates θ, only p = M·θ: the canvas must be where Adam on θ would have brought it."""
    matrix = np.array(DECORRELATED)
    rng = np.random.default_rng(3)
    canvas = rng.uniform(60, 190, (5, 7, 3))
    theta = np.linalg.solve(matrix, canvas.reshape(-1, 3).T).T.reshape(canvas.shape)
    p, m, v, scratch = canvas.astype(dtype), *(np.zeros(canvas.shape, dtype) for _ in range(3))
    m_theta = v_theta = 0.0
    for g in rng.normal(size=(6, *canvas.shape)):  # of the pixels
        g_theta = g @ matrix
        m_theta, v_theta = BETA1 * m_theta + (1 - BETA1) * g_theta, BETA2 * v_theta + (1 - BETA2) * g_theta**2
        theta = theta - 0.7 * m_theta / np.sqrt(v_theta + EPSILON)
        step = AdamStep(BETA1, BETA2, EPSILON, 0.7, clip=False, basis=DECORRELATED)
        update(g_theta.astype(dtype), p, m, v, scratch, step)
    assert np.abs(p - theta @ matrix.T).max() < (1e-10 if dtype == np.float64 else 1e-3)
    assert np.abs(p - canvas).max() > 1


def test_a_step_of_luminance_moves_each_channel_by_about_a_level():
    """`target_pixel_change` means levels in these coordinates too; colours move less, so that they grain less."""
    matrix = np.array(DECORRELATED)
    assert matrix[:, 0].mean() == pytest.approx(1) and np.ptp(matrix[:, 0]) < 0.05
    assert np.abs(matrix[:, 1:]).max() < 0.5


def test_cosine_falls_from_1_to_a_twentieth_and_constant_stays():
    """The last iterations take small steps: that removes the noise of the constant schedule."""
    factors = [schedule_factor("cosine", j, 60) for j in range(61)]
    assert factors[0] == 1.0
    assert factors[30] == pytest.approx(0.525)
    assert factors[60] == pytest.approx(0.05)
    assert factors == sorted(factors, reverse=True)
    assert {schedule_factor("constant", j, 60) for j in range(61)} == {1.0}


def test_bias_correction_is_the_formulas():
    """Without it the first steps are three times too long."""
    assert bias_correction(0.9, 0.99, 0) == pytest.approx(math.sqrt(0.01) / 0.1)
    assert bias_correction(0.9, 0.99, 1) == pytest.approx(math.sqrt(1 - 0.99**2) / (1 - 0.9**2))
    assert bias_correction(0.9, 0.99, 10_000) == pytest.approx(1.0)
