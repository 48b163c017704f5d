"""How long a fast device waits for the rest of the program, measured without one.

    python -m tools.bench.simulated --rates 20,100,400 --tiles 1,4,16,36 --devices 1
    python -m tools.bench.simulated --rates 20 --tiles 36 --devices 1,2,4 --json simulated.json

The network sleeps for as long as a device of that rate (in TFLOP/s) would compute, and holds no lock meanwhile; all
else is the product: reading tiles, writing gradients, the update, the scheduler. `--devices 0` is one process with
threads. A machine with few cores updates fewer pixels than a fast device computes, and waits
for that: CPU s is the processor time of an iteration over all processes, which the cores have to find beside it.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from pipeline.core.allocator import set_up_process
from pipeline.core.tiling import Rect
from pipeline.core.vgg_layers import LAYER_BY_NAME, VGG19_WIDTHS, halo_px
from pipeline.render import device_io, tile_tasks
from pipeline.render.tile_specs import (
    ContentResult,
    ContentSpec,
    GradientResult,
    GradientSpec,
    GramSpec,
    SeedSpec,
    TileSpec,
    WholeResult,
    WholeSpec,
    Window,
)
from pipeline.store import ChunkSums, content_features_name, layer_of, open_array
from tools.bench.runs import Taken, machine, make_image, make_weights, render

# FLOP per px of a pass through VGG-19 up to conv5_1, the deepest of the default layers.
_FLOP_PER_PX = (
    2
    * 9
    * sum(
        c_in * c_out / 4 ** (block - 1)
        for block, c_in, c_out in (
            *((1, 3, 64), (1, 64, 64), (2, 64, 128), (2, 128, 128)),
            *((3, 128, 256), (3, 256, 256), (3, 256, 256), (3, 256, 256)),
            *((4, 256, 512), (4, 512, 512), (4, 512, 512), (4, 512, 512), (5, 512, 512)),
        )
    )
)
_RATE = "SIMULATED_FLOP_PER_S"  # a variable of the environment, which worker processes inherit


def compute(spec: TileSpec, windows: list[Window], passes: int) -> None:
    """Reserve the device for as long as it would compute."""
    rate = float(os.environ[_RATE])
    pixels = sum(window.outer.area for window in windows)
    with tile_tasks._computing(spec):
        time.sleep(passes * pixels * _FLOP_PER_PX / rate if rate else 0)


def grams(spec: TileSpec, windows: list[Window], layers: tuple[str, ...]) -> dict[str, Any]:
    keys = [key for window in windows for name in layers for key in spec.guides.keys(window.key(LAYER_BY_NAME[name]))]
    return {key: np.eye(VGG19_WIDTHS[layer_of(key)]) * spec.tile.inner.area for key in keys}


def gram_task(spec: GramSpec) -> dict[str, Any]:
    windows = spec.windows(halo_px(spec.layers, spec.network.pooling), 0)
    compute(spec, windows, 1)
    return grams(spec, windows, spec.layers)


def content_task(spec: ContentSpec) -> ContentResult:
    sums: dict[str, ChunkSums] = {}
    for name in spec.layers:
        region: Rect = spec.tile.inner.positions(LAYER_BY_NAME[name])
        zeros = torch.zeros((region.height, region.width, VGG19_WIDTHS[name])).permute(2, 0, 1)
        sums[name] = device_io.save(open_array(spec.stage_dir, content_features_name(name)), region, zeros)
    return ContentResult(dict.fromkeys(spec.layers, 1.0), sums)


def gradient(spec: SeedSpec, style_keys: Any) -> GradientResult:
    names = {*map(layer_of, style_keys), *map(layer_of, spec.content_factors)}
    windows = spec.windows(2 * halo_px(names, spec.network.pooling), 0)
    for window in windows:
        spec.read_content(window)
    compute(spec, windows, 2)
    inner = spec.tile.inner
    values = torch.full((inner.height, inner.width, 3), 1e-3).permute(2, 0, 1)
    return tile_tasks._written(spec, values, dict.fromkeys(spec.content_factors, 1.0), 0.0)


def gradient_task(spec: GradientSpec) -> GradientResult:
    return gradient(spec, spec.style_seeds_CM)


def whole_task(spec: WholeSpec) -> WholeResult:
    result = gradient(spec, spec.style_targets)
    sums = {key: np.eye(VGG19_WIDTHS[layer_of(key)]) * spec.tile.inner.area for key in spec.style_targets}
    return WholeResult({key: target.term(sums[key]) for key, target in spec.style_targets.items()}, result)


def simulate() -> None:
    """Put the functions above in the place of the network's. Graphs are made here, and workers find them by name."""
    simulated = importlib.import_module("tools.bench.simulated")  # not __main__, which workers cannot import
    for name in ("gram_task", "content_task", "gradient_task", "whole_task"):
        setattr(tile_tasks, name, getattr(simulated, name))


