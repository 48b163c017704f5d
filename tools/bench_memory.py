"""Peak resident memory of whole runs beside what the plan projected for them.

Every run is a process of its own; its peak is the kernel's own figure (VmHWM).

    python tools/bench_memory.py --weights vgg19.safetensors --json memory.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import pyvips
from rich.console import Console
from rich.table import Table

import pipeline

# (canvas px, tile px, dtype): one tile, many tiles, and the precision of the proofs
CASES = (
    (512, 512, "float32"),
    (1024, 1024, "float32"),
    (2048, 512, "float32"),
    (2048, 2048, "float32"),
    (1024, 512, "float64"),
)
RUN = """
import sys, pipeline
from pathlib import Path
pipeline.run(pipeline.load_config(sys.argv[1]))
print(next(line.split()[1] for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM')))
"""


def measure(folder: Path, weights: Path | None, size: int, tile_px: int, dtype: str) -> tuple[int, int]:
    """(projected, measured) peak bytes of a two-iteration run."""
    name = f"{size}-{tile_px}-{dtype}"
    config = folder / f"{name}.yaml"
    network = {"name": "vgg19", "weights": str(weights.absolute())} if weights else {"name": "random"}
    config.write_text(
        json.dumps(
            {
                "content": "content.png",
                "styles": [{"image": "style.png"}],
                "output": f"{name}.tif",
                "size": size,
                "initial_size": size,
                "network": network,
                "optimizer": {"max_iterations": 2},
                "compute": {"tile_px": tile_px, "dtype": dtype},
                "memory": {"limit": "64GiB"},
            }
        ),
        encoding="utf-8",
    )
    projected = pipeline.plan(pipeline.load_config(config)).projected_mem_bytes
    done = subprocess.run([sys.executable, "-c", RUN, str(config)], check=True, capture_output=True, text=True)
    return projected, int(done.stdout) * 1024


@click.command()
@click.option("--weights", type=click.Path(path_type=Path), help="A VGG-19-shaped file; default seeded random weights.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here too.")
def main(weights: Path | None, json_path: Path | None) -> None:
    """Print projected and measured memory of a few runs."""
    rows = []
    table = Table()
    for column in ("canvas", "tile", "dtype", "projected MiB", "measured MiB", "projected / measured"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for image in ("content", "style"):
            noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype="uint8")
            pyvips.Image.new_from_array(noise).write_to_file(str(folder / f"{image}.png"))
        for size, tile_px, dtype in CASES:
            projected, measured = measure(folder, weights, size, tile_px, dtype)
            rows.append(
                {"size": size, "tile_px": tile_px, "dtype": dtype, "projected": projected, "measured": measured}
            )
            mib = (f"{value / 2**20:.0f}" for value in (projected, measured))
            table.add_row(str(size), str(tile_px), dtype, *mib, f"{projected / measured:.2f}")
    Console().print(table)
    if json_path:
        json_path.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
