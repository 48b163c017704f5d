"""The check of the paper's section IV: a canvas cut into 1, 4 and 6 parts has the same gradient at every iteration.

Content 1,024×768 px, style 800×600 px, r0 = 1,024: one stage. The paper's partitions are 2×2 and 3×2 parts of equal
size; ours are 1, 2×2 and 3×2 square tiles of 1,024, 512 and 384 px, the last of a row or column smaller. Two questions:

same canvas   every partition receives the canvas of the whole image: is its gradient the same?
own canvas    every partition iterates on its own canvas: how far do the canvases diverge through rounding?

    python -m tools.paper.partition --iterations 10 --dtype float64 --json partition.json
    python -m tools.paper.partition --iterations 0      # until the optimiser stops, at most 100
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyvips
from rich.console import Console
from rich.table import Table

import pipeline
from pipeline.executors.threads import ThreadExecutor
from tools.paper.stages import CONTENT, STYLE, Driven, write_config

TILES_PX = (1024, 512, 384)
CHUNK_PX = 128  # divides all tile sizes


@dataclass(frozen=True)
class Row:
    """One partition compared with the whole image at one iteration.

    Differences of gradients (maximum, root mean square) are relative to the same norm of the whole image's gradient;
    differences of canvases are in levels of 255.
    """

    iteration: int
    tiles: int
    same_canvas_max: float
    same_canvas_rms: float
    own_canvas_max: float
    own_canvas_rms: float
    canvas_max: float
    canvas_mean: float


def relative(actual: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """(maximum, root mean square) of the difference, relative to those of `expected`."""
    difference = actual - expected
    return (
        float(np.abs(difference).max() / np.abs(expected).max()),
        float(np.sqrt(np.square(difference).mean() / np.square(expected).mean())),
    )


class Partition:
    """One way to cut the canvas: a stage on the whole image's canvas and a stage on its own canvas."""

    def __init__(self, folder: Path, values: dict[str, Any], tile_px: int, executor: ThreadExecutor):
        compute = {**values["compute"], "tile_px": tile_px}
        self.following, self.own = (
            _driven(folder, f"{name}_{tile_px}", {**values, "compute": compute}, executor) for name in ("same", "own")
        )
        self.tiles = len(self.own.stage.tiles)

    def compare(self, whole: Driven, canvas: np.ndarray, alpha: float | None) -> Row:
        """Repeat the last iteration of `whole`, from `canvas` with step size `alpha`, and compare."""
        self.following.place(canvas, whole.iteration - 1, alpha)
        self.following.iterate()
        own_canvas = self.own.pixels()
        self.own.iterate()
        gradient, apart = whole.gradient(), np.abs(own_canvas - canvas)
        same, own = (relative(stage.gradient(), gradient) for stage in (self.following, self.own))
        return Row(whole.iteration, self.tiles, *same, *own, float(apart.max()), float(apart.mean()))


def _driven(folder: Path, name: str, values: dict[str, Any], executor: ThreadExecutor) -> Driven:
    config = write_config(folder, name, values)
    (stage,) = pipeline.plan(config).stages
    return Driven(config, stage, executor)


def resized(source: Path, width: int, height: int, target: Path) -> Path:
    """Write `source` at exactly this size, cropped around its centre."""
    image = pyvips.Image.thumbnail(str(source), width, height=height, size="both", crop="centre")
    image.write_to_file(str(target))
    return target


def settings(
    folder: Path, content: Path, style: Path, weights: Path | None, dtype: str, scale: float
) -> dict[str, Any]:
    """The settings of configs/paper.yaml at the paper's sizes times `scale`."""
    width, height = (round(side * scale) for side in (1024, 768))
    pixels = resized(content, width, height, folder / "content.png")
    painting = resized(style, round(800 * scale), round(600 * scale), folder / "style.png")
    network = {"name": "vgg19", "weights": str(weights)} if weights else {"name": "vgg19-lite"}
    return {
        "content": str(pixels),
        "styles": [{"image": str(painting)}],
        "initial_size": width,
        "network": {**network, "padding": "zeros"},
        "loss": {"content_weight": 1.0, "style_weight": 1.0},
        "optimizer": {"schedule": "constant", "max_iterations": 100, "stop_condition": 0.1, "clip": False},
        "compute": {"dtype": dtype, "device": "cpu"},
        "store": {"chunk_px": max(16, round(CHUNK_PX * scale))},
        "memory": {"limit": "16GiB"},
    }


def measure(folder: Path, values: dict[str, Any], tiles_px: tuple[int, ...], iterations: int) -> Iterator[list[Row]]:
    """Yield the rows of all partitions after each iteration; with `iterations` 0 until the optimiser stops."""
    whole_px, *others_px = tiles_px
    with ThreadExecutor(2) as executor:
        compute = {**values["compute"], "tile_px": whole_px}
        whole = _driven(folder, "whole", {**values, "compute": compute}, executor)
        partitions = [Partition(folder, values, tile_px, executor) for tile_px in others_px]
        canvas, alpha = whole.pixels(), whole.alpha
        for _ in whole.to_its_end():
            yield [partition.compare(whole, canvas, alpha) for partition in partitions]
            if whole.iteration == iterations:
                return
            canvas, alpha = whole.pixels(), whole.alpha


def show(rows: list[Row], title: str) -> None:
    table = Table(title=title)
    columns = ("iteration", "tiles", "same: max", "same: rms", "own: max", "own: rms", "canvas max", "canvas mean")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        iteration, tiles, *figures = asdict(row).values()
        table.add_row(str(iteration), str(tiles), *(f"{figure:.1e}" for figure in figures))
    Console(width=110).print(table)
    for tiles in sorted({row.tiles for row in rows}):
        same = max(row.same_canvas_max for row in rows if row.tiles == tiles)
        print(f"{tiles} tiles: maximum relative difference of the gradients of the same canvas {same:.2e}")


@click.command()
@click.option("--content", type=click.Path(path_type=Path, exists=True), default=CONTENT, show_default=True)
@click.option("--style", type=click.Path(path_type=Path, exists=True), default=STYLE, show_default=True)
@click.option("--weights", type=click.Path(path_type=Path), help="VGG-19-shaped weights file; default: vgg19-lite.")
@click.option("--iterations", default=10, show_default=True, help="Iterations; 0: until the optimiser stops.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True)
@click.option("--scale", default=1.0, show_default=True, help="Factor of all sizes, tiles included; a multiple of 1/8.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
def main(
    content: Path, style: Path, weights: Path | None, iterations: int, dtype: str, scale: float, json_path: Path | None
) -> None:
    """Print the distance of the gradients of 4 and 6 tiles from that of the whole image at every iteration."""
    rows: list[Row] = []
    name = weights.name if weights else "vgg19-lite"
    with tempfile.TemporaryDirectory() as folder:
        values = settings(Path(folder), content, style, weights, dtype, scale)
        for iteration_rows in measure(
            Path(folder), values, tuple(round(side * scale) for side in TILES_PX), iterations
        ):
            rows += iteration_rows
            if json_path:  # after every iteration, so that an interrupted comparison leaves its figures
                figures = {"weights": name, "dtype": dtype, "scale": scale, "rows": [asdict(row) for row in rows]}
                json_path.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    show(rows, f"{content.name} in the style of {style.name}, {name}, {dtype}: relative to one tile")


if __name__ == "__main__":
    main()
