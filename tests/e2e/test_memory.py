"""Measured memory stays below what the plan promises, and the promise is at most three times what is measured.

Every run is a process of its own. Its peak is the kernel's (VmHWM), which is reset for every kind of work.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import Stopped
from pipeline.core.events import IterationDone, WorkDone
from tests.support.e2e import (
    TIMEOUT_S,
    canvases,
    journal,
    peak_of_command,
    results,
    run_until,
    user_environment,
    write_picture,
    write_run,
)
from tests.support.torture import damage

MIB = 2**20

# The phase of the plan for each kind of work that a run reports.
PHASES = {
    "content": "ingest",
    "style": "ingest",
    "style Gram": "style statistics",
    "canvas": "upsample",
    "content features": "Gram pass",
    "Gram pass": "Gram pass",
    "gradient pass": "gradient pass",
    "update pass": "update pass",
    "check": "update pass",
    "export": "export",
}

# Prints {kind of work: peak of resident bytes during it, summed over all processes}.
MEASURED_RUN = """
import json, sys
from pathlib import Path
import psutil
import pipeline
from pipeline.core.allocator import set_up_process

peaks = {}

def note(what):
    processes = [psutil.Process(), *psutil.Process().children()]
    peaks[what] = max(peaks.get(what, 0), sum(peak_of(Path("/proc") / str(process.pid)) for process in processes))

def peak_of(process):
    try:
        status = (process / "status").read_text()
        (process / "clear_refs").write_text("5")  # resets the peak
    except OSError:  # the process has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

def sink(event):
    note(f"{event.stage} {event.what}" if hasattr(event, "what") else type(event).__name__)

set_up_process()
if sys.argv[1] == "apply":
    pipeline.apply(pipeline.load_apply_config(sys.argv[2]), sink=sink)
else:
    pipeline.run(pipeline.load_config(sys.argv[2]), sink=sink)
note("end")
print(json.dumps(peaks))
"""


def peaks_of(command: str, config: Path) -> dict[str, int]:
    """The peaks of resident bytes of `run` or `apply`, of all its processes together, by kind of work."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED_RUN, command, config],
        capture_output=True,
        text=True,
        timeout=3 * TIMEOUT_S,
        check=False,
        env=user_environment(),  # threads take memory
    )
    assert done.returncode == 0, done.stderr
    peaks: dict[str, int] = json.loads(done.stdout)
    return peaks


def one_tile(folder: Path) -> Path:
    keys = {"initial_size": 512, "compute": {"tile_px": "auto"}, "store": {"chunk_px": 512}}
    return write_run(folder, (512, 512), (512, 400), optimizer={"max_iterations": 2}, **keys)


def many_tiles(folder: Path) -> Path:
    store = {"chunk_px": 64, "commit_interval": "1h"}  # in memory, 75 MiB in the last stage
    keys = {"initial_size": 384, "compute": {"tile_px": 256}, "store": store}
    return write_run(folder, (768, 700), (384, 300), optimizer={"max_iterations": 1}, output="out.tif", **keys)


def two_workers(folder: Path) -> Path:
    keys = {"initial_size": 384, "compute": {"tile_px": 256, "workers": 2}, "store": {"chunk_px": 256}}
    return write_run(folder, (768, 700), (384, 300), optimizer={"max_iterations": 1}, output="out.tif", **keys)


def two_devices(folder: Path) -> Path:
    """Two processes that compute tiles, and one that updates."""
    keys = {"initial_size": 384, "store": {"chunk_px": 256}}
    compute = {"tile_px": 256, "devices": ["cpu", "cpu"], "workers": 1}
    return write_run(folder, (768, 700), (384, 300), optimizer={"max_iterations": 1}, compute=compute, **keys)


def compressed(folder: Path) -> Path:
    keys = {"initial_size": 400, "compute": {"tile_px": 256}, "store": {"codec": "zstd", "chunk_px": 128}}
    keys["store"] |= {"commit_interval": "1h"}  # in memory too
    return write_run(folder, (400, 300), (300, 400), optimizer={"max_iterations": 2}, **keys)


