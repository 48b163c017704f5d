"""What an iteration reads from its store, against the least that it can; and features kept against features recomputed.

Bytes: those that the kernel hands to the process (rchar of /proc/self/io) in the iterations of a run of one stage, and
those of them that came from the disk. The least: for every pass the outer rectangle of every tile once, and for the
update every value once; `each byte once` counts no halo. Wanted: at most 1.1 × the least.

Windows: milliseconds and MiB from the disk for the outer rectangle of a tile, as it is read, and with whole rows of
its chunks. Features: of the same tile, those of the content, read from the store, or computed from its pixels again.

    python -m tools.bench.reads --size 3072 --json reads.json
    python -m tools.bench.reads --weights vgg19.safetensors --device cuda --tile 4096 --windows-only
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyvips
import torch
from rich.console import Console
from rich.table import Table

import pipeline
from pipeline import store
from pipeline.config.config import NetworkConfig
from pipeline.core.events import Event, IterationDone, WorkDone
from pipeline.core.tiling import Rect, grid
from pipeline.core.vgg_layers import LAYER_BY_NAME, halo_px
from pipeline.network.vgg import get_network
from pipeline.network.weights import NetworkSpec, find_weights
from pipeline.store.layout import StageLayout

STYLE, CONTENT = tuple(NetworkConfig().style_layers), tuple(NetworkConfig().content_layers)
MIB = 2**20
CHUNK_PX = 512
ITERATIONS = 2


@dataclass(frozen=True)
class Bytes:
    """Per pixel of the canvas and iteration: read, of that from the disk, the least, and each byte once."""

    state: str
    size: int
    tile_px: int
    read: float
    from_disk: float
    least: float
    once: float


@dataclass(frozen=True)
class Window:
    """Median milliseconds, processor milliseconds and MiB from the disk, of one way to get at a tile's values."""

    what: str
    way: str
    place: str
    elapsed_ms: float
    cpu_ms: float
    disk_mib: float