def measure(folder: Path, rate: float, tiles: int, devices: int, options: dict[str, Any]) -> Taken:
    """One stage of `tiles` tiles at `rate` FLOP/s, in one process (`devices` 0) or with a process for each device."""
    os.environ[_RATE] = str(rate)
    side = options["tile"] * math.isqrt(tiles)
    spread = {options["key"]: ["cpu"] * devices if options["key"] == "devices" else devices} if devices else {}
    return render(
        folder,
        f"{rate}-{tiles}-{devices}",
        {
            "content": "content.png",
            "styles": [{"image": "style.png"}],
            "size": side,
            "initial_size": side,
            "init": "noise",
            "network": {"name": "vgg19", "weights": str(folder / "random.safetensors")},
            "loss": {"kind": "gatys", "tv_weight": 0.0},
            "optimizer": {"max_iterations": options["iterations"]},
            "compute": {"device": "cpu", "tile_px": options["tile"], "threads": 1, **spread},
            "memory": {"limit": "1TiB"},  # of a tile that is not computed, there are no feature maps
            "store": {"chunk_px": options["chunk"]},
        },
        _cpu_s,
    )


def _cpu_s() -> float:
    """Processor time of this process and its workers so far, which other programs on the machine do not change."""
    processes = [psutil.Process(), *psutil.Process().children()]
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def row(rate: float, tiles: int, devices: int, taken: Taken) -> dict[str, Any]:
    busy = taken.last["busy"][1:-1]  # the first also loads modules; the last has no Gram pass for the next
    wall, computed = (float(np.median([times.get(kind, 0.0) for times in busy])) for kind in ("wall", "compute"))
    return {
        "rate": rate,
        "tiles": tiles,
        "devices": devices,
        "wall_s": wall,
        "compute_s": computed,
        "cpu_s": float(np.median(np.diff(taken.last["counted"][:-1]))),
        "waiting": 1 - computed / (wall * max(1, devices)),
        "taken": asdict(taken),
    }


@click.command()
@click.option("--rates", default="20,100,400", show_default=True, help="TFLOP/s; 0: no sleep at all.")
@click.option("--tiles", default="1,4,16,36", show_default=True, help="Square numbers.")
@click.option("--devices", default="1", show_default=True)
@click.option("--key", type=click.Choice(["devices", "workers"]), default="devices", show_default=True)
@click.option("--tile", default=1024, show_default=True)
@click.option("--chunk", default=512, show_default=True)
@click.option("--iterations", default=6, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Working folder; default: temporary.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
def main(rates: str, tiles: str, devices: str, folder: Path | None, json_path: Path | None, **options: Any) -> None:
    """Print the share of an iteration in which a simulated device waits."""
    set_up_process()
    simulate()
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        make_weights(Path(name) / "random.safetensors")
        for seed, image in enumerate(("content", "style")):
            make_image(Path(name) / f"{image}.png", 512, 512, seed)
        for number in map(int, tiles.split(",")):
            for rate in map(float, rates.split(",")):
                for count in map(int, devices.split(",")):
                    rows.append(row(rate, number, count, measure(Path(name), rate * 1e12, number, count, options)))
                    print({key: value for key, value in rows[-1].items() if key != "taken"}, flush=True)
    table = Table(title="a simulated device: seconds per iteration")
    for column in ("TFLOP/s", "tiles", "devices", "s/it", "computing s", "CPU s", "waiting"):
        table.add_column(column, justify="right")
    for one in rows:
        figures = (f"{one['wall_s']:.3f}", f"{one['compute_s']:.3f}", f"{one['cpu_s']:.3f}", f"{one['waiting']:.0%}")
        table.add_row(f"{one['rate']:g}", str(one["tiles"]), str(one["devices"]), *figures)
    Console(width=120).print(table)
    if json_path:
        json_path.write_text(json.dumps({"machine": machine("cpu"), "rows": rows}), "utf-8")


if __name__ == "__main__":
    main()