def float64(folder: Path) -> Path:
    keys = {"initial_size": 256, "compute": {"tile_px": 128, "dtype": "float64"}}
    return write_run(folder, (256, 200), (100, 90), optimizer={"max_iterations": 1}, **keys)


def masked(folder: Path) -> Path:
    """Three regions with Gram matrices of their own, and a mask of the content weight."""
    for name in ("left", "right", "content_mask"):
        write_picture(folder / f"{name}.png", 400, 300, seed=len(name))
    styles = [{"image": "style.png", "mask": f"{name}.png"} for name in ("left", "right")]
    keys = {"initial_size": 400, "compute": {"tile_px": 192}, "store": {"chunk_px": 64}}
    loss = {"content_mask": "content_mask.png", "tv_weight": 1.0}
    keys |= {"styles": [*styles, {"image": "style.png"}], "loss": loss}
    return write_run(folder, (400, 300), (300, 400), optimizer={"max_iterations": 2}, color="luminance", **keys)


def filtered(folder: Path, pooling: str) -> Path:
    """Tiles with real cuts. No indices of maxima, but tent has a larger halo and maps of its own."""
    keys = {"initial_size": 640, "compute": {"tile_px": 128}, "store": {"chunk_px": 64}}
    keys |= {"network": {"name": "random", "pooling": pooling}}
    return write_run(folder, (640, 500), (300, 400), optimizer={"max_iterations": 1}, **keys)


def tent(folder: Path) -> Path:
    return filtered(folder, "tent")


def l2(folder: Path) -> Path:
    return filtered(folder, "l2")


def several_scales(folder: Path) -> Path:
    """A tile of 64 px is read with 128 px around it at the coarsest scale, more than it computes at once."""
    keys = {"initial_size": 192, "compute": {"tile_px": 64}, "store": {"chunk_px": 64}, "loss": {"scales": 3}}
    layers = {"content_layers": {"conv2_2": 1.0}, "style_layers": {"conv1_1": 0.5, "conv2_1": 0.5}}
    return write_run(folder, (768, 700), (700, 768), network=layers, optimizer={"max_iterations": 1}, **keys)


def large_input(folder: Path) -> Path:
    """Reading needs more memory than anything else: a progressive JPEG is decoded whole."""
    write_picture(folder / "progressive.jpg", 5000, 4000, interlace=True)
    return write_run(folder, content="progressive.jpg", size=96, initial_size=96, optimizer={"max_iterations": 1})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "make",
    [
        one_tile,
        many_tiles,
        two_workers,
        two_devices,
        compressed,
        float64,
        masked,
        tent,
        l2,
        several_scales,
        large_input,
    ],
    ids=lambda make: make.__name__,
)
def test_measured_memory_is_what_was_planned(tmp_path, make):
    """On a machine that the plan calls large enough, a run would be killed after a day because memory ran out."""
    import pipeline

    config = make(tmp_path)
    planned = pipeline.plan(pipeline.load_config(config))
    peaks = peaks_of("run", config)
    summary = report(peaks, planned)
    assert max(peaks.values()) <= planned.projected_mem_bytes, summary
    assert planned.projected_mem_bytes <= 3 * max(peaks.values()), summary
    for what, peak in peaks.items():  # a plan that is wrong in a small phase is wrong in a large one elsewhere
        if (phase := PHASES.get(what.partition(" ")[2])) is not None:
            assert peak <= planned.host_bytes[phase], (what, summary)
    print(summary)


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run of nine tiles that has finished its first stage and was stopped in its second."""
    folder = tmp_path_factory.mktemp("stopped_run")
    keys = {"initial_size": 384, "compute": {"device": "cpu", "tile_px": 256}, "store": {"chunk_px": 64}}
    config = write_run(folder, (768, 700), (384, 300), optimizer={"max_iterations": 2}, **keys)
    run_until(config, lambda event: isinstance(event, IterationDone) and event.stage == 1)
    return config


def damaged(config: Path) -> list[object]:
    """A repair that checks a whole stage and rolls it back."""
    features = next((config.with_name("run") / "store.zarr" / "stage_1").glob("features_*/c/0/0/0"))
    features.write_bytes(bytes(features.stat().st_size))
    return ["verify", "--run", config.with_name("run"), "--repair"]


COMMANDS: dict[str, Callable[[Path], list[object]]] = {
    "crop": lambda config: ["preview", "-c", config, "--crop", "80,80,560,560"],
    "grid": lambda config: [
        *("preview", "-c", config, "--size", "384"),
        *("--vary", "network.padding=zeros,reflect", "--vary", "network.pooling=max,average"),
    ],
    "repair": damaged,
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("what", COMMANDS)
def test_crops_grids_and_repairs_keep_the_promise_of_a_run(stopped_run, what):
    """A crop took 1,093 MiB where 641 were planned: beside a run that fills the machine, it would kill the run."""
    import pipeline

    planned = pipeline.plan(pipeline.load_config(stopped_run)).projected_mem_bytes
    peak = peak_of_command(*COMMANDS[what](stopped_run))
    print(f"{what}: MiB measured {peak // MIB}, planned {planned // MIB}")
    assert peak <= planned


def report(peaks: dict[str, int], planned: Any) -> str:
    measured = ", ".join(f"{what} {peak // MIB}" for what, peak in peaks.items())
    promised = ", ".join(f"{what} {size // MIB}" for what, size in planned.host_bytes.items())
    return f"MiB measured: {max(peaks.values()) // MIB} ({measured}); planned: {promised}"


TRIMMED = """
import psutil
from pipeline.core.allocator import set_up_process, trim_heap

