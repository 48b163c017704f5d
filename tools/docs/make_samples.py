"""Draw the two images of configs/quickstart.yaml: a landscape at dusk, and a painting of thousands of brush strokes.

    python -m tools.docs.make_samples configs/samples

The seed is fixed, so the images are reproducible. Both are drawn at twice their size and reduced, which smooths edges.
Axes: rows down, columns right; colours are RGB, 0..1, until the image is written.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import pyvips
from numpy import ndarray
from numpy.random import Generator

OVERSAMPLING = 2
LANDSCAPE_PX = (768, 1024)
STROKES_PX = (640, 800)


def rgb(code: str) -> ndarray:
    """A colour from its hexadecimal code."""
    return np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)]) / 255


def clouds(rng: Generator, shape: tuple[int, int], slope: float, stretch: float = 1.0) -> ndarray:
    """Noise with a spectrum 1/f^slope, `stretch` times longer in x than in y, mean 0, deviation 1."""
    height, width = shape
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None] * stretch
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(np.fft.rfft2(rng.normal(size=shape)) * frequency**-slope, s=shape)
    return (field - field.mean()) / field.std()


def mix(first: ndarray, second: ndarray, share: ndarray) -> ndarray:
    """`first` where share is 0, `second` where it is 1."""
    share = np.clip(share, 0, 1)[..., None]
    return first * (1 - share) + second * share


def gradient(position: ndarray, stops: list[tuple[float, str]]) -> ndarray:
    """The colours at `position` along the given stops."""
    places = [place for place, _ in stops]
    colours = np.array([rgb(code) for _, code in stops])
    return np.stack([np.interp(position, places, colours[:, channel]) for channel in range(3)], -1)


def reduced(image: ndarray) -> pyvips.Image:
    """The image reduced by OVERSAMPLING, in 8 bits."""
    large = pyvips.Image.new_from_array((np.clip(image, 0, 1) * 255).astype(np.float32))
    return large.resize(1 / OVERSAMPLING, kernel="lanczos3").rint().cast("uchar").copy(interpretation="srgb")


def save(image: ndarray, path: Path, quality: int) -> None:
    """Reduce by OVERSAMPLING and write a JPEG."""
    reduced(image).jpegsave(str(path), Q=quality, optimize_coding=True, keep="none")


# ---------------------------------------------------------------------------------------------------- the landscape


def draw_landscape(rng: Generator) -> ndarray:
    """Sky and sun, five ranges of mountains, a lake that mirrors them, a shore with pines and a house."""
    height, width = (side * OVERSAMPLING for side in LANDSCAPE_PX)
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    sun = (0.435, 0.60)
    image = draw_sky(rng, y, x, sun)
    image = draw_mountains(rng, image, y, x, sun)
    image = draw_lake(rng, image, y, x, sun)
    image = draw_shore(rng, image, y, x)
    draw_house(image, int(0.815 * height), int(0.755 * width), height // 11)
    for row, column, size in pine_places(rng):
        draw_pine(rng, image, int(row * height), int(column * width), int(size * height))
    return image


def draw_sky(rng: Generator, y: ndarray, x: ndarray, sun: tuple[float, float]) -> ndarray:
    sky = gradient(y, [(0, "1d3f7d"), (0.16, "3f6fae"), (0.29, "93a3c4"), (0.38, "f0b79a"), (0.46, "ffd98f")])
    distance = np.hypot((y - sun[0]) * 0.75, x - sun[1])
    sky = mix(sky, rgb("ffe3a0"), 0.85 * np.exp(-((distance / 0.16) ** 2)))
    cover = clouds(rng, y.shape, 1.75, 4.0) + 0.35 * clouds(rng, y.shape, 1.2, 2.5)
    lit = cover - np.roll(cover, -24, axis=0)  # the underside of a cloud faces the low sun
    thickness = np.clip((cover + 0.1) / 1.3, 0, 1) * np.clip(1.15 - y / 0.46, 0, 1)
    shade = mix(np.broadcast_to(rgb("5b6396"), sky.shape), rgb("ffb58a"), 0.45 + 0.9 * lit + 0.9 * (y - 0.15))
    sky = mix(sky, shade, 0.85 * thickness)
    return mix(sky, rgb("fff7d6"), (0.034 - distance) / 0.0012)


def ridge_line(rng: Generator, width: int, level: float, relief: float, slope: float) -> ndarray:
    """The height of a mountain range at every column, as a fraction of the image height."""
    line = clouds(rng, (8, width), slope)[0]
    return level - relief * (np.abs(line) * 0.9 + 0.35 * line)


def draw_mountains(rng: Generator, image: ndarray, y: ndarray, x: ndarray, sun: tuple[float, float]) -> ndarray:
    ranges = (  # level, relief, roughness, shadow, light, lower end of the snow
        (0.480, 0.070, 1.60, "7f80b0", "f0bfae", 0.440),
        (0.525, 0.098, 1.62, "464f8a", "e39a86", 0.435),
        (0.565, 0.065, 1.50, "34487a", "b5848c", 0.0),
        (0.600, 0.048, 1.40, "254a60", "7f9478", 0.0),
        (0.640, 0.036, 1.20, "17383f", "5c7f4c", 0.0),
    )
    for level, relief, slope, shadow, light, snow in ranges:
        top = ridge_line(rng, x.shape[1], level, relief, slope)
        rock = clouds(rng, y.shape, 1.8, 0.85)
        facing = np.gradient(rock, axis=1) * np.sign(sun[1] - x) - 0.5 * np.gradient(rock, axis=0)
        leaning = np.convolve(np.gradient(top), np.hanning(63) / 31, "same")[None] * np.sign(sun[1] - x)
        facing = np.tanh(facing / facing.std()) + 0.9 * np.tanh(900 * leaning)
        colour = mix(np.broadcast_to(rgb(shadow), image.shape), rgb(light), 0.42 + 0.42 * facing)
        white = mix(np.broadcast_to(rgb("93a2d4"), image.shape), rgb("fff1e2"), 0.55 + 0.45 * facing)
        colour = mix(colour, white, (snow + 0.022 * rock + 0.012 * facing - y) / 0.004)
        colour = mix(colour, rgb("f2c9ac"), np.clip((y - level + 0.03) / 0.09, 0, 1) * 0.55 * (0.66 - level) / 0.19)
        image = mix(image, colour, (y - top[None]) * y.shape[0])
    return image


def draw_lake(rng: Generator, image: ndarray, y: ndarray, x: ndarray, sun: tuple[float, float]) -> ndarray:
    height, width = y.shape
    shore = int(0.625 * height)
    down = np.arange(shore, height)
    ripple = clouds(rng, (height - shore, width), 0.9, 9.0)
    nearness = ((down - shore) / (height - shore))[:, None]
    rows = 2 * shore - down[:, None] * 1.12 + 0.12 * shore + ripple * (2 + 26 * nearness)
    columns = np.arange(width)[None] + ripple * 3 * nearness
    mirrored = image[np.clip(rows, 0, shore - 1).astype(int), np.clip(columns, 0, width - 1).astype(int)]
    water = mix(mirrored * np.array([0.80, 0.86, 0.92]), rgb("173a63"), 0.12 + 0.35 * nearness + 0.06 * ripple)
    glitter = np.exp(-(((x[shore:] - sun[1]) / (0.03 + 0.07 * nearness)) ** 2)) * np.clip(ripple - 0.35, 0, 1)
    water = mix(water, rgb("ffdf9e"), 0.9 * glitter * (1 - 0.5 * nearness))
    image[shore:] = water
    line = np.abs(y - 0.625) * height
    return mix(image, rgb("16323a"), (4 + 2 * clouds(rng, (8, width), 1.3)[:1] - line) / 2)


def draw_shore(rng: Generator, image: ndarray, y: ndarray, x: ndarray) -> ndarray:
    height, width = y.shape
    line = 0.885 - 0.10 * np.exp(-(((x[0] - 0.89) / 0.21) ** 2)) - 0.085 * np.exp(-(((x[0] - 0.02) / 0.16) ** 2))
    line = line + 0.006 * clouds(rng, (8, width), 1.3)[0]
    depth = (y - line[None]) * height
    meadow = clouds(rng, y.shape, 0.9, 0.35) * 0.5 + clouds(rng, y.shape, 1.8, 3.0) * 0.5
    colour = gradient(0.42 + 0.22 * meadow - 0.9 * (y - 0.86), [
        (0.0, "0f2415"), (0.3, "27461f"), (0.5, "58712a"), (0.7, "a39a3c"), (0.95, "e6c765"),
    ])  # fmt: skip
    flowers = (rng.random(y.shape) < 0.0011) & (depth > 14)
    for offset in np.ndindex(5, 5):
        spots = np.roll(flowers, offset, (0, 1))
        colour[spots] = rgb(("e8583f", "f6d35b", "efe6e9")[int(meadow[0, 0] * 1e6) % 3]) * (0.8 + 0.05 * offset[0])
    colour = mix(colour, rgb("0d2221"), (9 - depth) / 9)
    return mix(image, colour, depth)


def draw_house(image: ndarray, bottom: int, left: int, size: int) -> None:
    """A gable and a side wall under a red roof, two lit windows, a chimney; `size` is the height of the wall."""
    wide, deep, high = int(0.9 * size), int(1.5 * size), int(0.62 * size)
    top = bottom - high
    image[top:bottom, left : left + wide] = rgb("d9b98c")
    image[top:bottom, left + wide : left + wide + deep] = rgb("8d6a58")
    for row in range(int(0.55 * size)):  # the gable, and the roof beside it, row by row from the ridge
        half = int(row / (0.55 * size) * wide / 2)
        middle, y = left + wide // 2, top - int(0.55 * size) + row
        image[y, middle + half : middle + half + deep + 6] = rgb("a8402f") * (0.82 + 0.18 * ((row // 6) % 2))
        image[y, middle - half : middle + half] = rgb("e3c79b")
        image[y, middle - half - 7 : middle - half + 2] = rgb("6d2a24")
    for x in (left + wide + deep // 5, left + wide + 3 * deep // 5):
        image[top + high // 4 : top + 2 * high // 3, x : x + deep // 6] = rgb("ffd873")
    image[bottom - int(0.42 * size) : bottom, left + wide // 3 : left + 2 * wide // 3] = rgb("5a3526")
    chimney = left + wide + deep // 2
    image[top - int(0.75 * size) : top - int(0.35 * size), chimney : chimney + size // 7] = rgb("7b4b40")


def pine_places(rng: Generator) -> list[tuple[float, float, float]]:
    """(foot, column, height) of every pine, the farther ones first."""
    far = [(0.632 + 0.008 * rng.random(), rng.random(), rng.uniform(0.02, 0.05)) for _ in range(90)]
    far = [place for place in far if not 0.52 < place[1] < 0.68]
    right = [(0.80 + 0.04 * rng.random(), rng.uniform(0.90, 1.0), rng.uniform(0.22, 0.36)) for _ in range(7)]
    left = [(0.82 + 0.07 * rng.random(), rng.uniform(-0.01, 0.19), rng.uniform(0.16, 0.42)) for _ in range(8)]
    small = [(0.83 + 0.03 * rng.random(), rng.uniform(0.68, 0.74), rng.uniform(0.07, 0.13)) for _ in range(4)]
    return sorted(far + right + left + small)


def draw_pine(rng: Generator, image: ndarray, foot: int, column: int, size: int) -> None:
    """A pine of hanging branches, lit from the right; a far one is paler."""
    height, width = image.shape[:2]
    haze = np.clip(0.45 - size / height * 3, 0, 0.45)
    dark, light = (mix(rgb(code), rgb("55708a"), np.array(haze)) for code in ("0b1f1c", "4f7038"))
    image[foot - size // 8 : foot, max(0, column - size // 60) : max(0, column + size // 60 + 1)] = dark * 0.8
    whorls = max(6, size // 22)
    reach = rng.uniform(0.75, 1.15, (whorls + 1, 2))  # of every whorl, to the left and to the right
    for row in range(size):
        y = foot - size // 14 - size + row
        if not 0 <= y < height:
            continue
        part = row / size
        within = part * whorls % 1  # from the top of a whorl of branches to its tips
        half = size * 0.17 * (part**0.85) * (0.45 + 0.7 * within) + 1
        left, right = half * reach[int(part * whorls)] * rng.uniform(0.75, 1.15, 2)
        first, last = int(max(0, column - left)), int(min(width, column + right))
        if last > first:
            across = (np.arange(first, last) - column) / half
            needles = rng.random(last - first)
            image[y, first:last] = mix(dark, light, (0.25 + 0.45 * across - 0.5 * within + 0.55 * needles) * 0.9)


# ------------------------------------------------------------------------------------------------------ the painting


def draw_strokes(rng: Generator) -> ndarray:
    """A night of whirling suns over a field and cypresses: coats of curved strokes, from broad to fine, with relief."""
    height, width = (side * OVERSAMPLING for side in STROKES_PX)
    y, x = np.mgrid[:height, :width] / height
    whirls = [(0.24, 0.30, 0.13), (0.17, 0.98, 0.15), (0.40, 0.66, 0.09), (0.47, 1.16, 0.07), (0.50, 0.10, 0.06)]
    direction = flow(rng, y, x, whirls)
    colours = motif(rng, y, x, whirls)
    image = 0.75 * colours
    relief = np.zeros((height, width))
    for count, length, breadth in ((1500, 170, 30), (4200, 120, 17), (6500, 80, 10), (3500, 48, 6)):
        for _ in range(count):
            start = rng.uniform(-breadth * 2, (height + breadth * 2, width + breadth * 2))
            row, column = (int(np.clip(place, 0, side - 1)) for place, side in zip(start, relief.shape, strict=True))
            colour = pick_colour(rng, colours[row, column])
            path = follow(direction, start, int(rng.uniform(0.6, 1.3) * length / 3) + 2)
            paint_stroke(rng, (image, relief), path, rng.uniform(0.6, 1.3) * breadth, colour)
    light = np.gradient(relief, axis=0) + np.gradient(relief, axis=1)
    return image * (1 - 0.32 * np.tanh(1.2 * light))[..., None]


def flow(rng: Generator, y: ndarray, x: ndarray, whirls: list[tuple[float, float, float]]) -> ndarray:
    """Direction of the strokes, in radians: waves in the sky, rings round the suns, rows in the field."""
    down, right = 0.35 * np.sin(4.2 * x + 2.5 * y) + 0.25 * clouds(rng, y.shape, 2.5), np.ones_like(x)
    for index, (centre_y, centre_x, size) in enumerate(whirls):
        dy, dx = y - centre_y, x - centre_x
        pull = 6 * np.exp(-((np.hypot(dy, dx) / (1.5 * size)) ** 2)) / size * (-1) ** index
        down, right = down + pull * dx, right - pull * dy
    field = np.clip((y - horizon(x)) * 40, 0, 1)
    down = down * (1 - field) + field * (0.55 * np.sin(7 * x) + 0.8 * (x - 0.6))
    upright = cypress(y, x) > 0
    return np.where(upright, np.pi / 2 + 0.35 * np.sin(28 * y + 9 * x), np.arctan2(down, right))


def horizon(x: ndarray) -> ndarray:
    return 0.66 + 0.035 * np.sin(3.1 * x + 0.4) + 0.02 * np.sin(8 * x)


def cypress(y: ndarray, x: ndarray) -> ndarray:
    """Positive inside the cypresses: (column, top, half-width)."""
    inside = np.full(y.shape, -1.0)
    for column, top, half in ((0.46, 0.30, 0.050), (0.53, 0.43, 0.038), (1.08, 0.56, 0.030)):
        part = np.clip((y - top) / (0.93 - top), 0, 1)
        outline = half * np.sin(np.pi * part**0.75) ** 0.8 * (1 + 0.15 * np.sin(50 * y + 4 * x))
        inside = np.maximum(inside, np.where(part > 0, outline - np.abs(x - column), -1))
    return inside


def motif(rng: Generator, y: ndarray, x: ndarray, whirls: list[tuple[float, float, float]]) -> ndarray:
    """The colour of every pixel before the image is broken into strokes."""
    tone = 0.5 + 0.16 * clouds(rng, y.shape, 2.0, 2.5) + 0.12 * np.sin(16 * y + 5 * np.sin(3 * x))
    sky = gradient(tone, [
        (0.1, "14204f"), (0.35, "1f4690"), (0.5, "2f78b4"), (0.65, "58a9b8"), (0.8, "a7d0b4"), (0.95, "eee9c0"),
    ])  # fmt: skip
    for centre_y, centre_x, size in whirls:
        radius = np.hypot(y - centre_y, x - centre_x) / size
        rings = gradient(radius + 0.05 * np.sin(9 * radius), [
            (0, "fff3b0"), (0.3, "ffd23f"), (0.5, "f2912b"), (0.68, "ffe07a"), (0.85, "c96a3a"), (1.0, "7fb7a0"),
            (1.2, "d9dfa0"), (1.4, "3a83b0"),
        ])  # fmt: skip
        sky = mix(sky, rings, (1.5 - radius) / 0.35)
    rows = 0.5 + 0.28 * np.sin(60 * (y - 0.35 * np.cos(7 * x) * 0.1) + 5 * x) + 0.15 * clouds(rng, y.shape, 1.6, 3.0)
    field = gradient(rows + 0.5 * (0.8 - y), [
        (0.0, "5b2a2a"), (0.2, "a4452c"), (0.4, "d9822b"), (0.6, "efb73e"), (0.8, "f7dc7a"), (1.0, "8fae4a"),
    ])  # fmt: skip
    land = mix(sky, field, (y - horizon(x)) * 150)
    hills = 0.60 + 0.05 * np.sin(5 * x + 2) + 0.02 * np.sin(13 * x)
    blue = gradient(tone, [(0.2, "1c2c5e"), (0.5, "35568f"), (0.8, "6d6aa8")])
    land = np.where(((y > hills) & (y < horizon(x)))[..., None], blue, land)
    tree = gradient(0.5 + 0.3 * clouds(rng, y.shape, 1.5), [(0.1, "0d1f1c"), (0.5, "1f4a33"), (0.9, "5d7a34")])
    return mix(land, tree, cypress(y, x) * 400)


def pick_colour(rng: Generator, colour: ndarray) -> ndarray:
    """The colour of a stroke: near the scene's colour, sometimes bolder or complementary."""
    colour = colour + rng.normal(0, 0.035, 3) + rng.normal(0, 0.05)
    if rng.random() < 0.10:
        colour = colour * 0.7 + 0.3 * rgb(("e4572e", "f3e9d2", "2e86ab", "8e5572", "f9c22e")[rng.integers(5)])
    return colour


