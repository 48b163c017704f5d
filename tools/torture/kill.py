"""Kill small runs at random moments of every phase, several times each, and see that they always end the same.

Each run is killed up to six times, at moments of phases taken at random; then it has to end with the bytes of an
unbroken one. Never more than one iteration of work may be lost per kill, counted in gradient tiles.

    python -m tools.torture.kill --kills 1000 --jobs 2
"""

from __future__ import annotations

import itertools
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.support.e2e import Nursery, gradient_tiles
from tests.support.torture import PHASES, VARIANTS, Score, Unbroken, kill_at_random, write_variant

MOST_PER_RUN = 6


def kill_runs(
    nursery: Nursery, folder: Path, unbroken: dict[str, Unbroken], kills: int, seed: int
) -> list[tuple[str, Score]]:
    """Runs of all variants in turn until `kills` are done."""
    rng, done = random.Random(seed), []
    for number, variant in enumerate(itertools.cycle(VARIANTS)):
        if sum(len(score.kills) for _, score in done) >= kills:
            return done
        config = write_variant(folder / str(number), variant)
        score = kill_at_random(nursery, config, unbroken[variant], rng.randint(1, MOST_PER_RUN), rng)
        done.append((variant, score))
        if score.problems:
            print(f"{config.parent}: {score}", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(config.parent)
    raise AssertionError("a cycle ended")


def show(console: Console, done: list[tuple[str, Score]], unbroken: dict[str, Unbroken], seconds: float) -> None:
    kills = Counter(phase for _, score in done for phase in score.kills)
    lost = sum(score.tiles - gradient_tiles(unbroken[variant].events) for variant, score in done)
    table = Table(title=f"{kills.total()} kills of {len(done)} runs in {seconds / 60:.0f} min")
    for column in ("killed in", "kills"):
        table.add_column(column, justify="right")
    for phase in PHASES:
        table.add_row(phase, str(kills[phase]))
    console.print(table)
    per_kill = lost / max(1, kills.total())
    console.print(f"{lost} gradient tiles were computed again, {per_kill:.2f} per kill, of at most 4")
    console.print(f"{sum(not score.problems for _, score in done)} of {len(done)} runs ended as they must")


@click.command()
@click.option("--kills", default=1000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Runs at the same time.")
def main(kills: int, seed: int, jobs: int) -> None:
    """Kill at random moments; exit 1 if a run did not recover."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(tempfile.mkdtemp(dir=name)) for _ in range(jobs)]
        nurseries = [Nursery(folder) for folder in folders]
        unbroken = {variant: Unbroken.of(nurseries[0], folders[0] / variant, variant) for variant in VARIANTS}

        def share(job: int) -> list[tuple[str, Score]]:
            return kill_runs(nurseries[job], folders[job], unbroken, -(-kills // jobs), seed + job)

        with ThreadPoolExecutor(jobs) as pool:
            done = [one for part in pool.map(share, range(jobs)) for one in part]
        for nursery in nurseries:
            nursery.close()
    show(Console(), done, unbroken, time.monotonic() - started)
    sys.exit(any(score.problems for _, score in done))


if __name__ == "__main__":
    main()
