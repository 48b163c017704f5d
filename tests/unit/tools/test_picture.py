"""The measures of the picture lab on made pictures: each finds its fault, and does not answer to another."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.network.weights import NetworkSpec, find_weights
from tools.picture import measures
from tools.picture.measures import Moments


def noise(*shape: int, seed: int = 0, scale: float = 20.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape)


def grey(height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    return np.repeat(128 + noise(height, width, 1, seed=seed), 3, axis=2)


def test_a_lattice_is_found_at_its_period_and_nowhere_else():
    """A grid that the stages leave in the picture would pass unseen, or any texture would count as one."""
    image = noise(160, 160, 3, scale=1.0)
    y, x = np.mgrid[:160, :160]
    tiled = image + 6 * ((x // 8 + y // 8) % 2)[..., None]
    plain, found = ({q: measures.lattice(picture, q) for q in (3, 4, 5, 8)} for picture in (image, tiled))
    assert all(abs(ratio - 1) < 0.1 for ratio in plain.values()), plain
    assert found[8] > 3 and found[8] > 1.5 * found[4], found
    assert found[3] < 1.1 and found[5] < 1.1, found


def test_noise_of_colour_raises_the_grain_of_colour_alone():
    """Coloured noise, which the eye sees first, would hide behind the strokes' own contrast."""
    image, delta = grey(), noise(96, 128, seed=1)
    # +red, −green and no blue, so weighted that Rec. 601 luminance stays
    coloured = image + np.stack([delta / 0.299, -delta / 0.587, 0 * delta], -1) / 4
    before, after = measures.grain(image), measures.grain(coloured)
    assert after["Y"] == pytest.approx(before["Y"], rel=1e-9)
    assert before["R-G"] < 1e-9 and after["R-G"] > 30


def test_grain_is_the_laplacian_of_one_pixel():
    """Levels in the tables could not be compared with those of docs and papers."""
    image = np.zeros((10, 10, 3))
    image[5, 5] = 1
    assert measures.grain(image) == pytest.approx({"Y": 8 / 100, "R-G": 0, "B-Y": 0}, abs=1e-12)


def test_specks_are_isolated_dots_and_not_edges():
    """Every edge of a flat style would count as a dot, or the dots of max pooling would not."""
    image = np.full((50, 40, 3), 60.0)
    image[:, 20:] = 200
    assert measures.specks(image) == 0
    image[10, 10], image[30, 33] = 255, 0
    assert measures.specks(image) == pytest.approx(1000 * 2 / (50 * 40))


def test_a_coloured_ring_at_the_border_shows_in_its_ring_alone():
    """The blue borders of a padding could not be told from a blue picture."""
    image = np.full((120, 150, 3), 100.0) + noise(120, 150, 3, scale=5)
    ringed = image.copy()
    ringed[:3, :, 2] += 80
    before, after = measures.border(image), measures.border(ringed)
    assert after["0-2 px chroma"] > 2 * before["0-2 px chroma"]
    assert after["24-31 px chroma"] == pytest.approx(before["24-31 px chroma"], rel=0.05)
    assert after["3-7 px chroma"] == before["3-7 px chroma"] == pytest.approx(1, abs=0.1)


def test_the_spectrum_shows_the_band_that_a_picture_lacks_whatever_its_size():
    """A smeared picture and one with broad strokes would look the same in the numbers."""
    style, image = grey(256, 256, seed=1), grey(300, 200, seed=2)
    assert all(abs(decibels) < 1.5 for decibels in measures.spectrum_ratio(image, style).values())
    smooth = (image + np.roll(image, 1, 0) + np.roll(image, 1, 1) + np.roll(image, (1, 1), (0, 1))) / 4
    ratio = measures.spectrum_ratio(smooth, style)
    assert ratio["2-4 px"] < -5 and abs(ratio["32-64 px"]) < 1.5, ratio


def test_edges_recognise_the_content_in_other_colours():
    """A repainted content would count as lost, or any picture as kept."""
    content = grey(200, 260, seed=3)
    content[60:140, 80:200] -= 90
    repainted = 255 - content[..., ::-1] * [0.5, 0.7, 0.9]
    assert min(measures.edges(repainted, content).values()) > 0.99
    assert measures.edges(grey(200, 260, seed=4), content)["at 64 px"] < 0.3


def test_psnr_of_a_known_error():
    """The identity test would be in no known unit."""
    assert measures.psnr(np.full((4, 4, 3), 10.0), np.full((4, 4, 3), 35.5)) == pytest.approx(20)


def moments_of(features_Cn: np.ndarray) -> Moments:
    return Moments(features_Cn.mean(1), features_Cn @ features_Cn.T / features_Cn.shape[1])


def test_w2_is_the_distance_of_two_gaussians_by_another_route():
    """The lab would rank pictures by a number that is not the distance."""
    image, style = (np.maximum(noise(6, 400, seed=seed, scale=1.0), -0.3) for seed in (5, 6))
    style = np.random.default_rng(7).normal(size=(6, 6)) @ style
    sigma, sigma_s = (np.cov(side, bias=True) for side in (image, style))
    epsilon = measures.EPSILON * np.trace(sigma_s) / 6 * np.eye(6)
    sigma, sigma_s = sigma + epsilon, sigma_s + epsilon
    # tr (R Σ R)^½ is the sum of the roots of the eigenvalues of Σ Σ_s, which is not symmetric
    shared = np.sqrt(np.linalg.eigvals(sigma @ sigma_s).real).sum()
    expected = np.sum((image.mean(1) - style.mean(1)) ** 2) + np.trace(sigma) + np.trace(sigma_s) - 2 * shared
    found = measures.w2_distance(moments_of(image), moments_of(style))
    assert found == pytest.approx(expected / np.trace(sigma_s), rel=1e-9)
    assert measures.w2_distance(moments_of(style), moments_of(style)) == pytest.approx(0, abs=1e-9)
    # a shift of the mean costs its square; the same covariance costs nothing
    shifted = measures.w2_distance(moments_of(style + 2.0), moments_of(style))
    assert shifted == pytest.approx(6 * 4 / np.trace(sigma_s), rel=1e-6)


def test_moments_in_tiles_are_those_of_the_whole_picture(narrow_weights, monkeypatch):
    """The distances of a large picture would depend on the tiles in which it is measured."""
    network = NetworkSpec(find_weights("vgg19", narrow_weights, 0), "replicate", "max", "float32", "cpu", 1)
    image = grey(200, 230, seed=8)
    whole = measures.moments(network, image)
    monkeypatch.setattr(measures, "TILE_PX", 96)
    tiled = measures.moments(network, image)
    assert list(tiled) == list(whole) == list(measures.STYLE_LAYERS)
    for name, expected in whole.items():
        np.testing.assert_allclose(tiled[name].gram_CC, expected.gram_CC, rtol=1e-4)
        np.testing.assert_allclose(tiled[name].mean_C, expected.mean_C, rtol=1e-4)
