"""Runs on a cluster of processes: whatever dies, the same command ends with the same bytes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline
from tests.e2e.test_apply_workers import assert_same, write_apply
from tests.support.cluster import Cluster, wait_for
from tests.support.e2e import Child, Nursery, canvases, journal, results, write_run
from tests.support.networks import write_network

KEYS: dict[str, Any] = {"initial_size": 55, "output": "out.tif"}


def write(folder: Path, iterations: int = 6, **compute: Any) -> Path:
    keys = {**KEYS, "optimizer": {"max_iterations": iterations}}
    return write_run(folder, (110, 80), (60, 70), **keys, compute={"threads": 1, "tile_px": 32, **compute})


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def start(nursery: Nursery, config: Path, command: str = "run") -> Child:
    return nursery.start(command, "-c", config, "--log-format", "json")


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


def until_pass(child: Child, number: int) -> None:
    """Wait for `apply` to begin a pass."""
    what = f"pass {number} of 8"
    assert child.wait_until(lambda events: any(event.get("what") == what for event in events)), child.err


def test_apply_ends_with_the_same_bytes_whatever_dies(tmp_path, nursery, cluster):
    """A picture of 30,000 px would begin again whenever a spot machine is taken away, or have other bytes."""
    pipeline.apply(pipeline.load_apply_config(write_apply(tmp_path / "alone", "network", tile_px=32)))
    config = write_apply(tmp_path / "out", "network", tile_px=32, scheduler=str(cluster.folder))
    cluster.start_scheduler()
    cluster.start_worker()
    cluster.start_worker()
    planned = nursery.run("plan", "-c", config)
    assert "cluster  tls://" in planned.err

    child = start(nursery, config, "apply")
    until_pass(child, 1)
    cluster.kill_process()  # replaced
    until_pass(child, 3)
    cluster.kill_worker()
    cluster.start_worker()
    until_pass(child, 4)
    child.kill()  # its tasks may still run

    child = start(nursery, config, "apply")
    until_pass(child, 5)
    cluster.kill_scheduler()
    assert child.wait() == 75, child.err
    assert "was lost" in child.err and "Traceback" not in child.err
    cluster.start_scheduler()

    child = start(nursery, config, "apply")
    until_pass(child, 8)
    child.kill()
    cluster.close()
    cluster.start_scheduler()
    cluster.start_worker()
    assert start(nursery, config, "apply").wait() == 0
    assert_same(tmp_path / "out", tmp_path / "alone")


def test_apply_refuses_a_worker_with_another_network_or_folder(tmp_path, nursery, cluster):
    """A machine with another file under the network's name would paint its tiles in another style."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs a mount namespace: run as root")
    config = write_apply(tmp_path / "out", "network", scheduler=str(cluster.folder))
    write_network(tmp_path / "other.safetensors", seed=1)
    cluster.start_scheduler()
    for mounted, over, sentence in (
        (tmp_path / "other.safetensors", tmp_path / "out" / "net.safetensors", "has another file"),
        (tmp_path / "other", tmp_path / "out", "work_dir"),
    ):
        (tmp_path / "other").mkdir(exist_ok=True)
        mount = f'mount --bind {mounted} {over} && exec "$0" "$@"'
        cluster.start_worker("unshare", "-m", "sh", "-c", mount)
        child = start(nursery, config, "apply")
        assert child.wait() == 3, child.err
        assert sentence in child.err and "Traceback" not in child.err
        cluster.kill_worker()
        wait_for(lambda: cluster.joined() == 0)
    cluster.start_worker()
    assert start(nursery, config, "apply").wait() == 0
