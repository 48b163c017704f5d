"""Process-wide settings: a program that calls the library keeps its own, and all commands set up the device alike."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch

import pipeline
from pipeline.core.events import StageDone
from pipeline.network import cache, vgg
from pipeline.network.weights import NetworkSpec, find_weights
from pipeline.plan.device import Device
from pipeline.render import tile_tasks
from pipeline.rundir.preflight import plan_on
from pipeline.rundir.process_settings import process_settings
from tests.support.e2e import TIMEOUT_S, run_until, write_run

# Prints, as JSON, the settings of a process before and after the code in the middle.
SETTINGS = """
import json, logging, os, signal, sys
import dask, numpy, pyvips, torch, zarr

def settings():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    readable = []
    for name in ("a.v", "a.csv"):
        try:
            pyvips.Image.new_from_file(os.path.join(sys.argv[1], name))
            readable.append(name)
        except pyvips.Error:
            pass
    return {
        "vips cache": pyvips.cache_get_max(),
        "vips threads": pyvips.concurrency_get(),
        "readable": readable,
        "zarr": json.dumps(zarr.config.config, default=str, sort_keys=True),
        "dask": json.dumps(dask.config.config, default=str, sort_keys=True),
        "torch": [torch.get_num_threads(), cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic],
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "numpy": json.dumps(numpy.geterr()),
        "logging": [logging.root.level, len(logging.root.handlers), logging.getLogger("distributed").level],
    }

pyvips.cache_set_max(77)
pyvips.concurrency_set(7)
torch.set_num_threads(2)
zarr.config.set({"async.concurrency": 9})
before = settings()
%s
after = settings()
print(json.dumps({key: [before[key], after[key]] for key in before if before[key] != after[key]}))
"""


@pytest.mark.parametrize(
    "code",
    [
        "import pipeline, pipeline.cli.app, pipeline.render.preparation, pipeline.render.iteration",
        "import pipeline; pipeline.run(pipeline.load_config(sys.argv[1] + '/config.yaml'))",
        "import pipeline; pipeline.preview(sys.argv[1] + '/config.yaml')",
        "import pipeline; pipeline.plan(pipeline.load_config(sys.argv[1] + '/config.yaml'))",
    ],
    ids=["import", "run", "preview", "plan"],
)
def test_the_process_is_left_as_it_was(tmp_path, code):
    """Importing or calling this package must not change the settings of a notebook."""
    import pyvips

    write_run(tmp_path, optimizer={"max_iterations": 1}, compute={"device": "cpu", "tile_px": 64, "threads": 1})
    pyvips.Image.black(8, 8).write_to_file(str(tmp_path / "a.v"))
    (tmp_path / "a.csv").write_text("1,2\n3,4\n")
    done = subprocess.run(
        [sys.executable, "-c", SETTINGS % code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


def test_settings_are_put_back_by_the_last_call(tmp_path):
    """Of two renders on two threads, the first to end must not restore the settings under the other."""
    import pyvips
    import zarr

    before = pyvips.cache_get_max(), zarr.config.get("async.concurrency")
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with process_settings():
            entered.set()
            leave.wait(TIMEOUT_S)

    with process_settings():
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(TIMEOUT_S)
    inside = pyvips.cache_get_max(), zarr.config.get("async.concurrency")
    leave.set()
    thread.join()
    assert inside == (0, 1)
    assert (pyvips.cache_get_max(), zarr.config.get("async.concurrency")) == before


# --- networks ---


def test_one_network_at_a_time_is_in_memory(narrow_weights):
    """A preview over paddings and poolings kept a VGG-19 for each: 431 MiB where 104 were planned."""
    spec = NetworkSpec(find_weights("vgg19", narrow_weights, 0), "zeros", "max", "float32", "cpu")
    first = weakref.ref(cache.get_network(spec))
    second = weakref.ref(cache.get_network(replace(spec, pooling="average")))
    gc.collect()
    assert first() is None and second() is not None
    cache.release()
    gc.collect()
    assert second() is None


def test_runs_on_several_threads_keep_their_networks(make_config, tmp_path):
    """Two concurrent renders would read their weights again for every tile."""
    networks: list[str] = []
    original = vgg.Network.__init__

    def counted(self: Any, *arguments: Any, **keys: Any) -> None:
        networks.append(keys["pooling"])
        original(self, *arguments, **keys)

    def render(number: int) -> None:
        options = [
            "optimizer.max_iterations=3",
            f"output={tmp_path / f'{number}.png'}",
            f"work_dir={tmp_path / f'{number}'}",
        ]
        options.append(f"network.pooling={('max', 'average')[number]}")
        pipeline.run(pipeline.load_config(tmp_path / "config.yaml", options))

    make_config(initial_size=64, compute={"device": "cpu", "tile_px": 32, "threads": 1}, store={"chunk_px": 32})
    threads = [threading.Thread(target=render, args=(number,)) for number in (0, 1)]
    with pytest.MonkeyPatch.context() as patch, process_settings():
        patch.setattr(vgg.Network, "__init__", counted)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(networks) in (["average", "max"], ["average", "max", "max"], ["average", "average", "max"])
    cache.release()


def test_a_call_leaves_no_network_behind(make_config):
    """A notebook would keep every network that it has ever used in memory."""
    networks: list[weakref.ref[Any]] = []
    original = vgg.Network.__init__

    def counted(self: Any, *arguments: Any, **keys: Any) -> None:
        original(self, *arguments, **keys)
        networks.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgg.Network, "__init__", counted)
        pipeline.run(make_config(initial_size=64, optimizer={"max_iterations": 1}, compute={"device": "cpu"}))
    gc.collect()
    assert networks and all(network() is None for network in networks)


# --- the bound on a GPU's memory ---

GPU_BYTES = 8 * 2**30


@pytest.fixture
def bounds(monkeypatch) -> list[int]:
    """The memory bounds of all tasks of a plan for a GPU; the tasks themselves run on the CPU."""
    gpu_bytes: list[int] = []

    def planned(config: Any, device: Device) -> Any:
        return replace(plan_on(config, device), tile_device_bytes=GPU_BYTES)

    def get_network(spec: NetworkSpec) -> vgg.Network:
        gpu_bytes.append(spec.gpu_bytes)
        return cache.get_network(spec)

    for module in ("run", "preview.crop"):
        monkeypatch.setattr(import_module(f"pipeline.commands.{module}"), "plan_on", planned)
    monkeypatch.setattr(tile_tasks, "get_network", get_network)
    return gpu_bytes


def test_run_and_crop_compute_within_the_same_bound(tmp_path, call, bounds):
    """Without it cuDNN takes workspaces of 132 GiB, and the bits of a crop differ from the run's."""
    config = write_run(tmp_path, (96, 80), optimizer={"max_iterations": 3})
    run_until(config, lambda event: isinstance(event, StageDone))
    assert bounds and set(bounds) == {GPU_BYTES}
    bounds.clear()
    assert call("preview", "-c", config, "--crop", "8,8,40,40").code == 0
    assert bounds and set(bounds) == {GPU_BYTES}


