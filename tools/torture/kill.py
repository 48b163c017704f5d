"""Kill small runs at random moments of every phase, several times each, and check that they end with the same bytes.

Each run is killed up to six times, in randomly chosen phases. Then it must end with the bytes of an unbroken run. A
kill may cost at most one iteration of work, counted in gradient tiles.

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

MAX_KILLS_PER_RUN = 6


def kill_runs(
    nursery: Nursery, folder: Path, unbroken: dict[str, Unbroken], kills: int, seed: int
) -> list[tuple[str, Score]]:
    """Kill runs of all variants in turn until `kills` is reached."""
    rng, done = random.Random(seed), []
    for number, variant in enumerate(itertools.cycle(VARIANTS)):
        if sum(len(score.kills) for _, score in done) >= kills:
            return done
        config = write_variant(folder / str(number), variant)
        score = kill_at_random(nursery, config, unbroken[variant], rng.randint(1, MAX_KILLS_PER_RUN), rng)
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
    console.print(
        f"{lost} gradient tiles recomputed, {per_kill:.2f} per kill (at most 4 are allowed, 8 of a stage in memory)"
    )
    console.print(f"{sum(not score.problems for _, score in done)} of {len(done)} runs ended with the expected bytes")


@click.command()
@click.option("--kills", default=1000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Concurrent runs.")
def main(kills: int, seed: int, jobs: int) -> None:
    """Kill at random moments; exit with 1 if a run does not recover."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(tempfile.mkdtemp(dir=name)) for _ in range(jobs)]
        nurseries = [Nursery(folder) for folder in folders]
        unbroken = {variant: Unbroken.of(nurseries[0], folders[0] / variant, variant) for variant in VARIANTS}

        def share(job: int) -> list[tuple[str, Score]]:
            return kill_runs(nurseries[job], folders[job], unbroken, -(-kills // jobs), seed + job)

        with ThreadPoolExecutor(jobs) as pool:
            done = [run for part in pool.map(share, range(jobs)) for run in part]
        for nursery in nurseries:
            nursery.close()
    show(Console(), done, unbroken, time.monotonic() - started)
    sys.exit(any(score.problems for _, score in done))


if __name__ == "__main__":
    main()