set_up_process()
rss = psutil.Process().memory_info
before = rss().rss
retained = [bytearray(8000) for _ in range(20_000)][::100]
freed = rss().rss
trim_heap()
print((freed - before) // 2**20, (rss().rss - before) // 2**20)
"""


def test_freed_heap_is_returned_to_the_system():
    """A new stage, or the export, would need it on top of everything that the plan counts."""
    done = subprocess.run(
        [sys.executable, "-c", TRIMMED], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    freed, trimmed = map(int, done.stdout.split())
    assert freed > 100 and trimmed < 40, done.stdout


def test_the_heap_is_trimmed_before_every_stage_and_the_export(tmp_path, monkeypatch):
    """The plan of these phases assumes it: without it they would exceed the promised memory."""
    import pipeline
    from pipeline.render import preparation

    config = write_run(tmp_path, (128, 96), (64, 64), optimizer={"max_iterations": 1}, initial_size=64)
    trims: list[str] = []
    monkeypatch.setattr(preparation, "trim_heap", lambda: trims.append("stage"))
    monkeypatch.setattr(import_module("pipeline.commands.outputs"), "trim_heap", lambda: trims.append("export"))
    pipeline.run(pipeline.load_config(config))
    assert trims == ["stage", "stage", "export"]


# One tile of the whole canvas needs about twice the memory of a quarter of it, whatever a processor's kernels keep.
LARGE_TILE = {"initial_size": 1024, "compute": {"tile_px": 1024}, "store": {"chunk_px": 256}}
SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
# imported before the limit is set, because the limit is for what the run allocates
import pipeline.commands.preview.crop, pipeline.render.tile_tasks, pipeline.cli.reports
from pipeline.__main__ import main

status = Path("/proc/self/status").read_text()
now = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (now + int(sys.argv[2]) * 2**20, resource.RLIM_INFINITY))
sys.argv = ["pipeline", "run", "--config", sys.argv[1], "--log-format", "plain"]
main()
"""


def run_short_of_memory(config: Path, limit_mib: int) -> subprocess.CompletedProcess[str]:
    """The run of a config in a process that may allocate `limit_mib` more than its imports take."""
    return subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, config, str(limit_mib)],
        capture_output=True,
        text=True,
        timeout=3 * TIMEOUT_S,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # libgomp ends a process in which it cannot create its threads
    )


def search(low: int, high: int, judge: Callable[[int], int]) -> int:
    """A limit in MiB for which `judge` gives 0; below 0 it is too small, above 0 too large."""
    while True:
        limit_mib = round(math.sqrt(low * high))
        assert low < limit_mib < high, f"no limit near {limit_mib} MiB ends a run like that"
        if (verdict := judge(limit_mib)) == 0:
            return limit_mib
        low, high = (limit_mib, high) if verdict < 0 else (low, limit_mib)


