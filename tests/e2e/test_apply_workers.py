"""`pipeline apply` in worker processes: the same bytes as in one, even when workers die."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline
from pipeline.commands.apply import apply_plan
from pipeline.core.errors import ConfigError, Stopped
from pipeline.core.events import Event, Note, WorkDone
from tests.e2e.test_memory import peaks_of
from tests.e2e.test_workers import workers_of
from tests.support.e2e import canvases, journal, results, write_picture
from tests.support.networks import write_network, write_wct

KINDS: dict[str, dict[str, Any]] = {
    "network": {"networks": "net.safetensors"},
    "wct": {"networks": "wct.safetensors", "style": "style.png", "wct": {"levels": [3, 1]}},
}


def write_apply(folder: Path, kind: str, work_dir: str = "run", output: str = "out.tif", **compute: Any) -> Path:
    """The config of a picture of 6 tiles. One thread, because kernels round differently with more."""
    folder.mkdir(exist_ok=True)
    write_network(folder / "net.safetensors")
    write_wct(folder / "wct.safetensors")
    write_picture(folder / "content.png", 150, 90, seed=1)
    write_picture(folder / "style.png", 60, 50, seed=2)
    keys = {"content": "content.png", "output": output, "work_dir": work_dir, "store": {"chunk_px": 32}, **KINDS[kind]}
    keys["compute"] = {"device": "cpu", "threads": 1, "tile_px": 64, **compute}
    path = folder / "apply.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def apply(path: Path, **keywords: Any) -> Path:
    return pipeline.apply(pipeline.load_apply_config(path), **keywords)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the result of each kind in one process."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in KINDS:
        apply(write_apply(folder / kind, kind))
    return folder


def assert_same(folder: Path, alone: Path) -> None:
    assert results(folder / "run") == results(alone / "run")
    assert (folder / "out.tif").read_bytes() == (alone / "out.tif").read_bytes()
    assert canvases(folder / "run") == canvases(alone / "run")


# pairs on two workers: the next test; a network on one: the sweep of kills in tests/faults/test_apply.py
@pytest.mark.parametrize(
    ("kind", "compute"),
    [("network", {"workers": 2}), ("network", {"devices": ["cpu"] * 3}), ("wct", {"workers": 1})],
    ids=str,
)
def test_processes_and_devices_make_the_same_bytes(
    tmp_path: Path, alone: Path, kind: str, compute: dict[str, Any]
) -> None:
    """The picture would depend on the number of processes, or of GPUs."""
    others = workers_of()
    computing: set[int] = set()

    def sink(event: Event) -> None:
        if isinstance(event, WorkDone) and event.what.startswith("pass"):
            computing.update(process.pid for process in workers_of() if process not in others)

    apply(write_apply(tmp_path, kind, **compute), sink=sink)
    assert_same(tmp_path, alone / kind)
    assert len(computing) == compute.get("workers", 3)  # and no process that would only update
    assert workers_of() == others


def test_a_worker_may_die_in_every_pass(tmp_path: Path, alone: Path) -> None:
    """The death of one process would cost a pass over 30,000 px, or change the picture."""
    others, killed, notes = workers_of(), [], []

    def sink(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.message)
        elif isinstance(event, WorkDone) and event.what.startswith("pass") and event.what not in killed:
            ours = [process for process in workers_of() if process not in others]
            for oldest in sorted(ours, key=lambda process: process.create_time())[:1]:
                killed.append(event.what)
                oldest.kill()

    apply(write_apply(tmp_path, "wct", workers=2), sink=sink)
    assert_same(tmp_path, alone / "wct")
    assert len(killed) == 6
    assert len([note for note in notes if "killed" in note]) == 6


def test_another_number_of_processes_resumes(tmp_path: Path, alone: Path) -> None:
    """Begun on a workstation, a picture could not be finished on a machine with more processors."""
    stop = threading.Event()

    def sink(event: Event) -> None:
        if isinstance(event, WorkDone) and event.what == "pass 4 of 8" and event.done == 2:
            stop.set()

    with pytest.raises(Stopped):
        apply(write_apply(tmp_path, "network", workers=1), sink=sink, stop=stop)
    assert 3 <= sum(record["type"] == "pass" for record in journal(tmp_path / "run")) < 8
    apply(write_apply(tmp_path, "network", devices=["cpu", "cpu"]))
    assert_same(tmp_path, alone / "network")


def test_the_memory_of_all_processes_is_what_was_planned(tmp_path: Path) -> None:
    """Processes that each take what was planned for all would fill the machine, and the system would kill them."""
    write_network(tmp_path / "net.safetensors", width=0.5)
    write_picture(tmp_path / "content.png", 300, 250)
    keys = {"networks": "net.safetensors", "content": "content.png", "output": "out.tif", "size": 1100}
    keys |= {"compute": {"tile_px": 512, "device": "cpu", "workers": 2}, "store": {"chunk_px": 256}}
    path = tmp_path / "apply.yaml"
    path.write_text(yaml.safe_dump(keys))
    planned = apply_plan(pipeline.load_apply_config(path)).plan
    peaks = peaks_of("apply", path)
    passes = max(size for what, size in peaks.items() if "pass" in what)
    assert planned.host_bytes["passes"] / 3 < passes < planned.host_bytes["passes"]
    assert max(peaks.values()) < planned.projected_mem_bytes


def test_processes_that_update_are_refused(tmp_path: Path) -> None:
    """compute.workers beside compute.devices would be ignored without a word."""
    with pytest.raises(ConfigError, match=r"compute\.workers: .* apply has none"):
        pipeline.load_apply_config(write_apply(tmp_path, "network", devices=["cpu"] * 2, workers=1))
