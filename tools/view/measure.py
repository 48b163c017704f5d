"""Measures the viewer: first picture, latency of tiles, memory, and what a run loses while somebody looks.

python -m tools.view.measure store FOLDER --side 16384      a run directory with a canvas of this size, and its overview
python -m tools.view.measure tiles FOLDER/run               a viewer of it: tiles cold and warm, first picture, memory
python -m tools.view.measure slowdown CONFIG --pairs 6      iterations with and without a viewer in use, in turn
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil

import pipeline
from pipeline.core.events import Event, IterationDone
from pipeline.rundir import (
    Begun,
    Iteration,
    Journal,
    StagePrepared,
    journal_path,
    manifest_path,
    now,
    stage_path,
    write_manifest,
)
from pipeline.rundir.records import KeptConfig, KeptOptimizer, Manifest, StageSizes
from pipeline.store import OverviewChunk, create_array, create_stage, open_array
from pipeline.store.metadata import metadata_checksums
from pipeline.viewer.canvas import TILE_PX, max_level

CHUNK_PX = 512
MIB = 2**20


@click.group()
def main() -> None:
    """Measure the viewer."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--side", default=16384, show_default=True)
@click.option("--overview/--no-overview", default=True, help="As a run writes it, or as an older one did not.")
def store(folder: Path, side: int, overview: bool) -> None:
    """Write the run directory FOLDER/run, whose only stage is being painted."""
    run, stage_dir = folder / "run", stage_path(folder / "run", 0)
    stage_dir.parent.mkdir(parents=True)
    create_stage(stage_dir)
    rng, sums = np.random.default_rng(0), {}
    for name in ("canvas_0", "canvas_1"):
        create_array(stage_dir, name, (side, side, 3), CHUNK_PX, "float32", "none")
    array = open_array(stage_dir, "canvas_1")
    noise = rng.normal(0, 20, array.chunk_shape).astype(np.float32)
    for cy, cx in array.chunk_indices():
        data = np.clip(noise + rng.uniform(40, 215, 3).astype(np.float32), 0, 255)
        sums[cy, cx] = array.write_chunk(cy, cx, data)
        if overview:
            part = OverviewChunk(array, (cy, cx))
            part.add(data)
            part.write(sums[cy, cx])
    manifest = Manifest(
        format=2,
        created=now(),
        config=KeptConfig(output=str(folder / "out.png"), optimizer=KeptOptimizer(max_iterations=40)),
        stages=[StageSizes(size=(side, side), style_sizes=[], max_iterations=40)],
        threads=1,
        result_fields={},
        inputs={},
    )
    write_manifest(manifest_path(run), manifest)
    journal, metadata = Journal(journal_path(run)), metadata_checksums(stage_dir)
    zeros = {"canvas_0": open_array(stage_dir, "canvas_0").packed_zeros()}
    journal.append(Begun(manifest=manifest, time=now()))
    journal.append(StagePrepared(stage=0, content_energies={}, checksums={**zeros, **metadata}, time=now()))
    numbers: dict[str, Any] = dict.fromkeys(("objective", "content_loss", "style_loss", "mean_abs_u", "max_abs_u"), 1.0)
    written = {"canvas_1": array.packed(sums)}
    journal.append(
        Iteration(stage=0, iteration=0, **numbers, alpha=1.0, seconds={}, stepped=True, checksums=written, time=now())
    )


class Viewer:
    """`pipeline view` as a process."""

    def __init__(self, run: Path) -> None:
        command = [sys.executable, "-m", "pipeline", "view", "--run", str(run)]
        # a session of its own, as in another terminal: Linux may divide the processor among sessions
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        _, _, host, token, _ = self.address.split("/")
        self._connection, self._base = http.client.HTTPConnection(host, timeout=300), f"/{token}/"

    def get(self, path: str) -> bytes:
        """The answer; raises ValueError for any other status than 200."""
        self._connection.request("GET", self._base + path)
        answer = self._connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise ValueError(f"{path}: {answer.status} {data[:200]!r}")
        return data

    def newest(self) -> dict[str, Any]:
        """The newest stage's picture."""
        pictures = json.loads(self.get("state"))["pictures"]
        newest: dict[str, Any] = [picture for picture in pictures if picture["kind"] == "stage"][-1]
        return newest

    def memory(self) -> float:
        """Resident memory in MiB, without the page cache."""
        process = psutil.Process(self.process.pid)
        return float(max(one.memory_info().rss for one in (process, *process.children(recursive=True))) / MIB)

    def processor_s(self) -> float:
        """Processor time of its processes so far."""
        process = psutil.Process(self.process.pid)
        return float(sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True))))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--walk", default=3000, show_default=True, help="Tiles at random places after all others.")
