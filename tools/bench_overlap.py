"""How much of an iteration the device waits, with the disk as it is, and behind a slow one.

    python tools/bench_overlap.py --device cuda:0 --size 8192 --dtype float32 --json overlap.json

Waiting is the part of an iteration in which no tile computes; wanted at most 10 % where the network is the limit. A
slow disk is made by letting the bytes that are read and written pass one after another at a given speed, which is
chosen so that all bytes of an iteration take half, just as much, and twice as long as it computes. Wanted there:
seconds of an iteration at most 1.1 × max(compute, I/O).
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from bench_runs import Taken, machine, make_picture, make_weights, render
from rich.console import Console
from rich.table import Table

from pipeline.allocator import return_freed_memory

KINDS = ("compute", "read", "write", "update", "wait")


class SlowDisk:
    """Reads and writes of chunks in this process, one after another at `bytes_per_s`; None only counts them."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self.bytes, self._speed = 0, bytes_per_s
        self._lock, self._free_at = threading.Lock(), 0.0

    def _pass(self, count: int) -> None:
        with self._lock:
            self.bytes += count
            if self._speed is None:
                return
            self._free_at = max(self._free_at, time.perf_counter()) + count / self._speed
            wait_s = self._free_at - time.perf_counter()
        if wait_s > 0:
            time.sleep(wait_s)

    @contextmanager
    def in_use(self) -> Iterator[SlowDisk]:
        """All chunks pass here while the block runs."""
        preadv, pwrite = os.preadv, os.pwrite

        def slow_preadv(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
            done = preadv(descriptor, buffers, offset, flags)
            self._pass(done)
            return done

        def slow_pwrite(descriptor: int, data: Any, offset: int) -> int:
            done = pwrite(descriptor, data, offset)
            self._pass(done)
            return done

        os.preadv, os.pwrite = slow_preadv, slow_pwrite
        try:
            yield self
        finally:
            os.preadv, os.pwrite = preadv, pwrite


class Bench:
    """One stage, rendered again and again."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options = folder, options
        self.weights = options["weights"] or make_weights(folder / "random.safetensors", options["divide"])
        for number, name in enumerate(("content", "style")):
            make_picture(folder / f"{name}.png", 512, 512, number)

    def run(self, name: str, iterations: int) -> Taken:
        options = self.options
        return render(
            self.folder,
            name,
            {
                "content": "content.png",
                "styles": [{"image": "style.png"}],
                "size": options["size"],
                "initial_size": options["size"],
                "network": {"name": "vgg19", "weights": str(self.weights)},
                "optimizer": {"max_iterations": iterations},
                "compute": {"device": options["device"], "dtype": options["dtype"], "tile_px": options["tile"]},
                "memory": {"limit": options["limit"]},
                "store": {"chunk_px": options["chunk"], "state_dtype": options["state_dtype"]},
            },
        )


def measure(bench: Bench, iterations: int, slow: bool) -> list[dict[str, Any]]:
    """One row per disk: seconds of an iteration by kind, and of its bytes at the disk's speed."""
    counts = []
    for number in (1, iterations):  # their difference is iterations alone
        with SlowDisk(None).in_use() as disk:
            free = bench.run(f"free-{number}", number)
        counts.append(disk.bytes)
    bytes_each = (counts[1] - counts[0]) / max(1, iterations - 1)
    rows = [{"disk": "as it is", "io_s": 0.0, "taken": asdict(free)}]
    compute_s = free.per_iteration("compute")
    for part in (0.5, 1.0, 2.0) if slow else ():
        io_s = part * compute_s
        with SlowDisk(bytes_each / io_s).in_use():
            taken = bench.run(f"slow-{part}", iterations)
        name = f"{bytes_each / io_s / 1e6:.0f} MB/s"
        rows.append({"disk": name, "io_s": io_s, "taken": asdict(taken)})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table(title="seconds of an iteration (medians); all kinds but compute are sums over threads")
    for column in ("disk", "s/it", *KINDS, "waiting", "I/O s", "s/it ÷ max(compute, I/O)"):
        table.add_column(column, justify="right")
    for row in rows:
        taken = Taken(**row["taken"])
        wall, compute = taken.per_iteration("wall"), taken.per_iteration("compute")
        times = [wall, *(taken.per_iteration(kind) for kind in KINDS)]
        bound = wall / max(compute, row["io_s"])
        figures = (f"{1 - compute / wall:.0%}", f"{row['io_s']:.3f}", f"{bound:.2f}")
        table.add_row(row["disk"], *(f"{value:.3f}" for value in times), *figures)
    Console(width=160).print(table)


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--size", default=2048, show_default=True, help="Side of the square canvas, px.")
@click.option("--tile", default=512, show_default=True, help="Side of a tile, px.")
@click.option("--chunk", default=256, show_default=True, help="Side of a chunk, px.")
@click.option("--state-dtype", type=click.Choice(["float", "compact"]), default="float", show_default=True)
@click.option("--iterations", default=4, show_default=True)
@click.option("--slow/--no-slow", default=True, show_default=True, help="Slow disks too.")
@click.option("--limit", default="16GiB", show_default=True, help="memory.limit")
@click.option("--weights", type=click.Path(path_type=Path), help="A weights file; default random of VGG-19's widths.")
@click.option("--divide", default=1, show_default=True, help="Random weights of VGG-19's widths divided by this.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Where to work.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here too.")
def main(iterations: int, slow: bool, folder: Path | None, json_path: Path | None, **options: Any) -> None:
    """Print what an iteration's time goes to."""
    return_freed_memory()
    with tempfile.TemporaryDirectory(dir=folder) as name:
        rows = measure(Bench(Path(name), options), iterations, slow)
    show(rows)
    if json_path:
        json_path.write_text(json.dumps({"machine": machine(options["device"]), "rows": rows}), "utf-8")


if __name__ == "__main__":
    main()
