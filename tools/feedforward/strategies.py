"""`pipeline apply` with activations computed again, stored, and stored in 16 bits: time, memory, disk, levels.

    python -m tools.feedforward.strategies out/strategies --network strokes --width 1 --size 2048

Each is a process of its own with one thread for tiles; its time is user and system time, so that other load changes it
little. `--width`: a network of random weights. Differences are of the canvas, in levels, from that computed again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.commands.apply import apply_plan
from pipeline.config.apply import apply_config_of_line
from pipeline.store import open_array, other_slot
from tests.support.networks import write_network

CONTENT = Path(__file__).parents[2] / "configs" / "samples" / "landscape.jpg"
STRATEGIES = ("recompute", "store", "bfloat16")
MIB = 2**20


def applied(line: list[str]) -> tuple[float, float]:
    """(processor seconds, peak resident MiB) of `pipeline apply` with these arguments."""
    child = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-m", "pipeline", "apply", *line])
    _, status, usage = os.wait4(child, 0)
    if status:
        raise click.ClickException(f"apply {' '.join(line)} failed")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--network", "networks", multiple=True, help="A network's file, or strokes.")
@click.option("--width", "widths", multiple=True, type=float, help="Of a network of five blocks with random weights.")
@click.option("--size", default=2048, show_default=True, help="Long side in px.")
@click.option("--set", "settings", multiple=True, help="As of `pipeline apply`.")
def main(
    folder: Path, networks: tuple[str, ...], widths: tuple[float, ...], size: int, settings: tuple[str, ...]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: name for name in networks}
    for width in widths:
        files[f"width {width:g}"] = str(folder / f"random_{width:g}.safetensors")
        write_network(Path(files[f"width {width:g}"]), width=width, blocks=5)
    table = Table()
    titles = (
        "network",
        "activations",
        "tile px",
        "CPU s",
        "ratio",
        "peak MiB (planned)",
        "disk MiB",
        "mean, max levels",
    )
    for column in titles:
        table.add_column(column, justify="right")
    for name, file in files.items():
        first: tuple[float, np.ndarray] | None = None
        for strategy in STRATEGIES:
            output = folder / f"{name.replace(' ', '_')}_{size}_{strategy}.png"
            overrides = [f"activations={strategy}", "compute.threads=1", "compute.device=cpu", *settings]
            config = apply_config_of_line(file, str(CONTENT), str(output), str(size), overrides)
            planned = apply_plan(config)
            stored = sum(array.stored_bytes for name, array in planned.arrays.items() if other_slot(name))
            arguments = [file, str(CONTENT), "-o", str(output), "--size", str(size)]
            seconds, peak = applied([*arguments, *(f"--set={one}" for one in overrides)])
            canvas = open_array(config.work_dir / "store.zarr" / "stage_0", "canvas_1")
            pixels = canvas.read_window(canvas.rect)
            first = first or (seconds, pixels)
            difference = np.abs(pixels - first[1])
            table.add_row(
                name,
                strategy,
                str(planned.plan.tile_px),
                f"{seconds:.1f}",
                f"{first[0] / seconds:.2f}",
                f"{peak:.0f} ({planned.plan.projected_mem_bytes / MIB:.0f})",
                f"{stored / MIB:.0f}",
                f"{difference.mean():.2g}, {difference.max():.2g}",
            )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
