"""Time per pixel and iteration as the canvas grows, with tiles of one size.

Goal: constant within 10 % for canvases of more than four tiles.

Every run is one stage at its content's size, in this process, timed from the first Gram pass to the last commit, so
that each iteration includes all passes. `computed` is the number of pixels, halos included, that the passes compute per
pixel of the canvas: border tiles have a smaller halo, and small canvases have a larger share of border tiles.

    python -m tools.bench.growth --sizes 1024,2048,4096,8192 --json growth.json
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import pyvips
from rich.console import Console
from rich.table import Table

import pipeline
from pipeline.core.events import Event, IterationDone, WorkDone


@dataclass(frozen=True)
class Row:
    """Microseconds (elapsed, and processor time of all cores) per pixel and iteration; pixels computed per pixel."""

    size: int
    tiles: int
    iterations: int
    elapsed_us: float
    cpu_us: float
    computed: float


def measure(folder: Path, size: int, tile_px: int, iterations: int, state: str) -> Row:
    """Render one stage of `size` px and measure it."""
    config = folder / f"{size}.json"
    keys = {
        "content": "content.png",
        "styles": [{"image": "style.png"}],
        "output": f"{size}.tif",
        "work_dir": f"{size}.run",
        "size": size,
        "initial_size": size,
        "network": {"name": "vgg19-lite"},
        "optimizer": {"max_iterations": iterations},
        "compute": {"device": "cpu", "tile_px": tile_px},
        "memory": {"limit": "8GiB"},
        "store": {"state_dtype": state, "chunk_px": min(512, tile_px)},
    }
    config.write_text(json.dumps(keys), encoding="utf-8")
    times: list[tuple[float, float]] = []

    def sink(event: Event) -> None:
        if isinstance(event, IterationDone) or (isinstance(event, WorkDone) and event.what == "content features"):
            times.append((time.perf_counter(), time.process_time()))

    loaded = pipeline.load_config(config)
    (stage,) = pipeline.plan(loaded).stages
    pipeline.run(loaded, sink=sink)
    start, end = times[stage.tiles - 1], times[-1]
    per_px = 1e6 / (iterations * stage.pixels)
    computed = (stage.gram_px * (stage.tiles > 1) + 2 * stage.gradient_px) / stage.pixels
    elapsed, cpu = ((after - before) * per_px for before, after in zip(start, end, strict=True))
    return Row(size, stage.tiles, iterations, elapsed, cpu, computed)


@click.command()
@click.option("--sizes", default="1024,2048,4096,8192", show_default=True, help="Sides of square canvases, px.")
@click.option("--tile", "tile_px", default=1024, show_default=True, help="Side of a tile, px.")
@click.option("--state", type=click.Choice(["float", "compact"]), default="float", show_default=True)
@click.option("--pixels", default=2**26, show_default=True, help="Pixels to render per size: sets its iterations.")
@click.option("--folder", type=click.Path(path_type=Path), help="Working directory; default: a temporary one.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
def main(sizes: str, tile_px: int, state: str, pixels: int, folder: Path | None, json_path: Path | None) -> None:
    """Print the time per pixel and iteration."""
    rows: list[Row] = []
    for number, size in enumerate([tile_px // 2, *map(int, sizes.split(","))]):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            # a style larger than the canvas would add stages
            for image, side in (("content", 1024), ("style", min(256, tile_px // 2))):
                noise = pyvips.Image.gaussnoise(side, side, mean=128, sigma=40).cast("uchar")
                noise.bandjoin([noise, noise]).write_to_file(f"{name}/{image}.png")
            row = measure(Path(name), size, tile_px, max(1, min(8, pixels // size**2)), state)
        if number:  # the first run loads libraries and weights
            rows.append(row)
            print(f"{size} px: {row.elapsed_us:.2f} µs, {row.cpu_us:.2f} CPU", flush=True)
    table = Table(title=f"µs per pixel and iteration, tiles of {tile_px} px, {state}")
    for column in ("canvas", "tiles", "iterations", "elapsed", "CPU", "computed px", "CPU / computed", "CPU / last"):
        table.add_column(column, justify="right")
    for row in rows:
        shares = row.cpu_us / row.computed, row.cpu_us / rows[-1].cpu_us
        figures = (f"{figure:.3f}" for figure in (row.elapsed_us, row.cpu_us, row.computed, *shares))
        table.add_row(f"{row.size:,}", str(row.tiles), str(row.iterations), *figures)
    Console().print(table)
    if json_path:
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
