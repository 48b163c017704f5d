"""Measured memory stays below what the plan promises, and the promise is not so large that it says nothing.

Every run is a process of its own. Its peak is the kernel's (VmHWM), read anew for every kind of work.
"""

from __future__ import annotations

import json
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
from tests.support.e2e import TIMEOUT_S, canvases, peak_of_command, results, run_until, write_picture, write_run

MIB = 2**20

# What a run calls its work, and the plan's phase of it.
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

# Prints {what was done: the peaks of resident bytes of all processes meanwhile, summed}.
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
        (process / "clear_refs").write_text("5")  # the peak begins anew
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

def sink(event):
    note(f"{event.stage} {event.what}" if hasattr(event, "what") else type(event).__name__)

set_up_process()
pipeline.run(pipeline.load_config(sys.argv[1]), sink=sink)
note("end")
print(json.dumps(peaks))
"""


def one_tile(folder: Path) -> Path:
    keys = {"initial_size": 512, "compute": {"tile_px": "auto"}, "store": {"chunk_px": 512}}
    return write_run(folder, (512, 512), (512, 400), optimizer={"max_iterations": 2}, **keys)


def many_tiles(folder: Path) -> Path:
    keys = {"initial_size": 512, "compute": {"tile_px": 256}, "store": {"chunk_px": 64}}
    return write_run(folder, (1024, 900), (512, 400), optimizer={"max_iterations": 1}, output="out.tif", **keys)


def two_workers(folder: Path) -> Path:
    keys = {"initial_size": 512, "compute": {"tile_px": 256, "workers": 2}, "store": {"chunk_px": 256}}
    return write_run(folder, (1024, 900), (512, 400), optimizer={"max_iterations": 1}, output="out.tif", **keys)


def compressed(folder: Path) -> Path:
    keys = {"initial_size": 400, "compute": {"tile_px": 256}, "store": {"codec": "zstd", "chunk_px": 128}}
    return write_run(folder, (400, 300), (300, 400), optimizer={"max_iterations": 2}, **keys)


def float64(folder: Path) -> Path:
    keys = {"initial_size": 256, "compute": {"tile_px": 128, "dtype": "float64"}}
    return write_run(folder, (256, 200), (100, 90), optimizer={"max_iterations": 1}, **keys)


def masked(folder: Path) -> Path:
    """Three regions with Grams of their own, and a map of the content's weight."""
    for name in ("left", "right", "kept"):
        write_picture(folder / f"{name}.png", 400, 300, seed=len(name))
    styles = [{"image": "style.png", "mask": f"{name}.png"} for name in ("left", "right")]
    keys = {"initial_size": 400, "compute": {"tile_px": 192}, "store": {"chunk_px": 64}}
    keys |= {"styles": [*styles, {"image": "style.png"}], "loss": {"content_mask": "kept.png", "tv_weight": 1.0}}
    return write_run(folder, (400, 300), (300, 400), optimizer={"max_iterations": 2}, color="luminance", **keys)


