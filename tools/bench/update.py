"""The update pass compared with a plain np.memmap sweep over the same bytes, in the same process, in turn.

The sweep does the same arithmetic on seven flat files, chunk by chunk, without tasks and checksums. A second sweep only
moves the bytes. Goals, in GB of state read and written per second:

    pass / sweep      ≥ 0.8 with everything in the page cache, ≥ 1.0 read from disk
    Dask              ≤ 0.3 ms per chunk
    extra memory      ≤ 64 MiB, whatever the canvas

`from disk` drops the files from the page cache before every turn; writes go to the cache, as in a run.

    python -m tools.bench.update --size 2048 --size 8192 --state float --state compact --json update.json
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline import store
from pipeline.core.allocator import set_up_process
from pipeline.core.tiling import grid
from pipeline.executors.threads import ThreadExecutor
from pipeline.plan.processes import WORKERS
from pipeline.render import adam
from pipeline.render.update import UpdateSpec, update_specs, update_task
from pipeline.store.encodings import BFLOAT16, FIXED16, RoundingBytes
from pipeline.store.layout import slot_names

STEP = adam.AdamStep(0.9, 0.99, 1e-6, 0.5, clip=True)
ARRAYS = ("gradient", "canvas_0", "m_0", "v_0", "canvas_1", "m_1", "v_1")
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """Medians over the turns. `ratio`: speed of the pass relative to that of the sweep in the same turn.

    `cpu_ms`: processor time of all threads per chunk of (pass, sweep), the minimum over the turns, because other
    programs on the machine affect a minimum least.
    """

    state: str
    size: int
    place: str
    pass_gb_s: float
    sweep_gb_s: float
    bytes_gb_s: float
    ratio: float
    extra_mib: float
    dask_ms_per_chunk: float
    cpu_ms: tuple[float, float]


class Bench:
    """The state of one stage as the program stores it, and the same bytes in flat files."""

    def __init__(self, folder: Path, state: str, size: int, chunk: int) -> None:
        self.folder, self.flat, self.compact = folder / "stage_0", folder / "flat", state == "compact"
        self.shape = (chunk, chunk, 3)
        self.slot = self.turns = 0
        self.checksums: dict[str, str] = {}
        store.create_stage(self.folder)
        self.flat.mkdir()
        rng = np.random.default_rng(0)
        for name in ARRAYS:
            form = "float32" if not self.compact else "fixed16" if name.startswith("canvas") else "bfloat16"
            store.create_array(self.folder, name, (size, size, 3), chunk, form, "none")
            array = store.open_array(self.folder, name)
            values = rng.uniform(0, 200 if name.startswith("canvas") else 1e-3, self.shape).astype(np.float32)
            data = np.empty(self.shape, array.dtype)
            if array.encoding:
                array.encoding.encode(values, data)
            else:
                data[...] = values
            self.chunks = array.chunk_indices()
            self.checksums[name] = array.packed({(cy, cx): array.write_chunk(cy, cx, data) for cy, cx in self.chunks})
            with (self.flat / name).open("wb") as file:
                for _ in self.chunks:
                    file.write(data.data)
        self.gradient = store.open_array(self.folder, "gradient", self.checksums["gradient"])
        self.chunk_bytes = data.nbytes
        self.gigabytes = len(ARRAYS) * data.nbytes * len(self.chunks) / 1e9

    def specs(self) -> list[UpdateSpec]:
        tiles = grid(*self.gradient.shape[:2], 2 * self.gradient.chunk_px)
        specs = update_specs(UpdateSpec(self.folder, self.slot, STEP, self.checksums, (0, 0, self.turns)), tiles)
        sums = self.gradient.checksums
        return [replace(spec, gradient_sums={chunk: sums[chunk] for chunk in spec.chunks}) for spec in specs]

    def update_pass(self, executor: ThreadExecutor) -> None:
        """The program's update pass into the other slot."""
        results = executor.map(update_task, self.specs())
        for name in slot_names(1 - self.slot, averaged=False):
            array = store.open_array(self.folder, name)
            sums = {index: value for result in results for index, value in result.sums[name].items()}
            self.checksums[name] = array.packed(sums)

    def sweep(self, update: Callable[[list[Any], list[Any]], None]) -> None:
        """Call `update` for every chunk with (gradient, canvas, m, v) and the targets of canvas, m and v."""
        maps = {name: np.memmap(self.flat / name, np.uint16 if self.compact else np.float32, "r+") for name in ARRAYS}
        count = self.chunk_bytes // maps["gradient"].itemsize
        for start in range(0, maps["gradient"].size, count):
            part = {name: values[start : start + count] for name, values in maps.items()}
            update(
                [part[name] for name in ("gradient", *slot_names(self.slot, averaged=False))],
                [part[name] for name in slot_names(1 - self.slot, averaged=False)],
            )

    def arithmetic(self) -> Callable[[list[Any], list[Any]], None]:
        """The arithmetic of the pass in plain numpy, on reused buffers."""
        count = int(np.prod(self.shape))
        values = [np.empty(count, np.float32) for _ in range(5)]

        def float_update(old: list[Any], new: list[Any]) -> None:
            gradient, scratch = values[:2]
            gradient[...] = old[0]
            for source, target in zip(old[1:], new, strict=True):
                target[...] = source
            _measures(adam.update(gradient, *new, scratch, STEP))

        def compact_update(old: list[Any], new: list[Any]) -> None:
            gradient, canvas, m, v, scratch = values
            for encoding, source, target in zip((BFLOAT16, FIXED16, BFLOAT16, BFLOAT16), old, values, strict=False):
                encoding.decode(source, target)
            _measures(adam.update(gradient, canvas, m, v, scratch, STEP))
            random = RoundingBytes(0, 0, self.turns, (0, 0)).take((count,))
            spare = gradient.view(np.uint32)
            FIXED16.encode_stochastic(canvas, random, new[0], spare)
            BFLOAT16.encode(m, new[1])
            BFLOAT16.encode_stochastic(v, random, new[2], spare)

        return compact_update if self.compact else float_update

    def files(self) -> Iterator[Path]:
        for folder in (self.folder, self.flat):
            yield from (path for path in folder.rglob("*") if path.is_file())

    def drop_from_cache(self) -> None:
        os.sync()  # dirty pages cannot be dropped
        for path in self.files():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _measures(abs_u: Any) -> tuple[float, float]:
    return float(abs_u.sum(dtype=np.float64)), float(abs_u.max())