def discard(config: Path) -> None:
    shutil.rmtree(config.with_name("run"), ignore_errors=True)
    config.with_name("out.png").unlink(missing_ok=True)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc and RLIMIT_DATA")
def test_memory_that_is_not_there_makes_tiles_smaller_or_stops_and_loses_nothing(tmp_path):
    """Another program may take memory that the plan counted on: a run of days would end in a traceback.

    How much a tile needs depends on the processor: the limits are searched for, by bisection.
    """
    import pipeline

    config = write_run(tmp_path, (1024, 1024), (256, 200), optimizer={"max_iterations": 1}, **LARGE_TILE)
    enough = 2 * pipeline.plan(pipeline.load_config(config)).projected_mem_bytes // MIB
    ended: list[subprocess.CompletedProcess[str]] = []

    def no_tile_fits(limit_mib: int) -> int:
        discard(config)
        ended.append(run_short_of_memory(config, limit_mib))
        return 1 if ended[-1].returncode == 0 else -("has no memory for tile " not in ended[-1].stderr)

    def smaller_tiles_fit(limit_mib: int) -> int:
        discard(config)
        ended.append(run_short_of_memory(config, limit_mib))
        return (" with tiles of " not in ended[-1].stderr) if ended[-1].returncode == 0 else -1

    too_little, stopped = search(80, enough, no_tile_fits), ended[-1]
    assert stopped.returncode == 3, stopped.stderr
    assert "Traceback" not in stopped.stderr
    in_preparation = "of stage_0.partial" in stopped.stderr
    assert not (in_preparation and config.with_name("run").exists())  # an unfinished preparation is discarded
    assert damage(config.with_name("run")) == []

    search(too_little, enough, smaller_tiles_fit)
    notes = [line for line in ended[-1].stderr.splitlines() if " with tiles of " in line]
    records = [record for record in journal(tmp_path / "run") if record["type"] == "smaller_tile"]
    assert len(records) == len(notes) == len(set(notes)), ended[-1].stderr  # once per size; a resume takes the same
    assert pipeline.status(tmp_path / "run")["state"] == "done"


class Card:
    """A device on which, from the second stage on, only tiles of 32 px find memory; also the sink of the run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int = -1):
        import torch

        from pipeline.render import tile_tasks

        self.stop, self.tiles = threading.Event(), 0
        self._full, self._stop_at, computing = False, stop_at, tile_tasks.computing

        @contextmanager
        def crowded(spec: Any) -> Iterator[None]:
            with computing(spec):
                if self._full and spec.tile.inner.width > 32:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                yield

        monkeypatch.setattr(tile_tasks, "computing", crowded)

    def __call__(self, event: Any) -> None:
        """Fills the device once the second stage computes, and counts the tiles of the gradient pass."""
        if isinstance(event, IterationDone) and event.stage == 1:
            self._full = True
            if event.iteration == self._stop_at:
                self.stop.set()
        elif isinstance(event, WorkDone) and event.what == "gradient pass":
            self.tiles = event.total


def test_a_resume_takes_the_smaller_tiles_too(tmp_path, monkeypatch):
    """A resume with the tiles of the plan would change the last bits of the output image."""
    import pipeline

    config = write_run(tmp_path, optimizer={"max_iterations": 3})
    with monkeypatch.context() as patch:
        unbroken = Card(patch)
        pipeline.run(pipeline.load_config(config), sink=unbroken)
    assert unbroken.tiles == 6  # of 32 px; there would be two of 64 px
    expected, done = canvases(tmp_path / "run"), results(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "out.png").unlink()
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        broken = Card(patch, stop_at=1)
        pipeline.run(pipeline.load_config(config), sink=broken, stop=broken.stop)
    with monkeypatch.context() as patch:
        free = Card(patch)
        pipeline.run(pipeline.load_config(config), sink=free)
    assert free.tiles == 6
    assert (canvases(tmp_path / "run"), results(tmp_path / "run")) == (expected, done)
