"""Cut the power of a small run's disk at many moments, and check that only unsynced work is lost.

The run's folders are on file systems in image files that are shut down at once: unsynced data is lost completely or in
part. After each cut the file system is mounted again. The state must match its checksums, and the output image must be
complete or absent; then the same command must end with the bytes of an unbroken run. Cuts are spread evenly over all
calls that change files, in all modes of ext4, one or several per run, with the output image on the same disk or on
another. Needs Linux on x86-64, root and loop devices.

With `--durability process` a run may lose its state, but it must refuse a damaged state and write no wrong image.

    python -m tools.torture.power --points 400 --jobs 2
"""

from __future__ import annotations

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

from tests.support.e2e import Nursery
from tests.support.power import MODES, Plan, missing, suffer
from tests.support.torture import PHASES, VARIANTS, Score, Unbroken

DAMAGED = 6


def plans(points: int, durability: str, seed: int, calls: dict[str, int]) -> list[Plan]:
    """Plans with `points` cuts in total; the first cuts are spread evenly over the calls."""
    rng = random.Random(seed)
    result: list[Plan] = []
    while (left := points - sum(len(plan.cuts) for plan in result)) > 0:
        variant = list(VARIANTS)[len(result) % len(VARIANTS)]
        total = calls[variant]
        share = (len(result) * 0.618034) % 1.0  # the golden ratio spreads any number of plans evenly
        first = 1 + int(share * total)
        more = (rng.randrange(1, total + 1 - first) for _ in range(rng.choice((0, 0, 1, 2))) if first < total)
        cuts = (first, *more)[:left]
        mode = rng.choice(MODES)
        result.append(Plan(variant, mode, cuts, rng.random() < 0.5, rng.random() < 0.7, durability, seed + len(result)))
    return result


def outcome(plan: Plan, score: Score) -> str:
    """The outcome of a run; "failed" is an error of the program."""
    if not score.problems:
        return "resumed"
    if plan.mode == "none" and score.code == DAMAGED and "a second name" in score.problems[-1]:
        return "refused"  # fsck may give one file two names, and writing to such a file would be wrong
    if plan.durability == "process":
        if score.code == DAMAGED:
            return "refused"
        if score.code == 0 and "picture" not in score.problems:
            return "resumed, an older stage's canvas lost"
    return "failed"


def show(console: Console, done: list[tuple[Plan, Score]], seconds: float) -> None:
    """Print the cuts by phase and by mode, and every failure."""
    outcomes = sorted({outcome(plan, score) for plan, score in done})
    cuts = sum(len(score.kills) for _, score in done)
    table = Table(title=f"{cuts} cuts of {len(done)} runs in {seconds / 60:.0f} min")
    for column in ("", "cuts", *(f"runs {name}" for name in outcomes)):
        table.add_column(column, justify="right")
    for phase in PHASES:
        rows = [(plan, score) for plan, score in done if phase in score.kills]
        counts = Counter(outcome(plan, score) for plan, score in rows)
        table.add_row(phase, str(sum(score.kills.count(phase) for _, score in rows)), *_counts(counts, outcomes))
    for mode in MODES:
        rows = [(plan, score) for plan, score in done if plan.mode == mode]
        counts = Counter(outcome(plan, score) for plan, score in rows)
        table.add_row(f"ext4, {mode}", str(sum(len(score.kills) for _, score in rows)), *_counts(counts, outcomes))
    console.print(table)
    for plan, score in done:
        if outcome(plan, score) == "failed":
            print(plan, score)


def _counts(counts: Counter[str], outcomes: list[str]) -> list[str]:
    return [str(counts[name]) for name in outcomes]


@click.command()
@click.option("--points", default=200, show_default=True, help="Number of cuts.")
@click.option("--durability", type=click.Choice(["power", "process"]), default="power", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Concurrent runs.")
def main(points: int, durability: str, seed: int, jobs: int) -> None:
    """Cut the power; exit with 1 if a run does not end correctly."""
    if (reason := missing()) is not None:
        raise click.ClickException(f"cannot simulate power cuts on this machine: {reason}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nurseries = [Nursery(Path(tempfile.mkdtemp(dir=name))) for _ in range(jobs)]
        unbroken = {variant: Unbroken.of(nurseries[0], folder / variant, variant) for variant in VARIANTS}
        todo = plans(points, durability, seed, {variant: len(run.calls) for variant, run in unbroken.items()})

        def share(job: int) -> list[tuple[Plan, Score]]:
            results = []
            for plan in todo[job::jobs]:
                place = folder / f"run_{plan.seed}"
                results.append((plan, suffer(nurseries[job], place, plan, unbroken[plan.variant])))
                shutil.rmtree(place)
            return results

        with ThreadPoolExecutor(jobs) as pool:
            done = [run for part in pool.map(share, range(jobs)) for run in part]
        for nursery in nurseries:
            nursery.close()
    show(Console(), done, time.monotonic() - started)
    sys.exit(any(outcome(plan, score) == "failed" for plan, score in done))


if __name__ == "__main__":
    main()
