"""Cut the power of a small run's disk at many moments, and see that nothing but unsynced work is lost.

The run's folders are on file systems in image files, which stop at once when told to: what was not synced is gone, or,
on a leaky disk, there in part. After each cut the file system is mounted again; the state has to be whole by its own
checksums, a picture whole or not there; then the same command has to end with the bytes of an unbroken run. Cuts are
spread evenly over all calls by which the run changes files, in all modes of ext4, one or several per run, with the
picture on the store's disk or on another. Needs Linux on x86-64, root and loop devices.

With --durability process nothing is promised, but that a damaged state is refused, and no wrong picture made.

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
    """Runs with `points` cuts together, the first of each at evenly spread calls."""
    rng = random.Random(seed)
    made: list[Plan] = []
    while (left := points - sum(len(plan.cuts) for plan in made)) > 0:
        variant = list(VARIANTS)[len(made) % len(VARIANTS)]
        total = calls[variant]
        share = (len(made) * 0.618034) % 1.0  # the golden ratio: as even as can be, however many follow
        first = 1 + int(share * total)
        more = (rng.randrange(1, total + 1 - first) for _ in range(rng.choice((0, 0, 1, 2))) if first < total)
        cuts = (first, *more)[:left]
        mode = rng.choice(MODES)
        made.append(Plan(variant, mode, cuts, rng.random() < 0.5, rng.random() < 0.7, durability, seed + len(made)))
    return made


def outcome(plan: Plan, score: Score) -> str:
    """What became of a run; `failed` is what must not be."""
    if not score.problems:
        return "went on"
    if plan.mode == "none" and score.code == DAMAGED and "a second name" in score.problems[-1]:
        return "refused"  # two names for one file are what fsck makes of lost names; to write to it would be wrong
    if plan.durability == "process":
        if score.code == DAMAGED:
            return "refused"
        if score.code == 0 and "picture" not in score.problems:
            return "went on, an older stage's canvas lost"
    return "failed"


def show(console: Console, done: list[tuple[Plan, Score]], seconds: float) -> None:
    """Tables of the cuts by phase and by mode, and every failure."""
    outcomes = sorted({outcome(plan, score) for plan, score in done})
    cuts = sum(len(score.kills) for _, score in done)
    table = Table(title=f"{cuts} cuts of {len(done)} runs in {seconds / 60:.0f} min")
    for column in ("", "cuts", *(f"runs that {name}" for name in outcomes)):
        table.add_column(column, justify="right")
    for phase in PHASES:
        rows = [(plan, score) for plan, score in done if phase in score.kills]
        found = Counter(outcome(plan, score) for plan, score in rows)
        table.add_row(phase, str(sum(score.kills.count(phase) for _, score in rows)), *_counts(found, outcomes))
    for mode in MODES:
        rows = [(plan, score) for plan, score in done if plan.mode == mode]
        found = Counter(outcome(plan, score) for plan, score in rows)
        table.add_row(f"ext4, {mode}", str(sum(len(score.kills) for _, score in rows)), *_counts(found, outcomes))
    console.print(table)
    for plan, score in done:
        if outcome(plan, score) == "failed":
            print(plan, score)


def _counts(found: Counter[str], outcomes: list[str]) -> list[str]:
    return [str(found[name]) for name in outcomes]


@click.command()
@click.option("--points", default=200, show_default=True, help="Cuts.")
@click.option("--durability", type=click.Choice(["power", "process"]), default="power", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Runs at the same time.")
def main(points: int, durability: str, seed: int, jobs: int) -> None:
    """Cut the power; exit 1 if a run did not end as it must."""
    if (reason := missing()) is not None:
        raise click.ClickException(f"cannot cut the power of a disk here: {reason}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nurseries = [Nursery(Path(tempfile.mkdtemp(dir=name))) for _ in range(jobs)]
        unbroken = {variant: Unbroken.of(nurseries[0], folder / variant, variant) for variant in VARIANTS}
        todo = plans(points, durability, seed, {variant: len(one.calls) for variant, one in unbroken.items()})

        def share(job: int) -> list[tuple[Plan, Score]]:
            done = []
            for plan in todo[job::jobs]:
                place = folder / f"run_{plan.seed}"
                done.append((plan, suffer(nurseries[job], place, plan, unbroken[plan.variant])))
                shutil.rmtree(place)
            return done

        with ThreadPoolExecutor(jobs) as pool:
            done = [one for part in pool.map(share, range(jobs)) for one in part]
        for nursery in nurseries:
            nursery.close()
    show(Console(), done, time.monotonic() - started)
    sys.exit(any(outcome(plan, score) == "failed" for plan, score in done))


if __name__ == "__main__":
    main()
