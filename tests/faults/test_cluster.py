"""Runs on a cluster of processes: whatever dies, the same command ends with the same bytes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline
from tests.support.cluster import Cluster, wait_for
from tests.support.e2e import Child, Nursery, canvases, journal, results, write_run

KEYS: dict[str, Any] = {"initial_size": 55, "output": "out.tif"}


def write(folder: Path, iterations: int = 6, **compute: Any) -> Path:
    keys = {**KEYS, "optimizer": {"max_iterations": iterations}}
    return write_run(folder, (110, 80), (60, 70), **keys, compute={"threads": 1, "tile_px": 32, **compute})


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def start(nursery: Nursery, config: Path) -> Child:
    return nursery.start("run", "-c", config, "--log-format", "json")


def until(child: Child, what: str, done: int, iteration: int) -> None:
    """Wait for a pass in the second stage to have done some tasks after some iterations."""

    def reached(events: list[dict[str, Any]]) -> bool:
        begun = [number for number, event in enumerate(events) if event["event"] == "StageStarted"]
        rest = events[begun[-1] :] if begun and events[begun[-1]]["stage"] == 1 else []
        finished = events[begun[-1]]["iteration"] if rest else 0
        for event in rest:
            finished += event["event"] == "IterationDone"
            if finished >= iteration and event.get("what") == what and event["done"] >= done:
                return True
        return False

    assert child.wait_until(reached), child.err


def test_whatever_dies_the_same_command_ends_with_the_same_bytes(tmp_path, nursery, cluster):
    """A spot machine, a killed job, a restarted head node: each would cost days of work, or another image."""
    pipeline.run(pipeline.load_config(write(tmp_path / "alone")))
    config = write(tmp_path / "run", scheduler=str(cluster.folder))
    cluster.start_scheduler()
    for _ in range(3):
        cluster.start_worker()

    child = start(nursery, config)
    until(child, "gradient pass", 2, 1)
    cluster.kill_process()  # replaced
    until(child, "update pass", 1, 2)
    cluster.kill_worker()  # and the processes that it started
    cluster.start_worker()  # which joins the run
    until(child, "gradient pass", 1, 3)
    child.kill()  # its tasks may still run

    child = start(nursery, config)
    until(child, "gradient pass", 1, 4)
    cluster.kill_scheduler()
    assert child.wait() == 75, child.err
    assert "was lost" in child.err and "Traceback" not in child.err
    cluster.start_scheduler()  # at another port; the workers return

    child = start(nursery, config)
    until(child, "update pass", 1, 5)
    child.kill()
    cluster.close()
    cluster.start_scheduler()
    cluster.start_worker()
    child = start(nursery, config)
    assert child.wait() == 0, child.err
    assert "left the cluster" not in child.err
    assert results(tmp_path / "run" / "run") == results(tmp_path / "alone" / "run")
    assert canvases(tmp_path / "run" / "run") == canvases(tmp_path / "alone" / "run")
    assert (tmp_path / "run" / "out.tif").read_bytes() == (tmp_path / "alone" / "out.tif").read_bytes()


def test_a_worker_that_sees_another_folder_is_refused(tmp_path, nursery, cluster):
    """A machine that has not mounted the shared folder, or an old copy of it, would compute another image."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs a mount namespace: run as root")
    config = write(tmp_path / "run", iterations=2, scheduler=str(cluster.folder))
    cluster.start_scheduler()
    cluster.start_worker()
    child = start(nursery, config)
    until(child, "gradient pass", 1, 0)
    child.kill()
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    before = {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()}
    mount = f'mount --bind {tmp_path / "old"} {tmp_path / "run"} && exec "$0" "$@"'
    cluster.start_worker("unshare", "-m", "sh", "-c", mount)
    wait_for(lambda: cluster.joined() == 2)
    child = start(nursery, config)
    assert child.wait() == 3, child.err
    assert "work_dir" in child.err and "share" in child.err and "Traceback" not in child.err
    assert {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()} == before
    cluster.kill_worker(1)
    assert start(nursery, config).wait() == 0
    assert journal(tmp_path / "run" / "run")[-1]["type"] == "exported"
