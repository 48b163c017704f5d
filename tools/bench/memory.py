"""Peak resident memory of whole runs, crops and grids of previews beside what the plan projected for them.

Each is a process of its own; its peak is the kernel's figure (VmHWM).

    python -m tools.bench.memory --weights vgg19.safetensors --json memory.json
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pyvips
from rich.console import Console
from rich.table import Table

import pipeline
from pipeline.core.events import IterationDone
from tests.support.e2e import peak_of_command, run_until

# (canvas px, tile px, dtype): one tile, many tiles, and the precision of the exactness tests
CASES = (
    (512, 512, "float32"),
    (1024, 1024, "float32"),
    (2048, 512, "float32"),
    (2048, 2048, "float32"),
    (1024, 512, "float64"),
)
# (canvas px, tile px) of a run that is stopped in its second stage, which has 16 tiles.
STAGED = (2048, 512)
GRID_PX = 1024
COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "crop": lambda config: ["preview", "-c", str(config), "--crop", "500,500,700,700"],
    "grid": lambda config: [
        *("preview", "-c", str(config), "--size", str(GRID_PX)),
        *("--vary", "network.padding=zeros,reflect", "--vary", "network.pooling=max,average"),
    ],
}


def write_config(folder: Path, name: str, weights: Path | None, **keys: object) -> Path:
    """Write a config of two iterations per stage."""
    network = {"name": "vgg19", "weights": str(weights.absolute())} if weights else {"name": "random"}
    common = {
        "content": "content.png",
        "styles": [{"image": "style.png"}],
        "output": f"{name}.tif",
        "network": network,
        "optimizer": {"max_iterations": 2},
        "memory": {"limit": "64GiB"},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({**common, **keys}), encoding="utf-8")
    return path


def measure(folder: Path, weights: Path | None, size: int, tile_px: int, dtype: str) -> tuple[int, int]:
    """(projected, measured) peak bytes of a two-iteration run."""
    keys = {"size": size, "initial_size": size, "compute": {"tile_px": tile_px, "dtype": dtype}}
    config = write_config(folder, f"{size}-{tile_px}-{dtype}", weights, **keys)
    projected = pipeline.plan(pipeline.load_config(config)).projected_mem_bytes
    return projected, peak_of_command("run", "-c", str(config))


def stopped_run(folder: Path, weights: Path | None) -> Path:
    """Start a run, stop it in its second stage, and return its config."""
    size, tile_px = STAGED
    keys = {"size": size, "initial_size": size // 2, "compute": {"tile_px": tile_px}, "styles": [_style(size // 2)]}
    config = write_config(folder, "staged", weights, **keys)
    run_until(config, lambda event: isinstance(event, IterationDone) and event.stage == 1)
    return config


def _style(max_px: int) -> dict[str, object]:
    return {"image": "style.png", "max_size": max_px}


@click.command()
@click.option("--weights", type=click.Path(path_type=Path), help="VGG-19-shaped weights file; default: random weights.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
def main(weights: Path | None, json_path: Path | None) -> None:
    """Print projected and measured memory of runs, a crop, a preview grid and a repair."""
    rows = []
    table = Table()
    for column in ("what", "canvas", "tile", "dtype", "projected MiB", "measured MiB", "projected / measured"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for image in ("content", "style"):
            noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype="uint8")
            pyvips.Image.new_from_array(noise).write_to_file(str(folder / f"{image}.png"))
        results = [("run", *case, *measure(folder, weights, *case)) for case in CASES]
        config = stopped_run(folder, weights)
        for what, command in COMMANDS.items():
            size = GRID_PX if what == "grid" else STAGED[0]
            projected = pipeline.plan(pipeline.load_config(config, [f"size={size}"])).projected_mem_bytes
            results.append((what, size, STAGED[1], "float32", projected, peak_of_command(*command(config))))
        for what, size, tile_px, dtype, projected, measured in results:
            names = ("what", "size", "tile_px", "dtype", "projected", "measured")
            rows.append(dict(zip(names, (what, size, tile_px, dtype, projected, measured), strict=True)))
            mib = (f"{value / 2**20:.0f}" for value in (projected, measured))
            table.add_row(what, str(size), str(tile_px), dtype, *mib, f"{projected / measured:.2f}")
    Console().print(table)
    if json_path:
        json_path.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