@click.option("--browser/--no-browser", "with_browser", default=True, help="Measure the first picture in Chromium.")
def tiles(run: Path, walk: int, with_browser: bool) -> None:
    """Latencies of whole HTTP requests, one after another, and the viewer's memory."""
    if with_browser:
        for kind, times in zip(
            ("whole picture, coarse", "sharp", "viewer's processor time"), first_pictures(run), strict=True
        ):
            click.echo(f"first picture in Chromium, {kind}: {', '.join(f'{1000 * one:.0f}' for one in times)} ms")
    click.echo(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    viewer = Viewer(run)
    try:
        picture = viewer.newest()
        top, rng = max_level(picture["height"], picture["width"]), random.Random(0)
        for down in range(min(8, top)):
            columns, rows = (_tiles_along(picture[side], down) for side in ("width", "height"))
            places = [(x, y) for y in range(rows) for x in range(columns)]
            chosen = rng.sample(places, min(100, len(places)))
            paths = [f"{picture['tiles']}{top - down}/{x}_{y}.jpg" for x, y in chosen]
            cold, warm = _latencies(viewer, paths), _latencies(viewer, paths)
            click.echo(f"1/{2**down}: {len(paths)} tiles, cold {cold}, warm {warm}, memory {viewer.memory():.0f} MiB")
        seen = [viewer.memory()]
        for number in range(walk):
            down = rng.choice((0, 0, 0, 1, 2, 3, 4))
            columns, rows = (_tiles_along(picture[side], down) for side in ("width", "height"))
            viewer.get(f"{picture['tiles']}{top - down}/{rng.randrange(columns)}_{rng.randrange(rows)}.jpg")
            if number % (walk // 6 or 1) == 0:
                seen.append(viewer.memory())
        click.echo(f"memory during {walk} tiles at random places: {', '.join(f'{one:.0f}' for one in seen)} MiB")
    finally:
        viewer.close()


def _tiles_along(side_px: int, halvings: int) -> int:
    """Tiles along a side of the level that is shrunk by 2^halvings."""
    return math.ceil(math.ceil(side_px / 2**halvings) / TILE_PX)


def _latencies(viewer: Viewer, paths: Sequence[str]) -> str:
    taken = []
    for path in paths:
        start = time.perf_counter()
        viewer.get(path)
        taken.append(1000 * (time.perf_counter() - start))
    return f"p50 {statistics.median(taken):.0f} p95 {sorted(taken)[int(0.95 * (len(taken) - 1))]:.0f} ms"


# In the page, from its first script on: when the coarse picture was painted, and the frame in which all tiles were.
_WATCH = """
const seen = window.firstPicture = {};
const observer = new PerformanceObserver((list) => { seen.coarse = list.getEntries()[0].renderTime; });
observer.observe({ type: "element", buffered: true });
(function watch() {
  const item = window.pipelineView?.viewA.layers.get("a")?.item;
  if (item?.getFullyLoaded()) requestAnimationFrame(() => { seen.sharp = performance.now(); });
  else requestAnimationFrame(watch);
})();
"""


def first_pictures(run: Path, count: int = 6) -> list[list[float]]:
    """Of viewers that have just started, asked for the page as soon as they print its address, in seconds.

    Until the whole picture was painted once, until all tiles of the screen were, and the viewer's processor time since
    it printed the address. The first of `count` is dropped: it starts the browser's own processes.
    """
    from tests.support.browser import browser  # noqa: PLC0415 - selenium is a tool of the tests

    found = []
    with browser(logged=False) as page:
        page.resize(1280, 800)
        page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH})
        for _ in range(count):
            page.driver.get("about:blank")
            viewer = Viewer(run)
            try:
                started = viewer.processor_s()
                page.driver.get(viewer.address)
                page.wait("window.firstPicture?.sharp", 120)
                times = page.run("window.firstPicture")
                busy = viewer.processor_s() - started
                coarse = min(times.get("coarse", times["sharp"]), times["sharp"])  # none if the tiles were there first
                found.append((coarse / 1000, times["sharp"] / 1000, busy))
            finally:
                viewer.close()
    return [list(kind) for kind in zip(*found[1:], strict=True)]


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--pairs", default=6, show_default=True)
@click.option("--each", default=4, show_default=True, help="Iterations in a row with or without the viewer.")
@click.option("--tiles-per-s", default=2.0, show_default=True, help="Tiles that the user of the viewer asks for.")
def slowdown(config: Path, pairs: int, each: int, tiles_per_s: float) -> None:
    """Seconds of the iterations of the last stage, in turn with and without a viewer in use."""
    loaded, stop = pipeline.load_config(config), threading.Event()
    turns: dict[int, list[float]] = {}
    last, shares = len(pipeline.plan(loaded).stages) - 1, list[float]()
    stack, begun = contextlib.ExitStack(), [time.perf_counter()]

    def sink(event: Event) -> None:
        if not isinstance(event, IterationDone) or event.stage < last:
            return
        took = time.perf_counter() - begun[0]
        turn, step = divmod(event.iteration, each)
        if step > 0:  # the first of a turn has the start or the end of the viewer in it
            turns.setdefault(turn, []).append(took)
        if step == each - 1:
            stack.close()
            if turn % 2 == 0:
                stack.enter_context(_in_use(loaded.work_dir, tiles_per_s, shares))
        if turn >= 2 * pairs:
            stop.set()
        begun[0] = time.perf_counter()

    with contextlib.suppress(pipeline.errors.Stopped), stack:  # type: ignore[attr-defined]
        pipeline.run(loaded, sink=sink, stop=stop)
    medians = [statistics.median(turns[turn]) for turn in range(2 * pairs)]
    ratios = [100 * (watched / alone - 1) for alone, watched in zip(medians[::2], medians[1::2], strict=True)]
    click.echo(f"seconds of an iteration, alone and watched in turn: {', '.join(f'{one:.3f}' for one in medians)}")
    spread = f"{min(ratios):+.1f} to {max(ratios):+.1f}"
    click.echo(f"slower by {statistics.median(ratios):+.1f} % (median of {pairs} pairs; {spread})")
    click.echo(f"the viewer took {100 * statistics.mean(shares):.1f} % of one core, load {os.getloadavg()[0]:.1f}")


@contextlib.contextmanager
def _in_use(run: Path, tiles_per_s: float, shares: list[float]) -> Iterator[None]:
    """A viewer whose user walks around, for the duration of the block. `shares` gets its share of one core."""
    viewer, done = Viewer(run), threading.Event()
    started, begun = viewer.processor_s(), time.perf_counter()

    def walk() -> None:
        rng = random.Random(0)
        while not done.wait(1 / tiles_per_s):
            with contextlib.suppress(ValueError, OSError, http.client.HTTPException):  # the iteration has gone on
                picture = viewer.newest()
                top, down = max_level(picture["height"], picture["width"]), rng.choice((0, 0, 1, 3))
                columns, rows = (_tiles_along(picture[side], down) for side in ("width", "height"))
                viewer.get(f"{picture['tiles']}{top - down}/{rng.randrange(columns)}_{rng.randrange(rows)}.jpg")

    walker = threading.Thread(target=walk)
    walker.start()
    try:
        yield
    finally:
        done.set()
        walker.join()
        shares.append((viewer.processor_s() - started) / (time.perf_counter() - begun))
        viewer.close()


if __name__ == "__main__":
    main()
