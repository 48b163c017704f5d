"""Draw the pictures that the packaged style network is trained on: landscapes, shaded objects before each other, noise.

    python -m tools.feedforward.training_pictures out/pictures --number 160

A style network only needs pictures with the statistics of photographs: edges between textured, shaded areas of all
sizes. These are drawn, so the weights may be published without a photographer's consent. Every picture depends on the
seed and its number alone. Axes: rows down, columns right; colours are RGB, 0..1, until a picture is written.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import pyvips
from numpy import ndarray
from numpy.random import Generator

from tools.distill import training_images
from tools.docs import make_samples
from tools.docs.make_samples import clouds, mix

SIZE_PX = 544


def draw(rng: Generator) -> ndarray:
    """One picture: of every ten, four landscapes, five of objects, one of stripes, leaves or noise."""
    kind = rng.integers(10)
    if kind < 4:
        return jittered(rng, landscape(rng))
    if kind < 9:
        return jittered(rng, objects(rng))
    return np.clip(training_images.generate(rng, SIZE_PX) / 255, 0, 1)


def landscape(rng: Generator) -> ndarray:
    """The landscape of the samples with another seed, at another time of the day; half of them only a part of it."""
    oversampling, size = make_samples.OVERSAMPLING, make_samples.LANDSCAPE_PX
    make_samples.OVERSAMPLING, make_samples.LANDSCAPE_PX = 1, (SIZE_PX, SIZE_PX * 4 // 3)
    try:
        return make_samples.draw_landscape(rng)
    finally:
        make_samples.OVERSAMPLING, make_samples.LANDSCAPE_PX = oversampling, size


def objects(rng: Generator) -> ndarray:
    """Rounded objects of all sizes before each other, each with a texture, lit from one side, with a soft shadow."""
    shape = (SIZE_PX, SIZE_PX)
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX] / SIZE_PX
    palette = rng.random((int(rng.integers(4, 10)), 3)) ** rng.uniform(0.7, 1.6)
    palette = palette.mean(1, keepdims=True) + rng.uniform(0.2, 0.9) * (palette - palette.mean(1, keepdims=True))
    image = shaded(rng, palette[0], clouds(rng, shape, rng.uniform(1, 2.4)), 0.3 * (y - 0.5))
    light = rng.uniform(0, 2 * np.pi)
    textures = [clouds(rng, shape, rng.uniform(0.6, 2.2), rng.choice([1.0, 1.0, 4.0])) for _ in range(5)]
    for _ in range(int(rng.integers(25, 140))):
        radius = min(0.045 / np.sqrt(rng.uniform(0.006, 1)), 0.4)
        dy, dx = y - rng.uniform(-0.1, 1.1), x - rng.uniform(-0.1, 1.1)
        turn, long = rng.uniform(0, np.pi), rng.uniform(1, 3)
        along, across = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
        power = rng.choice([2, 2, 3, 8])
        texture = textures[rng.integers(len(textures))]
        distance = (np.abs(along / long) ** power + np.abs(across) ** power) ** (1 / power) / radius
        distance = distance + rng.uniform(0, 0.12) * texture
        shadow = np.clip(1.35 - distance, 0, 0.35) * rng.uniform(0, 1.2)
        image = image * (1 - shadow[..., None])
        colour = palette[rng.integers(len(palette))] + rng.normal(0, 0.06, 3)
        slope = (dx * np.cos(light) + dy * np.sin(light)) / radius
        soft_px = rng.uniform(0.7, 4) / SIZE_PX / radius
        image = mix(image, shaded(rng, colour, texture, 0.3 * slope), (1 - distance) / soft_px)
    return image


def shaded(rng: Generator, colour: ndarray, texture: ndarray, slope: ndarray) -> ndarray:
    """A surface of one colour with its texture, lighter where `slope` is positive."""
    return np.clip(colour * (1 + rng.uniform(0.02, 0.2) * texture + slope)[..., None], 0, 1)


def jittered(rng: Generator, image: ndarray) -> ndarray:
    """Another exposure, contrast, saturation and white balance; mirrored in half of the cases."""
    grey = image.mean(2, keepdims=True)
    image = np.clip(grey + (image - grey) * rng.uniform(0.3, 1.5), 0, 1) ** rng.uniform(0.6, 1.7)
    image = image * rng.uniform(0.8, 1.2, 3) + rng.normal(0, 0.05)
    order = rng.permutation(3) if rng.random() < 0.3 else np.arange(3)  # a sky of another colour
    return np.clip(image[..., order], 0, 1)


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--number", default=160, type=click.IntRange(1), show_default=True)
@click.option("--seed", default=18, type=click.IntRange(0), show_default=True)
def main(folder: Path, number: int, seed: int) -> None:
    draw_pictures(folder, number, seed)


def draw_pictures(folder: Path, number: int, seed: int) -> None:
    """Draw the pictures that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        path = folder / f"{index:04}.png"
        if path.exists():
            continue
        picture = np.rint(255 * draw(np.random.default_rng([seed, index]))).astype(np.uint8)
        partial = path.with_name(f"{index:04}.partial.png")
        pyvips.Image.new_from_array(picture, interpretation="srgb").pngsave(str(partial), compression=2, keep="none")
        partial.replace(path)


if __name__ == "__main__":
    main()