def counters() -> tuple[int, int]:
    """(bytes handed to this process, bytes of them fetched from a disk) so far."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(rows["rchar"]), int(rows["read_bytes"])


# --- bytes of an iteration ---


def bytes_of_run(folder: Path, state: str, size: int, tile_px: int) -> Bytes:
    """One stage of `vgg19-lite` in tiles, from its own content; the first pixel is read by the first Gram pass."""
    pyvips.Image.gaussnoise(size, size).bandjoin([0, 0]).cast("uchar").write_to_file(str(folder / "content.png"))
    pyvips.Image.gaussnoise(400, 400).bandjoin([0, 0]).cast("uchar").write_to_file(str(folder / "style.png"))
    config = folder / f"{state}-{size}.json"
    sections = {
        "optimizer": {"max_iterations": ITERATIONS},
        "network": {"name": "vgg19-lite"},
        "compute": {"device": "cpu", "tile_px": tile_px},
        "store": {"state_dtype": state, "chunk_px": CHUNK_PX},
        "memory": {"limit": "16GiB"},
    }
    files = {"content": "content.png", "styles": [{"image": "style.png"}], "output": f"{config.stem}.tif"}
    config.write_text(json.dumps({**files, "size": size, "initial_size": size, **sections}), encoding="utf-8")
    seen: list[tuple[int, int]] = []

    def sink(event: Event) -> None:
        if isinstance(event, IterationDone) or (isinstance(event, WorkDone) and event.what == "content features"):
            seen.append(counters())

    pipeline.run(pipeline.load_config(config), sink=sink)
    tiles = len(grid(size, size, tile_px))
    read, from_disk = (after - before for before, after in zip(seen[tiles - 1], seen[-1], strict=True))
    widths = find_weights("vgg19-lite", None, 0).widths
    least, once = least_bytes(state, size, tile_px, {name: widths[name] for name in CONTENT})
    per_px = ITERATIONS * size**2
    return Bytes(state, size, tile_px, read / per_px, from_disk / per_px, least / size**2, once / size**2)


def least_bytes(state: str, size: int, tile_px: int, content_widths: dict[str, int]) -> tuple[int, int]:
    """(with the halo of every tile, without) of one iteration."""
    form = "compact" if state == "compact" else "float32"
    arrays = StageLayout((size, size), CHUNK_PX, form, content_widths).arrays()
    value = {name: array.stored_bytes // (-(-size // CHUNK_PX) * CHUNK_PX) ** 2 for name, array in arrays.items()}
    features = sum(value[f"features_{name}"] for name in content_widths)
    update = sum(value[name] for name in ("gradient", "canvas_0", "m_0", "v_0"))
    tiles = grid(size, size, tile_px)
    gram, gradient = (
        sum(tile.outer(halo).area for tile in tiles) for halo in (halo_px(STYLE), 2 * halo_px(STYLE + CONTENT))
    )
    canvas = value["canvas_0"]
    return gram * canvas + gradient * (canvas + features) + size**2 * update, size**2 * (2 * canvas + features + update)


# --- one tile ---


class TileBench:
    """The canvas and the content's features around one inner tile."""

    def __init__(self, folder: Path, network: NetworkSpec, state: str, tile_px: int) -> None:
        self.network, self.folder, side = network, folder / "stage_0", tile_px + 2 * CHUNK_PX
        store.create_stage(self.folder)
        widths = {name: network.source.widths[name] for name in CONTENT}
        rng = np.random.default_rng(0)
        form = "compact" if state == "compact" else "float32"
        for name, array in StageLayout((side, side), CHUNK_PX, form, widths).arrays().items():
            if name in ("canvas_0", "content") or name.startswith("features"):
                store.create_array(self.folder, name, array.shape, array.chunk_px, array.form, "none")
                opened = store.open_array(self.folder, name)
                chunk = rng.uniform(0, 255, opened.chunk_shape).astype(opened.value_dtype)
                for cy, cx in opened.chunk_indices():
                    opened.write_chunk(cy, cx, chunk)
        self.side = side
        inner = Rect(CHUNK_PX, CHUNK_PX + tile_px, CHUNK_PX, CHUNK_PX + tile_px)
        self.gram = inner.grown(halo_px(STYLE), side, side)
        self.gradient = inner.grown(2 * halo_px(STYLE + CONTENT), side, side)

    def ways(self) -> list[tuple[str, str, Callable[[], object]]]:
        """(what, way, how)."""
        canvas, (layer,) = store.open_array(self.folder, "canvas_0"), CONTENT
        features = store.open_array(self.folder, f"features_{layer}")
        region = self.gradient.positions(LAYER_BY_NAME[layer])
        return [
            ("canvas, Gram pass", "strips", lambda: canvas.read_window(self.gram)),
            ("canvas, Gram pass", "whole rows", lambda: whole_rows(canvas, self.gram)),
            ("canvas, gradient pass", "strips", lambda: canvas.read_window(self.gradient)),
            ("canvas, gradient pass", "whole rows", lambda: whole_rows(canvas, self.gradient)),
            (layer, "strips", lambda: features.read_window(region)),
            (layer, "whole rows", lambda: whole_rows(features, region)),
            (layer, "to the device", lambda: self._to_device(features.read_window(region))),
            (layer, "recomputed", lambda: self.recompute(layer)),
        ]

    def _to_device(self, values: Any) -> None:
        torch.from_numpy(values).to(self.network.device)
        self._wait()

    def recompute(self, layer: str) -> None:
        """The content's features from its pixels: those around the gradient's outer rectangle, a halo more."""
        outer = self.gradient.grown(halo_px(CONTENT), self.side, self.side)
        pixels = store.open_array(self.folder, "content").read_window(outer)
        canvas_1CHW = torch.from_numpy(pixels).to(self.network.device, torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            network = get_network(self.network)
            for _ in network.features(canvas_1CHW, outer, (self.side, self.side), {layer}, self.gradient):
                pass
        self._wait()

    def _wait(self) -> None:
        if self.network.device != "cpu":
            torch.cuda.synchronize()

    def drop_from_cache(self) -> None:
        """The next reads come from the disk."""
        os.sync()
        for path in self.folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def whole_rows(array: store.StageArray, rect: Rect) -> Any:
    """The same values by whole rows of chunks: the window's columns out to the chunks' borders."""
    chunk_px, width = array.chunk_px, array.shape[1]
    wide = rect._replace(x0=rect.x0 // chunk_px * chunk_px, x1=min(width, -(-rect.x1 // chunk_px) * chunk_px))
    return np.ascontiguousarray(array.read_window(wide)[:, rect.x0 - wide.x0 : rect.x1 - wide.x0])


def windows(bench: TileBench, turns: int) -> list[Window]:
    """All ways in turn, from the page cache and from the disk."""
    rows = []
    for place in ("page cache", "disk"):
        seen: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for _ in range(turns + 1):
            for what, way, call in bench.ways():
                if place == "disk":
                    bench.drop_from_cache()
                start, cpu, (_, disk) = time.perf_counter(), time.process_time(), counters()
                call()
                taken = (time.perf_counter() - start) * 1e3, (time.process_time() - cpu) * 1e3
                seen.setdefault((what, way), []).append((*taken, (counters()[1] - disk) / MIB))
        for (what, way), all_turns in seen.items():
            medians = (statistics.median(column) for column in zip(*all_turns[1:], strict=True))
            rows.append(Window(what, way, place, *medians))
    return rows


@click.command()
@click.option("--size", default=3072, show_default=True, help="Side of the canvas of the runs, px.")
@click.option("--tile", "tile_px", default=1024, show_default=True, help="Side of a tile, px.")
@click.option("--state", "states", multiple=True, type=click.Choice(["float", "compact"]), default=["float", "compact"])
@click.option("--weights", type=click.Path(path_type=Path), help="For the features; default vgg19-lite.")
@click.option("--device", default="cpu", show_default=True, help="Where features are recomputed.")
@click.option("--turns", default=7, show_default=True)
@click.option("--windows-only", is_flag=True, help="No runs.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write; default the temporary folder.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here too.")
def main(
    size: int,
    tile_px: int,
    states: tuple[str, ...],
    weights: Path | None,
    device: str,
    turns: int,
    windows_only: bool,
    folder: Path | None,
    json_path: Path | None,
) -> None:
    """Print bytes per iteration, and the cost of a tile's reads."""
    found: dict[str, list[Bytes] | list[Window]] = {}
    source = find_weights("vgg19" if weights else "vgg19-lite", weights, 0)
    for state in states:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            network = NetworkSpec(source, "replicate", "max", "float32", device)
            found[f"windows, {state}"] = rows = windows(TileBench(Path(name), network, state, tile_px), turns)
        network_name = weights.name if weights else "vgg19-lite"
        table = Table(title=f"{state}, a tile of {tile_px} px, {network_name}, {device}, {os.cpu_count()} cores")
        for column in ("what", "way", "place", "ms", "CPU ms", "MiB from disk"):
            table.add_column(column)
        for row in rows:
            figures = (f"{figure:.1f}" for figure in (row.elapsed_ms, row.cpu_ms, row.disk_mib))
            table.add_row(row.what, row.way, row.place, *figures)
        Console().print(table)
    if not windows_only:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            bytes_of_run(Path(name), "float", 2 * CHUNK_PX, CHUNK_PX)  # libraries are read too, once
            found["bytes"] = runs = [bytes_of_run(Path(name), state, size, tile_px) for state in states]
        table = Table(title="bytes per pixel and iteration")
        for column in ("state", "canvas", "tile", "read", "from disk", "least", "read / least", "each byte once"):
            table.add_column(column, justify="right")
        for run in runs:
            figures = (
                f"{figure:.2f}" for figure in (run.read, run.from_disk, run.least, run.read / run.least, run.once)
            )
            table.add_row(run.state, str(run.size), str(run.tile_px), *figures)
        Console().print(table)
    if json_path:
        shown = {name: [asdict(row) for row in rows] for name, rows in found.items()}
        json_path.write_text(json.dumps(shown, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
