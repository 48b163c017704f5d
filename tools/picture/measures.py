"""Numbers of a picture: grain, lattice, spectrum, border, content, specks, and distance from a style under a network.

Images are (H, W, 3) arrays of RGB, 0..255, as `read` returns them; a "level" is 1 of these 255. docs/picture.md says
what each number caught and where it misleads. Axes in names: C channels, H rows, W columns, n positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
import torch
import torch.nn.functional as F
from numpy import ndarray

from pipeline.core.tiling import Rect, grid
from pipeline.core.vgg_layers import LAYER_BY_NAME, halo_px
from pipeline.network.cache import get_network
from pipeline.network.weights import NetworkSpec
from pipeline.plan.sizes import fit

STYLE_LAYERS = ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")
LATTICE_PX = (2, 4, 8, 16)
RINGS_PX = ((0, 3), (3, 8), (24, 32))  # half-open distances from the border
BANDS_PX = (2, 4, 8, 16, 32, 64)  # limits of the octaves of wavelength
EDGE_SIDES_PX = (256, 64)
SPECK_LEVELS = 32.0
EPSILON = 1e-4  # of the style features' mean variance, added to both covariances (algorithm.md)
TILE_PX = 1024


def read(path: Path, long_px: int | None = None, enlarge: bool = False) -> ndarray:
    """An image as float32, reduced to a long side of `long_px` if it is larger, or enlarged if asked to."""
    image = pyvips.Image.new_from_file(str(path)).colourspace("srgb")[:3]
    if long_px is not None and (enlarge or long_px < max(image.width, image.height)):
        height, width = fit((image.height, image.width), long_px)
        image = image.resize(width / image.width, vscale=height / image.height, kernel="lanczos3")
    return image.numpy().astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- pixels


def luminance(image: ndarray) -> ndarray:
    """Y of Rec. 601, 0.299 R + 0.587 G + 0.114 B, in levels."""
    return image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def planes(image: ndarray) -> dict[str, ndarray]:
    """Luminance and two differences of colours, (H, W) each, in levels."""
    y_HW = luminance(image)
    red, green, blue = np.moveaxis(image.astype(np.float64), -1, 0)
    return {"Y": y_HW, "R-G": red - green, "B-Y": blue - y_HW}


def _laplacian(plane_HW: ndarray) -> ndarray:
    """|sum of the four neighbours − 4 × the pixel|; the border is repeated."""
    padded = np.pad(plane_HW, 1, mode="edge")
    return np.abs(padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * plane_HW)


def grain(image: ndarray) -> dict[str, float]:
    """Mean |3×3 Laplacian| of Y, R − G and B − Y, in levels."""
    return {name: float(_laplacian(plane_HW).mean()) for name, plane_HW in planes(image).items()}


def lattice(image: ndarray, q: int) -> float:
    """Mean |step| between neighbouring pixels across multiples of `q` px, over that across all others; 1: no lattice.

    Rows and columns together, mean of the channels.
    """
    on, off = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(image.astype(np.float64), axis=axis)).mean(axis=(1 - axis, 2))
        multiple = np.arange(1, len(steps) + 1) % q == 0
        on.append(steps[multiple])
        off.append(steps[~multiple])
    return float(np.concatenate(on).mean() / np.concatenate(off).mean())


def _band_powers(image: ndarray) -> ndarray:
    """Mean power of Y at each octave of wavelength (BANDS_PX), in levels² per unit of frequency; Hann window."""
    y_HW = luminance(image)
    window_HW = np.hanning(y_HW.shape[0])[:, None] * np.hanning(y_HW.shape[1])[None]
    power = np.abs(np.fft.rfft2((y_HW - y_HW.mean()) * window_HW)) ** 2 / np.sum(window_HW**2)
    radius = np.hypot(np.fft.fftfreq(y_HW.shape[0])[:, None], np.fft.rfftfreq(y_HW.shape[1])[None])
    return np.array([power[(radius > 1 / long) & (radius <= 1 / short)].mean() for short, long in pairwise(BANDS_PX)])


def spectrum_ratio(image: ndarray, style: ndarray) -> dict[str, float]:
    """10·log10 of the power of Y over the style's, averaged over directions and an octave of wavelengths, in dB."""
    decibels = 10 * np.log10((_band_powers(image) + 1e-6) / (_band_powers(style) + 1e-6))
    names = [f"{short}-{long} px" for short, long in pairwise(BANDS_PX)]
    return dict(zip(names, map(float, decibels), strict=True))


def border(image: ndarray) -> dict[str, float]:
    """Chroma (mean of max − min of RGB) and grain of Y in rings at the border, over those of the inside; 1: no ring.

    The inside is everything at least 32 px from the border.
    """
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    distance = np.minimum(np.minimum(y, height - 1 - y), np.minimum(x, width - 1 - x))
    maps = {"chroma": np.ptp(image.astype(np.float64), axis=2), "grain": _laplacian(luminance(image))}
    inside = distance >= RINGS_PX[-1][1]
    result = {}
    for start, end in RINGS_PX:
        ring = (distance >= start) & (distance < end)
        for name, values in maps.items():
            result[f"{start}-{end - 1} px {name}"] = float(values[ring].mean() / max(values[inside].mean(), 1e-6))
    return result