def large_input(folder: Path) -> Path:
    """Reading needs more than all else: a progressive JPEG is decoded whole."""
    write_picture(folder / "progressive.jpg", 5000, 4000, interlace=True)
    return write_run(folder, content="progressive.jpg", size=96, initial_size=96, optimizer={"max_iterations": 1})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "make",
    [one_tile, many_tiles, two_workers, compressed, float64, masked, large_input],
    ids=lambda make: make.__name__,
)
def test_measured_memory_is_what_was_planned(tmp_path, make):
    """A run would be killed for memory after a day, on a machine that the plan said was large enough."""
    import pipeline

    config = make(tmp_path)
    planned = pipeline.plan(pipeline.load_config(config))
    done = subprocess.run(
        [sys.executable, "-c", MEASURED_RUN, config], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    told = report(peaks, planned)
    assert max(peaks.values()) <= planned.projected_mem_bytes, told
    assert planned.projected_mem_bytes <= 3 * max(peaks.values()), told
    for what, peak in peaks.items():  # a plan that is wrong in a small phase is wrong in a large one elsewhere
        if (phase := PHASES.get(what.partition(" ")[2])) is not None:
            assert peak <= planned.host_bytes[phase], (what, told)
    print(told)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run of 16 tiles that has finished its first stage, and is in its second."""
    folder = tmp_path_factory.mktemp("begun")
    keys = {"initial_size": 512, "compute": {"device": "cpu", "tile_px": 256}, "store": {"chunk_px": 64}}
    config = write_run(folder, (1024, 900), (512, 400), optimizer={"max_iterations": 2}, **keys)
    run_until(config, lambda event: isinstance(event, IterationDone) and event.stage == 1)
    return config


def damaged(config: Path) -> list[object]:
    """A repair that checks a whole stage and rolls it back."""
    features = next((config.with_name("run") / "store.zarr" / "stage_1").glob("features_*/c/0/0/0"))
    features.write_bytes(bytes(features.stat().st_size))
    return ["verify", "--run", config.with_name("run"), "--repair"]


COMMANDS: dict[str, Callable[[Path], list[object]]] = {
    "crop": lambda config: ["preview", "-c", config, "--crop", "100,100,700,700"],
    "grid": lambda config: [
        *("preview", "-c", config, "--size", "512"),
        *("--vary", "network.padding=zeros,reflect", "--vary", "network.pooling=max,average"),
    ],
    "repair": damaged,
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("what", COMMANDS)
def test_crops_grids_and_repairs_keep_the_promise_of_a_run(begun, what):
    """A crop took 1,093 MiB where 641 were planned: who has planned for the run would lose it to the crop beside it."""
    import pipeline

    planned = pipeline.plan(pipeline.load_config(begun)).projected_mem_bytes
    peak = peak_of_command(*COMMANDS[what](begun))
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
kept = [bytearray(8000) for _ in range(20_000)][::100]
freed = rss().rss
trim_heap()
print((freed - before) // 2**20, (rss().rss - before) // 2**20)
"""


def test_what_passes_leave_free_in_the_heap_is_given_back():
    """After days a new stage, or the export, would need it beside all that the plan counts."""
    done = subprocess.run(
        [sys.executable, "-c", TRIMMED], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    freed, trimmed = map(int, done.stdout.split())
    assert freed > 100 and trimmed < 40, done.stdout


def test_it_is_given_back_before_every_stage_and_the_export(tmp_path, monkeypatch):
    """The plan of these phases stands on it."""
    import pipeline
    from pipeline.render import preparation

    config = write_run(tmp_path, (128, 96), (64, 64), optimizer={"max_iterations": 1}, initial_size=64)
    trims: list[str] = []
    monkeypatch.setattr(preparation, "trim_heap", lambda: trims.append("stage"))
    monkeypatch.setattr(import_module("pipeline.commands.run"), "trim_heap", lambda: trims.append("export"))
    pipeline.run(pipeline.load_config(config))
    assert trims == ["stage", "stage", "export"]


# So large that the tile is most of the memory, whatever kernels a processor has and keeps (docs/log.md).
LARGE_TILE = {"compute": {"tile_px": 1536}, "store": {"chunk_px": 64}}
SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
# all that a run imports: the limit is for what it computes
import pipeline.commands.preview.crop, pipeline.render.tile_tasks, pipeline.cli.reports
from pipeline.__main__ import main

status = Path("/proc/self/status").read_text()
now = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (now + int(sys.argv[2]) * 2**20, resource.RLIM_INFINITY))
sys.argv = ["pipeline", "run", "--config", sys.argv[1], "--log-format", "plain"]
main()
"""


def run_short_of_memory(config: Path, mib: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, config, str(mib)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc and RLIMIT_DATA")
def test_memory_that_is_not_there_makes_tiles_smaller_or_stops_and_loses_nothing(tmp_path):
    """Another program may take what the plan counted on; the run goes on with smaller tiles, and a resume with them."""
    import pipeline

    config = write_run(
        tmp_path, (1536, 1536), (512, 400), optimizer={"max_iterations": 1}, initial_size=1536, **LARGE_TILE
    )
    stopped = run_short_of_memory(config, 200)  # not even for the smallest
    assert stopped.returncode == 3, stopped.stderr
    assert "has no memory for tile" in stopped.stderr and "Traceback" not in stopped.stderr
    assert not (tmp_path / "run").exists()  # nothing was prepared
    smaller = run_short_of_memory(config, 900)
    assert smaller.returncode == 0, smaller.stderr
    told = [line for line in smaller.stderr.splitlines() if "resuming with tiles of" in line]
    assert len(told) == 1, smaller.stderr
    journal = (tmp_path / "run" / "journal.jsonl").read_text()
    assert journal.count('"smaller_tile"') == 1  # a resume takes the same tiles: the bits depend on them
    assert pipeline.status(tmp_path / "run")["state"] == "done"


class Card:
    """A device whose memory another program takes in the second stage, but for small tiles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int = -1):
        import torch

        from pipeline.render import tile_tasks

        self.stop, self.tiles = threading.Event(), 0
        self._full, self._stop_at, computing = False, stop_at, tile_tasks._computing

        @contextmanager
        def crowded(spec: Any) -> Iterator[None]:
            with computing(spec):
                if self._full and spec.tile.inner.width > 32:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                yield

        monkeypatch.setattr(tile_tasks, "_computing", crowded)

    def __call__(self, event: Any) -> None:
        """The sink of a run on it."""
        if isinstance(event, IterationDone) and event.stage == 1:
            self._full = True
            if event.iteration == self._stop_at:
                self.stop.set()
        elif isinstance(event, WorkDone) and event.what == "gradient pass":
            self.tiles = event.total


def test_a_resume_takes_the_smaller_tiles_too(tmp_path, monkeypatch):
    """With the plan's tiles, on a device that is free again, the last bits of the picture would be others."""
    import pipeline

    config = write_run(tmp_path, optimizer={"max_iterations": 3})
    with monkeypatch.context() as patch:
        unbroken = Card(patch)
        pipeline.run(pipeline.load_config(config), sink=unbroken)
    assert unbroken.tiles == 6  # of 32 px; of 64 px they would be two
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
