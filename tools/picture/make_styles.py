"""Draw style pictures of different kinds for the picture lab, and a line sketch of a photograph.

    python -m tools.picture.make_styles out/styles --sketch PHOTOGRAPH

The seed is fixed, so the images are reproducible. Like tools/docs/make_samples.py, each is drawn at twice its size and
reduced; rows down, columns right, colours RGB 0..1. They are PNG files: a JPEG's blocks are a lattice of 8 px.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pyvips
from numpy import ndarray
from numpy.random import Generator

from tools.docs.make_samples import (
    OVERSAMPLING,
    clouds,
    follow,
    gradient,
    mix,
    paint_stroke,
    pick_colour,
    reduced,
    rgb,
    ridge_line,
)
from tools.picture.measures import luminance, read

STYLE_PX = (832, 1024)
SKETCH_PX = 1024


def coordinates() -> tuple[ndarray, ndarray]:
    """y and x of every pixel, both in units of the height."""
    height, width = (side * OVERSAMPLING for side in STYLE_PX)
    y, x = np.mgrid[:height, :width] / height
    return y, x


def ground(code: str, rng: Generator, grain: float = 0.012) -> ndarray:
    """A sheet of paper of one colour, with its grain."""
    y, _ = coordinates()
    return rgb(code) + grain * (clouds(rng, y.shape, 0.55) + 0.6 * clouds(rng, y.shape, 1.5))[..., None]


# ------------------------------------------------------------------------------------------------------------ impasto


def draw_impasto(rng: Generator) -> ndarray:
    """Autumn trees over water in broad, thick strokes, whose ridges are lit from the upper left."""
    y, x = coordinates()
    shape, shore = y.shape, 0.60
    sky = gradient(y + 0.06 * clouds(rng, shape, 2.0, 3.0), [(0, "8fb7c9"), (0.25, "dfe3cf"), (0.45, "f6dfa6")])
    crowns = 0.33 + 0.07 * np.sin(9 * x + 1) + 0.05 * np.sin(23 * x) + 0.04 * clouds(rng, shape, 1.8)
    foliage = gradient(0.5 + 0.2 * clouds(rng, shape, 1.7), [
        (0.05, "3b2430"), (0.3, "8c2f24"), (0.45, "d1551f"), (0.6, "eb9a26"), (0.75, "f4cf4d"), (0.95, "7d8c3a"),
    ])  # fmt: skip
    scene = mix(sky, foliage, (y - crowns) / 0.01)
    rows = np.clip(((2 * shore - y) * shape[0]).astype(int), 0, shape[0] - 1)
    water = mix(scene[rows, np.arange(shape[1])[None]], rgb("21506b"), 0.45 + 0.12 * clouds(rng, shape, 1.4, 5.0))
    scene = mix(scene, water, (y - shore) / 0.004)
    turning = 1.3 * clouds(rng, shape, 2.6) + 0.5 * np.sin(6 * x)
    direction = np.where(y > shore, 0.06 * turning, np.where(y > crowns, 1.2 + turning, 0.5 * turning))
    image, relief = 0.8 * scene, np.zeros(shape)
    for count, length, breadth in ((900, 230, 74), (2000, 150, 48), (1500, 90, 30)):
        for _ in range(count):
            start = rng.uniform(-breadth, np.add(shape, breadth))
            row, column = (int(np.clip(place, 0, side - 1)) for place, side in zip(start, shape, strict=True))
            path = follow(direction, start, int(rng.uniform(0.6, 1.3) * length / 3) + 2)
            colour = pick_colour(rng, scene[row, column])
            paint_stroke(rng, (image, relief), path, rng.uniform(0.7, 1.2) * breadth, colour)
    return lit(image, relief)


def lit(image: ndarray, relief: ndarray) -> ndarray:
    """Shade a relief of paint with light from the upper left, with gloss on the ridges."""
    large = pyvips.Image.new_from_array(relief.astype(np.float32))
    height = 0.5 * relief + 0.5 * large.gaussblur(3, precision="float").numpy()
    slope = np.tanh(0.7 * (np.gradient(height, axis=0) + np.gradient(height, axis=1)))
    return image * (1 - 0.42 * slope)[..., None] + (0.45 * np.clip(-slope - 0.45, 0, 1) ** 2)[..., None]


# ---------------------------------------------------------------------------------------------------------------- ink


def draw_ink(rng: Generator) -> ndarray:
    """Mountains in mist: washes of black ink that fade downwards, hatched with the pen, on pale paper."""
    y, _ = coordinates()
    shape = y.shape
    paper = ground("f1ece0", rng)
    image, relief = paper, np.zeros(shape)
    for level, rise, dark in ((0.34, 0.16, 0.22), (0.48, 0.15, 0.36), (0.66, 0.14, 0.56), (0.90, 0.12, 0.85)):
        top = ridge_line(rng, shape[1], level, rise, 1.45)
        depth = y - top[None] - 0.004 * clouds(rng, shape, 1.2)
        pooled = 0.75 + 0.25 * clouds(rng, shape, 1.5) + 0.7 * np.exp(-np.clip(depth, 0, None) / 0.008)
        wash = dark * np.exp(-np.clip(depth, 0, None) / 0.16) * pooled * np.clip(depth * 300, 0, 1)
        image = np.clip(mix(image, paper, np.where(depth > 0, 0.75 + depth, 0)), 0, 1)  # mist hides what is behind
        image = mix(image, rgb("1b1a1c"), wash)
        leaning = np.convolve(np.gradient(top) * shape[0], np.hanning(91) / 45, "same")
        direction = np.broadcast_to(np.arctan(1.6 * leaning) + 1.05, shape)
        for _ in range(int(3600 * dark)):
            column = rng.integers(shape[1])
            row = int((top[column] + rng.exponential(0.035)) * shape[0])
            path = follow(direction, np.array([row, column]), int(rng.uniform(8, 26)))
            paint_stroke(
                rng, (image, relief), path, rng.uniform(1.6, 4.2), rgb("1b1a1c") + rng.uniform(0.2, 0.6) * (1 - dark)
            )
        outline(rng, image, top, dark)
    for column, foot, size in ((0.16, 0.93, 0.42), (0.25, 0.97, 0.30), (1.10, 0.95, 0.36)):
        ink_pine(rng, image, column * shape[0], foot * shape[0], size * shape[0])
    return image


def outline(rng: Generator, image: ndarray, top: ndarray, dark: float) -> None:
    """Follow a ridge with a brush, whose pressure varies and which sometimes lifts."""
    columns, relief = np.arange(0, len(top), 4), np.zeros(image.shape[:2])
    pressure = 0.5 + 0.5 * clouds(rng, (8, len(columns)), 1.2)[0]
    for index in range(0, len(columns) - 30, 22):
        if (breadth := 7 * dark * pressure[index] + 2.5) > 2.6:
            part = columns[index : index + 27]
            path = np.stack([top[part] * image.shape[0], part], -1)
            paint_stroke(rng, (image, relief), dense(path), breadth, rgb("17161a") + 0.2 * (1 - dark))


def dense(path: ndarray) -> ndarray:
    """The same path in steps of at most 2 px, without which a stroke has gaps."""
    lengths = np.r_[0, np.cumsum(np.hypot(*np.diff(path, axis=0).T))]
    places = np.linspace(0, lengths[-1], int(lengths[-1] / 2) + 2)
    return np.stack([np.interp(places, lengths, path[:, axis]) for axis in range(2)], -1)


def ink_pine(rng: Generator, image: ndarray, column: float, foot: float, size: float) -> None:
    """A pine in brush strokes: a bent trunk, and fans of needles on its branches."""
    relief, ink = np.zeros(image.shape[:2]), rgb("121114")
    part = np.linspace(0, 1, 60)
    bend = 0.05 * size * np.sin(5 * part + rng.uniform(0, 3))
    trunk = np.stack([foot - size * part, column + bend], -1)
    paint_stroke(rng, (image, relief), dense(trunk), size / 22, ink)
    for step in range(14, 60, 3):
        reach = rng.uniform(0.6, 1.1) * 0.34 * size * (1.05 - part[step]) * rng.choice([-1, 1])
        along = np.linspace(0, 1, 24)
        branch = trunk[step] + np.stack([0.16 * abs(reach) * along**2, reach * along], -1)
        paint_stroke(rng, (image, relief), dense(branch), size / 90 + 2, ink)
        for place in branch[5:]:
            for angle in rng.uniform(-2.6, -0.5, 7):
                needle = place + np.outer(
                    np.linspace(0, rng.uniform(0.02, 0.05) * size, 8), (np.sin(angle), np.cos(angle))
                )
                paint_stroke(rng, (image, relief), dense(needle), 2.2, ink + rng.uniform(0, 0.15))


# --------------------------------------------------------------------------------------------------------------- dots


def draw_dots(rng: Generator) -> ndarray:
    """A bay with trees in separate dots of pure colours on a warm ground, coat over coat."""
    y, x = coordinates()
    shape = y.shape
    scene = gradient(y + 0.03 * clouds(rng, shape, 2.0, 3.0), [
        (0, "5f9bd0"), (0.2, "a7cfe0"), (0.40, "f7dcb0"), (0.42, "4a8fb5"), (0.62, "2f6f9f"), (0.70, "8bb7b0"),
    ])  # fmt: skip
    land = 0.66 + 0.14 * np.sin(2.4 * x + 0.3) + 0.015 * np.sin(17 * x)
    meadow = gradient(0.5 + 0.2 * clouds(rng, shape, 1.8), [(0.1, "3f7f3d"), (0.5, "a9bf45"), (0.9, "f2d65c")])
    scene = mix(scene, meadow, (y - land) / 0.004)
    for column, row, size in ((0.22, 0.38, 0.23), (0.50, 0.50, 0.13), (1.06, 0.44, 0.17)):
        scene = mix(scene, rgb("6b4a3a"), (0.1 * size - np.abs(x - column)) * 200 * ((y > row) & (y < row + 2 * size)))
        bulge = np.hypot(x - column, 1.15 * (y - row)) / size + 0.06 * clouds(rng, shape, 1.5)
        leaves = gradient((x - column - y + row) / size, [(-1.3, "6f9f3a"), (0, "2f6d4f"), (1.0, "2a3f7a")])
        scene = mix(scene, leaves, (1 - bulge) / 0.01)
    image = ground("d9a870", rng)
    pure = np.array([rgb(code) for code in ("e8452f", "f6c33b", "2d5fb3", "3fa05a", "f4efe2", "7a4a9e", "f08a3c")])
    for spacing, radius in ((17, 9.0), (15, 7.5), (13, 6.0)):
        places = np.stack(np.mgrid[0 : shape[0] : spacing, 0 : shape[1] : spacing], -1).reshape(-1, 2)
        places = places + rng.uniform(-spacing / 2, spacing / 2, places.shape)
        for row, column in rng.permutation(places):
            colour = scene[int(np.clip(row, 0, shape[0] - 1)), int(np.clip(column, 0, shape[1] - 1))]
            if rng.random() < 0.3:  # a pure colour that is not far from the scene's, as divisionists split it
                nearness = np.exp(-np.sum((pure - colour) ** 2, 1) / 0.13)
                colour = 0.25 * colour + 0.75 * pure[rng.choice(len(pure), p=nearness / nearness.sum())]
            dab(
                image, row, column, radius * rng.uniform(0.7, 1.15), colour + rng.normal(0, 0.05), rng.uniform(0, np.pi)
            )
    return image


def dab(image: ndarray, row: float, column: float, radius: float, colour: ndarray, angle: float) -> None:
    """A slightly long dab of paint: a soft rim, lit at the upper left."""
    height, width = image.shape[:2]
    reach = int(1.4 * radius) + 1
    y0, x0 = max(int(row) - reach, 0), max(int(column) - reach, 0)
    y, x = np.ogrid[y0 : min(int(row) + reach, height), x0 : min(int(column) + reach, width)]
    if not y.size or not x.size:
        return
    along, across = (
        (y - row) * np.sin(angle) + (x - column) * np.cos(angle),
        (y - row) * np.cos(angle) - (x - column) * np.sin(angle),
    )
    distance = np.hypot(along / 1.25, across) / radius
    light = 1 - 0.10 * np.clip(((y - row) + (x - column)) / radius, -1, 1) * distance
    part = image[y0 : y0 + y.shape[0], x0 : x0 + x.shape[1]]
    part[...] = mix(part, colour * light[..., None], (1 - distance) * radius / 1.5)


# ------------------------------------------------------------------------------------------------------------- cutout


def draw_cutout(rng: Generator) -> ndarray:
    """Leaves, birds' wings and suns cut out of coloured paper, printed like a woodcut: flat, with black outlines."""
    y, x = coordinates()
    shape = y.shape
    image = np.broadcast_to(rgb("f2e6cf"), (*shape, 3)).copy()
    codes = ("1f4e9e", "d9352b", "f2b632", "1d7a5a", "ef7f98", "101820", "7fb4d9")
    wobble = 0.0025 * clouds(rng, shape, 1.3)
    for column in range(4):  # panels of the ground
        inside = np.minimum(x - 0.31 * column + wobble, 0.31 * (column + 1) - x + wobble)
        for half, code in enumerate(rng.permutation(codes[:5])[:2]):
            panel = np.minimum(inside, (y - 0.5 * half) * (0.5 + 0.5 * half - y) * 4 + wobble)
            image = mix(image, rgb(code), panel * shape[0] / 2)
    for index in range(16):
        row, middle = 0.13 + 0.25 * (index // 4) + rng.uniform(-0.04, 0.04), 0.155 + 0.31 * (index % 4)
        size, turn = rng.uniform(0.085, 0.125), rng.uniform(0, 2 * np.pi)
        radius, angle = np.hypot(y - row, x - middle), np.arctan2(y - row, x - middle) + turn
        lobes = int(rng.integers(3, 9))
        reach = size * (0.62 + 0.38 * np.cos(lobes * angle + 0.6 * np.sin(2 * angle)) * rng.uniform(0.6, 1))
        inside = (reach - radius + wobble) * shape[0]
        fill = rgb(codes[int(rng.integers(len(codes)))])
        image = mix(image, rgb("101820"), inside / 2 + 7)
        image = mix(image, fill, inside / 2)
        veins = np.abs((lobes * angle / (2 * np.pi) + 0.5) % 1 - 0.5) * radius * shape[0] * 6 / lobes
        image = mix(image, rgb("f2e6cf"), np.minimum(5 - veins, (0.75 * reach - radius) * shape[0]) / 2)
    gouges = np.sin(90 * y + 14 * np.sin(2.5 * x) + 1.5 * clouds(rng, shape, 1.8, 4.0))
    carved = (gouges > 0.93) & (clouds(rng, shape, 1.6, 6.0) > 0.5)
    return mix(image, rgb("f2e6cf"), 0.85 * carved)


# -------------------------------------------------------------------------------------------------------- watercolour


def draw_watercolour(rng: Generator) -> ndarray:
    """Flowers in transparent washes on rough paper: dark rims, blooms, and pigment in the hollows of the paper."""
    y, x = coordinates()
    shape = y.shape
    tooth = clouds(rng, shape, 0.9)
    image = rgb("fbf8f1") * (1 + 0.012 * tooth)[..., None]
    for _ in range(13):  # wet in wet: pale patches without rims
        cy, cx = rng.uniform(0, (1, shape[1] / shape[0]))
        spread = 0.22 - np.hypot(y - cy, 0.8 * (x - cx)) + 0.06 * clouds(rng, shape, 2.0)
        code = rng.choice(["a9cbe6", "cfe0b4", "f3d3c2", "d8c8ea"])
        image = image * (1 - np.clip(spread / 0.25, 0, 1)[..., None] * (1 - rgb(code)))
    for _ in range(22):  # stems and leaves
        cy, cx, turn = rng.uniform(0.25, 1.0), rng.uniform(0, 1.23), rng.uniform(-0.9, 0.9)
        along, across = (
            (y - cy) * np.cos(turn) + (x - cx) * np.sin(turn),
            (x - cx) * np.cos(turn) - (y - cy) * np.sin(turn),
        )
        leaf = 0.030 * (1 - (along / 0.15) ** 2) - np.abs(across + 0.6 * along**2)
        image = wash(rng, image, tooth, leaf, rng.choice(["5d8a4a", "3f7a66", "8fa84f", "2f5d50"]))
    for _ in range(13):  # flowers of a few petals, each a wash of its own
        cy, cx, size, petals = (
            rng.uniform(0.08, 0.9),
            rng.uniform(0.05, 1.18),
            rng.uniform(0.07, 0.13),
            rng.integers(4, 7),
        )
        code = rng.choice(["c8385a", "e8864a", "8a4fa0", "e3b23c", "4a68b8", "d95f86"])
        for turn in 2 * np.pi * (np.arange(petals) + rng.random()) / petals:
            dy, dx = y - cy - 0.55 * size * np.sin(turn), x - cx - 0.55 * size * np.cos(turn)
            along, across = dy * np.sin(turn) + dx * np.cos(turn), dy * np.cos(turn) - dx * np.sin(turn)
            image = wash(rng, image, tooth, 0.45 * size - np.hypot(0.8 * along, 1.25 * across), str(code))
        image = wash(rng, image, tooth, 0.13 * size - np.hypot(y - cy, x - cx), "4a3426")
    return image


def wash(rng: Generator, image: ndarray, tooth: ndarray, inside: ndarray, code: str) -> ndarray:
    """One transparent layer where `inside` (in heights) is positive: it multiplies, so that layers shine through."""
    rows, columns = np.nonzero(inside > -0.03)
    if not len(rows):
        return image
    box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
    depth = inside[box] + 0.005 * clouds(rng, inside[box].shape, 1.75)
    bloom = clouds(rng, depth.shape, 1.9)
    pigment = 0.55 + 0.18 * bloom + 0.13 * tooth[box] + 0.8 * np.exp(-np.clip(depth, 0, None) / 0.003)
    pigment = np.clip(pigment * rng.uniform(0.75, 1.15), 0, 1.4) * np.clip(depth * 900, 0, 1)
    image[box] = image[box] * rgb(code) ** pigment[..., None]
    return image


# ------------------------------------------------------------------------------------------------------------- sketch


def draw_sketch(photograph: Path) -> pyvips.Image:
    """The edges of a photograph as black lines on white: a difference of Gaussians, thresholded softly."""
    y_HW = pyvips.Image.new_from_array(luminance(read(photograph)).astype(np.float32))
    y_HW = y_HW.resize(SKETCH_PX / max(y_HW.width, y_HW.height), kernel="cubic")
    fine, coarse = (y_HW.gaussblur(sigma, precision="float").numpy() for sigma in (1.6, 2.6))
    ink = np.clip((coarse - fine - 3) / 2.5, 0, 1)
    white = np.rint(255 * (1 - ink)).astype(np.uint8)
    return pyvips.Image.new_from_array(np.repeat(white[..., None], 3, 2), interpretation="srgb")


STYLES: dict[str, Callable[[Generator], ndarray]] = {
    "impasto": draw_impasto,
    "ink": draw_ink,
    "dots": draw_dots,
    "cutout": draw_cutout,
    "watercolour": draw_watercolour,
}


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--sketch", type=click.Path(exists=True, path_type=Path), help="Photograph to draw sketch.png from.")
@click.option("--only", multiple=True, type=click.Choice(list(STYLES)), help="Styles to draw; all by default.")
@click.option("--seed", default=7, type=click.IntRange(0), show_default=True)
def main(folder: Path, sketch: Path | None, only: tuple[str, ...], seed: int) -> None:
    """Draw the style pictures, and sketch.png, into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, draw) in enumerate(STYLES.items()):
        if not only or name in only:
            reduced(draw(np.random.default_rng([seed, index]))).write_to_file(str(folder / f"{name}.png"), keep="none")
    if sketch:
        draw_sketch(sketch).write_to_file(str(folder / "sketch.png"), keep="none")


if __name__ == "__main__":
    main()