def edges(image: ndarray, content: ndarray) -> dict[str, float]:
    """Correlation of |gradient of Y| with the content's, both at the long sides EDGE_SIDES_PX; 1: the same."""
    result = {}
    for side in EDGE_SIDES_PX:
        height, width = fit(content.shape[:2], side)
        first, second = (_gradient_magnitude(picture, height, width) for picture in (image, content))
        result[f"at {side} px"] = float(np.corrcoef(first, second)[0, 1])
    return result


def _gradient_magnitude(image: ndarray, height: int, width: int) -> ndarray:
    y_11HW = torch.from_numpy(luminance(image))[None, None]
    reduced = F.interpolate(y_11HW, (height, width), mode="bilinear", antialias=True)[0, 0].numpy()
    return np.hypot(*np.gradient(reduced)).ravel()


def specks(image: ndarray, levels: float = SPECK_LEVELS) -> float:
    """Pixels whose Y differs from the median of their 3×3 neighbourhood by more than `levels`, per mille."""
    y_HW = luminance(image)
    padded = np.pad(y_HW, 1, mode="edge")
    height, width = y_HW.shape
    around = torch.from_numpy(np.stack([padded[i : i + height, j : j + width] for i, j in np.ndindex(3, 3)]))
    return float(1000 * np.mean(np.abs(y_HW - around.median(dim=0).values.numpy()) > levels))


def psnr(image: ndarray, reference: ndarray) -> float:
    """10·log10(255² / mean squared difference), in dB; infinite for equal images."""
    squares = np.square(image.astype(np.float64) - reference).mean()
    return float(10 * np.log10(255**2 / squares)) if squares else float("inf")


# ----------------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class Moments:
    """Of a layer's features, float64: the mean φ, (C,), and the mean Gram matrix φφᵀ, (C, C)."""

    mean_C: ndarray
    gram_CC: ndarray


def moments(network: NetworkSpec, image: ndarray, layers: tuple[str, ...] = STYLE_LAYERS) -> dict[str, Moments]:
    """Moments of the features after ReLU at each layer that the network has, summed over tiles with their halo."""
    height, width = image.shape[:2]
    names = {name for name in layers if name in network.source.widths}
    sums: dict[str, list[Any]] = {name: [0.0, 0.0] for name in names}
    for tile in grid(height, width, TILE_PX):
        outer = tile.outer(halo_px(names, network.pooling))
        pixels_HWC = np.ascontiguousarray(image[outer.y0 : outer.y1, outer.x0 : outer.x1], np.float32)
        pixels_1CHW = torch.from_numpy(pixels_HWC).to(network.device).permute(2, 0, 1)[None]
        with torch.no_grad():
            for found in get_network(network).features(pixels_1CHW, outer, (height, width), names, tile.inner):
                rows, columns = tile.inner.positions(found.layer).within(found.region)
                features_Cn = found.features_1CHW[0, :, rows, columns].flatten(1).double()
                sums_C_CC = sums[found.layer.name]
                sums_C_CC[0] += features_Cn.sum(1).cpu().numpy()
                sums_C_CC[1] += (features_Cn @ features_Cn.T).cpu().numpy()
    whole = Rect(0, height, 0, width)
    number = {name: whole.positions(LAYER_BY_NAME[name]).area for name in names}
    return {name: Moments(*(total / number[name] for total in sums[name])) for name in sorted(names)}


def gram_distance(image: Moments, style: Moments) -> float:
    """‖G − G_s‖² / ‖G_s‖² of mean Gram matrices."""
    return float(np.sum((image.gram_CC - style.gram_CC) ** 2) / np.sum(style.gram_CC**2))


def w2_distance(image: Moments, style: Moments) -> float:
    """[‖μ − μ_s‖² + tr(Σ + Σ_s − 2 (R Σ R)^½)] / tr(Σ_s), R = Σ_s^½: the squared Wasserstein distance of two Gaussians.

    Roots by float64 eigh; ε·I is added to both covariances. 0: the same mean and covariance.
    """
    covariances = [side.gram_CC - np.outer(side.mean_C, side.mean_C) for side in (image, style)]
    epsilon = EPSILON * np.trace(covariances[1]) / len(style.mean_C)
    sigma, sigma_s = (covariance + epsilon * np.eye(len(covariance)) for covariance in covariances)
    values, vectors = np.linalg.eigh(sigma_s)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ sigma @ root), 0)).sum()  # tr (R Σ R)^½
    means = np.sum((image.mean_C - style.mean_C) ** 2)
    squared = means + np.trace(sigma) + np.trace(sigma_s) - 2 * shared
    return max(0.0, float(squared / np.trace(sigma_s)))  # rounding can make an exact 0 negative


def layer_distances(image: dict[str, Moments], style: dict[str, Moments]) -> dict[str, float]:
    """`gram_distance` and `w2_distance` of every layer, by "Gram LAYER" and "W2 LAYER"."""
    kinds = {"Gram": gram_distance, "W2": w2_distance}
    return {f"{kind} {name}": distance(image[name], style[name]) for kind, distance in kinds.items() for name in style}
