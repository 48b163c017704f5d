"""Peak memory and time of the export of a whole canvas of print size, beside what the plan projects for it.

The canvas is made up: a run directory whose journal says that its only stage is done, and whose chunks are noise, which
no codec makes smaller. The export is `pipeline run` itself, in a process of its own.

    TEST_TIMEOUT_S=3600 python -m tools.bench.full_export --size 30000 --set store.state_dtype=compact \\
        --set export.bleed=5mm --set export.profile=adobe-rgb
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import pyvips

import pipeline
from pipeline.config import Config, load_config
from pipeline.core.cancel import NEVER
from pipeline.core.events import ignore
from pipeline.plan import resolve_device
from pipeline.rundir import locked_folder, now, open_run, plan_on, records, resolved, stage_path
from pipeline.store import METADATA, StageLayout, create_array, create_stage, metadata, open_array
from tests.support.e2e import peak_of_command

# Different chunks: more noise than deflate's window, so that repeating it does not compress.
_CHUNKS = 8


def write_config(folder: Path, size: int, ratio: float) -> Path:
    """Write a config of a single stage, and its inputs."""
    for name, height in (("content", round(1024 / ratio)), ("style", 64)):
        pyvips.Image.gaussnoise(1024, height).cast("uchar").write_to_file(f"{folder}/{name}.png")
    keys = {
        **{"content": "content.png", "styles": [{"image": "style.png"}], "output": "whole.tif"},
        **{"size": size, "initial_size": size, "style_stages": False, "network": {"name": "vgg19-lite"}},
        **{"compute": {"device": "cpu"}, "memory": {"limit": "4GiB"}},
    }
    path = folder / "whole.yaml"
    path.write_text(json.dumps(keys), encoding="utf-8")
    return path


def make_finished_run(config: Config) -> None:
    """Begin a run of the config, and write its stage as if it had been rendered: a canvas of noise."""
    from pipeline.commands.start import identifier  # noqa: PLC0415 - brings torch

    planned = plan_on(config, resolve_device("cpu"))
    height, width = planned.stages[0].size
    with locked_folder(config.work_dir):
        journal = open_run(config, planned, identifier(config, ignore, NEVER))
        folder = stage_path(config.work_dir, 0)
        create_stage(folder)
        form = StageLayout(planned.stages[0].size, config.store.chunk_px, config.state, {}).arrays()["canvas_0"].form
        create_array(folder, "canvas_0", (height, width, 3), config.store.chunk_px, form, config.store.codec)
        canvas, rng = open_array(folder, "canvas_0"), np.random.default_rng(0)
        noise = [rng.random(canvas.chunk_shape, np.float32) * 255 for _ in range(_CHUNKS)]
        sums = {
            index: canvas.write_chunk(*index, noise[number % _CHUNKS])
            for number, index in enumerate(canvas.chunk_indices())
        }
        checksums = {"canvas_0": canvas.packed(sums), **metadata.metadata_checksums(folder)}
        assert METADATA in checksums
        prepared = records.StagePrepared(stage=0, tile_px=512, content_energies={}, checksums=checksums, time=now())
        journal.append(prepared)
        journal.append(records.StageDone(stage=0, iterations=0, reason="max_iterations", time=now()))


@click.command()
@click.option("--size", default=30_000, show_default=True, help="Width of the canvas in px.")
@click.option("--ratio", default=1.0, show_default=True, help="Width / height.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a value of the config.")
@click.option("--folder", type=click.Path(file_okay=False), help="Where the run is made; default: temporary.")
def main(size: int, ratio: float, settings: tuple[str, ...], folder: str | None) -> None:
    """Print planned and measured memory of the export, and its time."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = write_config(Path(name), size, ratio)
        config = resolved(load_config(path, settings))
        make_finished_run(config)
        planned = pipeline.plan(config)
        given = [part for setting in settings for part in ("--set", setting)]
        begun = time.monotonic()
        peak = peak_of_command("run", "-c", path, *given)
        seconds = time.monotonic() - begun
        for output, (height, width) in planned.outputs.items():
            size_bytes = Path(output).stat().st_size
            print(f"{width:,}×{height:,} px, {planned.picture}, {size_bytes / 1e6:,.0f} MB: {seconds:.0f} s")
        print(f"peak {peak / 2**20:.0f} MiB, planned {planned.host_bytes['export'] / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
