"""Kill workers, schedulers and runs of a cluster at random moments, and check that every run ends with the same bytes.

A scheduler and three workers are processes of their own, on the loopback device, over one folder. What was killed is
started again at once, in a random order, and a run that has lost its scheduler, or was killed, by the same command.

    python -m tools.torture.cluster --kills 200
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from tests.support.cluster import Cluster
from tests.support.e2e import Child, Nursery, canvases, results, write_run

VICTIMS = ("process", "process", "worker", "worker", "scheduler", "run", "run", "all")
WORKERS = 3
# The codes of a run that may be repeated: killed, or without its scheduler.
RESUMABLE = (-9, 75)


def write(folder: Path, **compute: Any) -> Path:
    keys: dict[str, Any] = {"initial_size": 55, "optimizer": {"max_iterations": 10}, "output": "out.tif"}
    return write_run(folder, (110, 80), (60, 70), **keys, compute={"threads": 1, "tile_px": 32, **compute})


def kill(victim: str, cluster: Cluster, child: Child, rng: random.Random) -> None:
    if victim in ("process", "all"):
        cluster.kill_process(rng.randrange(WORKERS))
    if victim in ("worker", "all"):
        for _ in range(WORKERS if victim == "all" else 1):
            cluster.kill_worker(rng.randrange(len(cluster.workers)))
    if victim in ("scheduler", "all"):
        cluster.kill_scheduler()
    if victim in ("run", "all"):
        child.kill()


def restore(cluster: Cluster, rng: random.Random) -> None:
    missing = ["worker"] * (WORKERS - len(cluster.workers)) + ["scheduler"] * (cluster.scheduler is None)
    rng.shuffle(missing)
    for what in missing:
        if what == "worker":
            cluster.start_worker()
        else:
            cluster.start_scheduler()


def run_once(nursery: Nursery, cluster: Cluster, config: Path, kills: int, rng: random.Random) -> list[str]:
    """One run with up to `kills` kills; gives what was killed. Raises AssertionError if it does not recover."""
    killed: list[str] = []
    while True:
        restore(cluster, rng)
        child = nursery.start("run", "-c", config, "--log-format", "json")
        while child.is_alive() and len(killed) < kills:
            # after the next event of the run, or a moment later
            seen, until = len(child.events()), time.monotonic() + rng.uniform(0, 8)
            while child.is_alive() and (time.monotonic() < until or len(child.events()) == seen):
                time.sleep(0.01)
            if child.is_alive():
                killed.append(rng.choice(VICTIMS))
                kill(killed[-1], cluster, child, rng)
                restore(cluster, rng)
        code = child.wait()
        assert "Traceback" not in child.err, child.err
        if code == 0:
            return killed
        assert code in RESUMABLE, (code, child.err)


@click.command()
@click.option("--kills", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, seed: int) -> None:
    """Kill at random moments; exit with 1 if a run does not recover."""
    rng, killed, number = random.Random(seed), Counter[str](), 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nursery, cluster = Nursery(folder), Cluster(folder)
        try:
            alone = write(folder / "alone")
            assert nursery.run("run", "-c", alone).wait() == 0
            while killed.total() < kills:
                number += 1
                config = write(folder / f"run-{number}", scheduler=str(cluster.folder))
                left = kills - killed.total()
                killed.update(run_once(nursery, cluster, config, min(left, rng.randint(1, 8)), rng))
                for same in (results, canvases):
                    assert same(config.parent / "run") == same(alone.parent / "run"), f"run {number} has other bytes"
                assert (config.parent / "out.tif").read_bytes() == (alone.parent / "out.tif").read_bytes()
                shutil.rmtree(config.parent)
                print(f"{number} runs, kills: {dict(killed)}", file=sys.stderr, flush=True)
        finally:
            cluster.close()
            nursery.close()
    minutes = (time.monotonic() - started) / 60
    print(
        f"{killed.total()} kills of {number} runs in {minutes:.0f} min: {dict(killed)}; all ended with the same bytes"
    )


if __name__ == "__main__":
    main()