def paint_stroke(
    rng: Generator, canvas: tuple[ndarray, ndarray], path: ndarray, breadth: float, colour: ndarray
) -> None:
    """Lay one stroke along a path on (image, relief): bristles give it streaks and relief, its ends are ragged."""
    image, relief = canvas
    height, width = relief.shape
    steps = np.linspace(0, len(path) - 1, int(len(path) * 4.5))
    spine = np.stack([np.interp(steps, np.arange(len(path)), path[:, axis]) for axis in range(2)], -1)
    along = np.gradient(spine, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True) + 1e-9
    across = np.linspace(-1, 1, int(breadth * 1.6) + 2)
    bristles = np.convolve(rng.normal(size=len(across) + 2), (0.3, 0.5, 0.3), "valid")
    part = np.linspace(0, 1, len(steps))[:, None]
    taper = np.minimum(1, np.minimum(part * 7, (1 - part) * 4)) ** 0.5
    offset = across[None] * breadth / 2 * taper
    points = spine[:, None] + offset[..., None] * np.stack([along[:, 1], -along[:, 0]], -1)[:, None]
    rows, columns = np.moveaxis(np.rint(points).astype(int), -1, 0)
    ragged = (part < 0.86 + 0.09 * bristles) & (part > 0.02 + 0.03 * bristles)
    inside = ragged & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    streaks = np.broadcast_to(0.055 * bristles * (1 + 0.5 * part), inside.shape)[inside]
    image[rows[inside], columns[inside]] = colour + streaks[:, None]
    ridge = 0.55 * bristles + 1.3 * np.abs(across) ** 3 + 0.5 * part
    relief[rows[inside], columns[inside]] = np.broadcast_to(ridge * (0.5 + breadth / 40), inside.shape)[inside]


def follow(direction: ndarray, start: ndarray, count: int) -> ndarray:
    """A path of `count` points, 3 px apart, along the field of directions."""
    height, width = direction.shape
    path = np.empty((count, 2))
    path[0] = start
    for index in range(1, count):
        y, x = path[index - 1]
        angle = direction[min(max(int(y), 0), height - 1), min(max(int(x), 0), width - 1)]
        path[index] = y + 3 * np.sin(angle), x + 3 * np.cos(angle)
    return path


@click.command(help="Draw landscape.jpg and strokes.jpg into FOLDER.")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", default=7, type=click.IntRange(0), show_default=True)
def main(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save(draw_landscape(np.random.default_rng([seed, 0])), folder / "landscape.jpg", 82)
    save(draw_strokes(np.random.default_rng([seed, 1])), folder / "strokes.jpg", 80)


if __name__ == "__main__":
    main()
