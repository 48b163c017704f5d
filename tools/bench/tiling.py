"""The cost of tiles: one gradient of the same image computed in tiles and as a whole, in one process.

Three rows: the Gram pass and the gradient pass over tiles, each against the same pass over the whole image as one tile;
and both passes against plain autograd of J, which needs one forward pass fewer because it keeps all features. The pixel
ratio counts computed pixels, a backward pass counting as much as a forward pass. Goal:

    ratio of seconds ≤ 1.1 × ratio of pixels computed

    python -m tools.bench.tiling --weights vgg19.safetensors --size 2048 --tile 1024 --json bench.json
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pipeline import store
from pipeline.config.sections import NetworkConfig
from pipeline.core.tiling import Rect, Tile, grid
from pipeline.core.vgg_layers import ALIGN_PX, LAYER_BY_NAME, ceil_to, halo_px
from pipeline.executors.threads import ThreadExecutor
from pipeline.losses import objective as losses
from pipeline.network.cache import get_network
from pipeline.network.weights import NetworkSpec, find_weights
from pipeline.plan.plan import computed_px
from pipeline.plan.processes import WORKERS
from pipeline.render import tile_specs, tile_tasks

STYLE = tuple(NetworkConfig().style_layers)
CONTENT = tuple(NetworkConfig().content_layers)
HALO_PX = halo_px(STYLE + CONTENT, "max")


@dataclass(frozen=True)
class Row:
    """One comparison: median seconds of tiles and of the whole, and the ratios of their seconds and pixels."""

    name: str
    tiled_s: float
    whole_s: float
    seconds_ratio: float
    pixels_ratio: float


class Bench:
    """A stage with a random canvas, and its Gram and gradient passes over any set of tiles."""

    def __init__(self, folder: Path, network: NetworkSpec, size: int, chunk: int) -> None:
        self.folder, self.network, self.size = folder / "stage_0", network, size
        store.create_stage(self.folder)
        pixels = np.random.default_rng(0).uniform(0, 255, (size, size, 3)).astype("float32")
        for name in ("canvas_0", "gradient"):
            store.create_array(self.folder, name, (size, size, 3), chunk, "float32", "none")
        store.open_array(self.folder, "canvas_0").write_window(Rect(0, size, 0, size), pixels)
        for layer in CONTENT:
            stride, channels = LAYER_BY_NAME[layer].stride, network.source.widths[layer]
            shape = (size // stride, size // stride, channels)
            store.create_array(self.folder, f"features_{layer}", shape, chunk // stride, "float32", "none")

    def gram_pass(self, executor: ThreadExecutor, tiles: tuple[Tile, ...]) -> dict[str, losses.Gram]:
        specs = [tile_specs.GramSpec(self.folder, "canvas_0", tile, self.network, {}, STYLE) for tile in tiles]
        return executor.fold(tile_tasks.gram_task, specs, tile_tasks.add_grams, dict[str, losses.Gram]())

    def gradient_pass(self, executor: ThreadExecutor, tiles: tuple[Tile, ...], seeds: dict[str, losses.Gram]) -> None:
        factors = dict.fromkeys(CONTENT, 1.0)
        executor.map(
            tile_tasks.gradient_task,
            [
                tile_specs.GradientSpec(self.folder, "canvas_0", tile, self.network, {}, factors, seeds)
                for tile in tiles
            ],
            tile=True,
        )

    def autograd(self) -> None:
        """dJ/dp of the whole image by torch alone; content and Gram targets are zero."""
        network = get_network(self.network)
        whole = Rect(0, self.size, 0, self.size)
        pixels = store.open_array(self.folder, "canvas_0").read_window(whole)
        canvas = torch.from_numpy(pixels).to(self.network.device).permute(2, 0, 1)[None].requires_grad_()
        objective = torch.zeros((), device=self.network.device)
        for layer_map in network.features(canvas, whole, (self.size, self.size), {*STYLE, *CONTENT}, whole):
            features_Cn = layer_map.features_1CHW[0].flatten(1)
            if layer_map.layer.name in STYLE:
                objective = objective + ((features_Cn @ features_Cn.T) / features_Cn.shape[1]).square().sum()
            if layer_map.layer.name in CONTENT:
                objective = objective + features_Cn.square().sum()
        (gradient,) = torch.autograd.grad(objective, canvas)
        store.open_array(self.folder, "gradient").write_window(whole, gradient[0].permute(1, 2, 0).cpu().numpy())


def compare(name: str, tiled: Callable[[], object], whole: Callable[[], object], pixels: float, repeats: int) -> Row:
    """Medians of seconds and of their ratios; both sides run in turn, after one warm-up each."""
    pairs = [(_seconds(tiled), _seconds(whole)) for _ in range(repeats + 1)][1:]
    tiled_s, whole_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Row(name, tiled_s, whole_s, statistics.median(tiles / image for tiles, image in pairs), pixels)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(bench: Bench, tile_px: int, repeats: int) -> list[Row]:
    """All three comparisons."""
    side = ceil_to(bench.size, ALIGN_PX)
    tiles, whole = grid(bench.size, bench.size, tile_px), grid(bench.size, bench.size, side)
    size = (bench.size, bench.size)
    gram_px, gradient_px = (
        computed_px(size, tile_px, halo) / bench.size**2 for halo in (halo_px(STYLE, "max"), 2 * HALO_PX)
    )
    with ThreadExecutor(WORKERS) as executor:
        seeds = bench.gram_pass(executor, whole)

        def gram(over: tuple[Tile, ...]) -> object:
            return bench.gram_pass(executor, over)

        def gradient(over: tuple[Tile, ...]) -> object:
            return bench.gradient_pass(executor, over, seeds)

        return [
            compare("Gram", lambda: gram(tiles), lambda: gram(whole), gram_px, repeats),
            compare("gradient", lambda: gradient(tiles), lambda: gradient(whole), gradient_px, repeats),
            compare(
                "both/autograd",
                lambda: (gram(tiles), gradient(tiles)),
                bench.autograd,
                (gram_px + 2 * gradient_px) / 2,
                repeats,
            ),
        ]


@click.command()
@click.option("--weights", type=click.Path(path_type=Path), help="VGG-19-shaped weights file; default: random weights.")
@click.option("--size", default=2048, show_default=True, help="Side of the square canvas, px.")
@click.option("--tile", "tile_px", default=1024, show_default=True, help="Side of a tile, px.")
@click.option("--chunk", default=512, show_default=True, help="Side of a chunk, px.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
def main(
    weights: Path | None,
    size: int,
    tile_px: int,
    chunk: int,
    device: str,
    dtype: str,
    repeats: int,
    json_path: Path | None,
) -> None:
    """Print seconds and pixels of tiles and of the whole image."""
    source = find_weights("vgg19" if weights else "random", weights, 0)
    network = NetworkSpec(source, "replicate", "max", dtype, device)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Bench(Path(folder), network, size, chunk), tile_px, repeats)
    table = Table(title=f"{size}² px, tiles of {tile_px}, against the whole image; {device}, {dtype}")
    for column in ("pass", "tiled s", "whole s", "seconds", "pixels", "sec/px"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        figures = (row.tiled_s, row.whole_s, row.seconds_ratio, row.pixels_ratio, row.seconds_ratio / row.pixels_ratio)
        table.add_row(row.name, *(f"{figure:.2f}" for figure in figures))
    Console().print(table)
    per_kept = computed_px((30_000, 30_000), tile_px, 2 * HALO_PX) / 30_000**2
    print(f"pixels computed per pixel kept, gradient pass, tiles of {tile_px} px on 30,000²: {per_kept:.3f}")
    if json_path:
        json_path.write_text(
            json.dumps({"rows": [asdict(row) for row in rows], "computed_per_kept_30k": per_kept}, indent=2),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
