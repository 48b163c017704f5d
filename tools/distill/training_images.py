"""The training images of distill_network.py: jittered crops of photographs, and generated images.

Everything is a function of a numpy generator, so that a step's batch depends on (seed, step) alone.
Images are (H, W, 3) float32 RGB, 0..255.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyvips
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"}


def list_images(folders: tuple[str, ...]) -> list[Path]:
    """All image files of the folders, in the order of their names."""
    paths = [path for folder in folders for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES]
    return sorted(paths, key=lambda path: (path.name, str(path)))


def read_image(path: Path) -> np.ndarray:
    """An image file as 8-bit RGB, (H, W, 3)."""
    image = pyvips.Image.new_from_file(str(path)).autorot().colourspace("srgb").cast("uchar")
    image = image.extract_band(0, n=3) if image.bands >= 3 else image.extract_band(0).bandjoin([image[0], image[0]])
    return image.numpy()


def to_batch(images: list[np.ndarray], device: str) -> Tensor:
    """Images of one size as a (B, 3, H, W) float tensor."""
    stacked = torch.from_numpy(np.stack(images)).to(device, torch.float32)
    return stacked.permute(0, 3, 1, 2)  # channels-last in memory, the network's layout


def make_batch(rng: Generator, paths: list[Path], count: int, crop_px: int, generated: float) -> list[np.ndarray]:
    """`count` training images of `crop_px`²: a share of about `generated` is generated, the rest are photographs."""
    images = []
    for _ in range(count):
        is_generated = rng.random() < generated or not paths
        image = (
            generate(rng, crop_px) if is_generated else crop(rng, read_image(paths[rng.integers(len(paths))]), crop_px)
        )
        images.append(jitter(rng, image))
    return images


def crop(rng: Generator, image: np.ndarray, crop_px: int) -> np.ndarray:
    """A random square of the image, scaled by 0.5 to 2 to crop_px, in half of the cases mirrored."""
    scale = max(2.0 ** rng.uniform(-1, 1), crop_px / min(image.shape[:2]))
    side = min(round(crop_px / scale), *image.shape[:2])
    y, x = (rng.integers(size - side + 1) for size in image.shape[:2])
    window = torch.from_numpy(image[y : y + side, x : x + side].astype(np.float32)).permute(2, 0, 1)[None]
    resized = F.interpolate(window, (crop_px, crop_px), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    resized = resized[:, ::-1] if rng.random() < 0.5 else resized
    return resized[::-1] if rng.random() < 0.1 else resized


def jitter(rng: Generator, image: np.ndarray) -> np.ndarray:
    """Change contrast, brightness, saturation and white balance; one image in four gets noise, as a canvas has."""
    image = image.astype(np.float32)
    grey = image.mean(axis=2, keepdims=True)
    image = grey + (image - grey) * rng.uniform(0.2, 1.8)
    mean = image.mean()
    image = (image - mean) * rng.uniform(0.6, 1.4) + mean + rng.normal(0, 20)
    image = image * rng.uniform(0.85, 1.15, 3)
    if rng.random() < 0.25:
        image = image + rng.normal(0, rng.uniform(2, 25), image.shape)
    return np.ascontiguousarray(np.clip(image, 0, 255), dtype=np.float32)


def generate(rng: Generator, size_px: int) -> np.ndarray:
    """One image of edges, dead leaves or noise."""
    makers: tuple[Callable[[Generator, int], np.ndarray], ...] = (edges, dead_leaves, noise)
    return makers[rng.integers(len(makers))](rng, size_px)


def edges(rng: Generator, size_px: int) -> np.ndarray:
    """Bent stripes or steps of two to four colours, from sharp to soft, from 3 px to the whole image wide."""
    y, x = np.mgrid[:size_px, :size_px].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    period_px = 2 ** rng.uniform(2.6, np.log2(2 * size_px))
    bend = rng.uniform(0, 0.5) * period_px * np.sin(along * 2 * np.pi / rng.uniform(40, 400) + rng.uniform(0, 6))
    colours = rng.uniform(0, 255, (rng.integers(2, 5), 3))
    position = ((across + bend) / period_px + rng.random()) * len(colours)
    soft = rng.uniform(0.02, 1.0)  # width of the transition relative to a stripe
    whole = np.floor(position)
    blend = np.clip((position - whole - 1) / soft + 1, 0, 1)[..., None]
    first = whole.astype(int) % len(colours)
    return colours[first] * (1 - blend) + colours[(first + 1) % len(colours)] * blend


def dead_leaves(rng: Generator, size_px: int) -> np.ndarray:
    """Overlapping ellipses and bars with sizes by an inverse power law; long ones resemble brush strokes."""
    image = np.empty((size_px, size_px, 3), np.float32)
    palette = rng.uniform(0, 255, (rng.integers(3, 9), 3))
    image[:] = palette[0]
    stretch, spread = rng.uniform(0.1, 1), rng.uniform(0, np.pi)
    smallest_px, direction = rng.uniform(2, 6), rng.uniform(0, np.pi)
    for _ in range(rng.integers(150, 900)):
        radius = min(smallest_px / np.sqrt(rng.uniform(0.002, 1)), size_px / 3)
        centre_y, centre_x = rng.uniform(-radius, size_px + radius, 2)
        top, left = (max(0, int(c - radius)) for c in (centre_y, centre_x))
        window = image[top : max(0, int(centre_y + radius) + 1), left : max(0, int(centre_x + radius) + 1)]
        y, x = np.ogrid[: window.shape[0], : window.shape[1]]
        y, x = y + top - centre_y, x + left - centre_x
        angle = direction + rng.uniform(-spread, spread)
        along, across = x * np.cos(angle) + y * np.sin(angle), (y * np.cos(angle) - x * np.sin(angle)) / stretch
        power = 2 if rng.random() < 0.7 else 8
        inside = np.abs(along / radius) ** power + np.abs(across / radius) ** power < 1
        window[inside] = palette[rng.integers(len(palette))] + rng.normal(0, 12, 3)
    return image


def noise(rng: Generator, size_px: int) -> np.ndarray:
    """Noise with the spectrum 1/f^slope, slope 0 (white) to 3 (clouds), and partly correlated channels."""
    fy, fx = np.fft.fftfreq(size_px)[:, None], np.fft.rfftfreq(size_px)[None]
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(size=(3, size_px, size_px))) * frequency ** -rng.uniform(0, 3)
    fields = np.fft.irfft2(spectrum, s=(size_px, size_px)).transpose(1, 2, 0)
    mixed = fields @ (rng.normal(size=(3, 3)) + np.ones((3, 3)) * rng.uniform(0, 2))
    mixed = (mixed - mixed.mean()) / mixed.std()
    return mixed * rng.uniform(5, 70) + rng.uniform(40, 215, 3)