@pytest.mark.parametrize(("workers", "each"), [(0, GPU_BYTES), (1, GPU_BYTES), (4, GPU_BYTES // 4)])
def test_worker_processes_share_what_was_planned(make_config, workers, each):
    """The plan is for all processes together, so that every task gets the bound of its share."""
    from pipeline.core.events import ignore
    from pipeline.executors.threads import ThreadExecutor
    from pipeline.render.context import make_stage, render_context

    config = make_config(compute={"device": "cpu", "workers": workers, "threads": 1}, initial_size=64)
    device = Device("cpu", "CPU", 2**33)
    planned = replace(plan_on(config, device), tile_device_bytes=GPU_BYTES)
    weights = find_weights(config.network.name, config.network.weights, 0)
    with ThreadExecutor(1) as executor:
        tools = render_context(config, planned, device, weights, executor, ignore)
        stage = make_stage(config, planned.stages[0], tools, planned.tile_px)
    assert stage.network.gpu_bytes == each
    assert all(spec.network.gpu_bytes == each for spec in stage.canvas_grams("canvas_0", {}))


def test_every_process_bounds_its_gpu_before_it_builds_a_network(monkeypatch):
    """In a worker process no run sets the bound, so that the task has to."""
    calls: list[tuple[float, str]] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda name: type("P", (), {"total_memory": 80 * 2**30}))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *call: calls.append(call))
    spec = NetworkSpec(find_weights("random", None, 0), "zeros", "max", "float32", "cuda:0", gpu_bytes=GPU_BYTES)
    with pytest.raises(Exception, match=r"(?i)cuda|nvidia"):  # this machine has no GPU
        cache.get_network(spec)
    assert calls == [((GPU_BYTES + 2 * 2**30) / (80 * 2**30), "cuda:0")]
    cache.release()
    assert calls[1:] == [(1.0, "cuda:0")]