def move_bytes(old: list[Any], new: list[Any]) -> None:
    """Read four arrays and write three, with almost no arithmetic."""
    np.maximum(old[0], old[1], out=new[0])
    for source, target in zip(old[2:], new[1:], strict=True):
        target[...] = source


def resident_bytes() -> int:
    """Anonymous memory of this process, without page cache and mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def watching_memory() -> Iterator[list[int]]:
    """A list whose last item is the peak memory within the block, sampled every 2 ms."""
    samples, done = [resident_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            samples.append(max(samples[-1], resident_bytes()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield samples
    finally:
        done.set()
        watcher.join()


def nothing(_spec: UpdateSpec) -> None:
    """A task that measures the scheduler alone."""


def _seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds (elapsed, of processor time) that `call` takes."""
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - cpu


def measure(folder: Path, state: str, size: int, chunk: int, turns: int) -> list[Row]:
    """The rows of both places for one state and one size."""
    bench = Bench(folder, state, size, chunk)
    rows = []
    with ThreadExecutor(WORKERS) as executor:
        before = resident_bytes()
        with watching_memory() as samples:
            bench.update_pass(executor)
        extra = (samples[-1] - before) / MIB
        specs = bench.specs()
        dask = min(_seconds(lambda: executor.map(nothing, specs))[0] for _ in range(5)) * 1000 / len(bench.chunks)
        calls = {
            "pass": lambda: bench.update_pass(executor),
            "sweep": lambda: bench.sweep(bench.arithmetic()),
            "bytes": lambda: bench.sweep(move_bytes),
        }
        for place in ("page cache", "from disk"):
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
            for _ in range(turns + 1):
                for name, call in calls.items():
                    if place == "from disk":
                        bench.drop_from_cache()
                    taken[name].append(_seconds(call))
                bench.slot, bench.turns = 1 - bench.slot, bench.turns + 1
            taken = {name: seconds[1:] for name, seconds in taken.items()}  # without the warm-up turn
            ratio = statistics.median(b[0] / a[0] for a, b in zip(taken["pass"], taken["sweep"], strict=True))
            speeds = [bench.gigabytes / statistics.median(elapsed for elapsed, _ in taken[name]) for name in calls]
            cpu_ms = tuple(min(cpu for _, cpu in taken[name]) * 1000 / len(bench.chunks) for name in ("pass", "sweep"))
            rows.append(Row(state, size, place, *speeds, ratio, extra, dask, (cpu_ms[0], cpu_ms[1])))
    return rows


@click.command()
@click.option("--size", "sizes", multiple=True, default=[2048, 8192], show_default=True, help="Sides of canvases, px.")
@click.option("--state", "states", multiple=True, type=click.Choice(["float", "compact"]), default=["float", "compact"])
@click.option("--chunk", default=512, show_default=True, help="Side of a chunk, px.")
@click.option("--turns", default=5, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Working directory; default: a temporary one.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
def main(
    sizes: tuple[int, ...], states: tuple[str, ...], chunk: int, turns: int, folder: Path | None, json_path: Path | None
) -> None:
    """Print speed, memory and scheduling cost of the update pass."""
    set_up_process()
    rows: list[Row] = []
    for state in states:
        for size in sizes:
            with tempfile.TemporaryDirectory(dir=folder) as name:
                rows += measure(Path(name), state, size, chunk, turns)
    table = Table(title=f"update pass, chunks of {chunk} px, {WORKERS} threads, {os.cpu_count()} cores")
    for column in (
        "state",
        "canvas",
        "place",
        "pass GB/s",
        "sweep GB/s",
        "bytes GB/s",
        "pass/sweep",
        "CPU ms",
        "MiB",
        "Dask ms",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        figures = [f"{figure:.2f}" for figure in (row.pass_gb_s, row.sweep_gb_s, row.bytes_gb_s, row.ratio)]
        cpu = "/".join(f"{figure:.1f}" for figure in row.cpu_ms)
        memory, dask = f"{row.extra_mib:.1f}", f"{row.dask_ms_per_chunk:.3f}"
        table.add_row(row.state, str(row.size), row.place, *figures, cpu, memory, dask)
    Console(width=120).print(table)
    if json_path:
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
