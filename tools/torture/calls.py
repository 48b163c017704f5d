"""Kill a small run at every system call that changes a file, and check that it resumes with the same bytes.

The tool lists the calls of an unbroken run. For each call it kills a new run (SIGKILL) just before the call, and writes
also in their middle. It starts the run again and compares its files with those of the unbroken run. `--twice` also
kills the second start, at a random call. Calls are identified by name, file and occurrence, independently of the thread
that makes them. Later variants are killed only at calls that no earlier variant has; `--besides` names variants whose
calls were tested by another process. Needs Linux on x86-64.

    python -m tools.torture.calls --variant tiff --variant deepzoom --jobs 2
"""

from __future__ import annotations

import itertools
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.support.e2e import Nursery
from tests.support.torture import VARIANTS, Score, Target, Unbroken, kill_at, targets_of, write_variant


@dataclass(frozen=True)
class Torture:
    """One variant of the run and the calls of its unbroken run."""

    folder: Path
    variant: str
    twice: bool
    unbroken: Unbroken

    def at(self, nursery: Nursery, target: Target, seed: int) -> Score:
        """Kill at the target and resume; a run with problems is kept for inspection."""
        config = write_variant(self.folder / f"{self.variant}_{seed}", self.variant)
        again = random.Random(seed).randrange(1, len(self.unbroken.calls)) if self.twice else 0
        score = kill_at(nursery, config, target, self.unbroken, again)
        if score.problems:
            print(f"{config.parent}: {target}: {'; '.join(score.problems)}", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(config.parent)
        return score


def run_all(torture: Torture, targets: list[Target], nurseries: list[Nursery]) -> Iterator[tuple[Target, Score]]:
    numbered = list(enumerate(targets))

    def share(job: int) -> list[tuple[Target, Score]]:
        return [(target, torture.at(nurseries[job], target, seed)) for seed, target in numbered[job :: len(nurseries)]]

    with ThreadPoolExecutor(len(nurseries)) as pool:
        yield from itertools.chain.from_iterable(pool.map(share, range(len(nurseries))))


def show(console: Console, variant: str, scores: list[tuple[Target, Score]], seconds: float) -> bool:
    """Print a table of the calls; returns whether every run recovered."""
    table = Table(title=f"{variant}: {len(scores)} calls in {seconds / 60:.0f} min")
    for column in ("system call", "killed at", "recovered", "not reached"):
        table.add_column(column, justify="right")
    names = dict.fromkeys(target.call.name for target, _ in scores)
    for name in (*names, "all"):
        of_name = [score for target, score in scores if name in (target.call.name, "all")]
        killed = [score for score in of_name if score.kills]
        recovered = sum(not score.problems for score in killed)
        table.add_row(name, str(len(killed)), str(recovered), str(len(of_name) - len(killed)))
    console.print(table)
    for target, score in scores:
        if score.problems:
            print(f"{target}: {'; '.join(score.problems)}")
        elif not score.kills:
            print(f"{target}: not reached")
    return not any(score.problems for _, score in scores)


@click.command()
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)), default=list(VARIANTS))
@click.option(
    "--besides", "others", multiple=True, type=click.Choice(list(VARIANTS)), help="Skip this variant's calls."
)
@click.option("--jobs", default=2, show_default=True, help="Concurrent runs.")
@click.option("--every", default=1, show_default=True, help="Kill only at every N-th call.")
@click.option("--twice", is_flag=True, help="Also kill the second start.")
def main(variants: tuple[str, ...], others: tuple[str, ...], jobs: int, every: int, twice: bool) -> None:
    """Kill at every file operation; exit with 1 if a run does not recover."""
    all_recovered, known = True, set[Target]()
    with tempfile.TemporaryDirectory() as name:
        nurseries = [Nursery(Path(tempfile.mkdtemp(dir=name))) for _ in range(jobs)]
        for variant in others:
            known |= set(targets_of(Unbroken.of(nurseries[0], Path(name) / f"{variant}_besides", variant).calls))
        for variant in variants:
            started = time.monotonic()
            unbroken = Unbroken.of(nurseries[0], Path(name) / f"{variant}_unbroken", variant)
            torture = Torture(Path(name), variant, twice, unbroken)
            targets = [target for target in targets_of(unbroken.calls) if target not in known]
            scores = list(run_all(torture, targets[::every], nurseries))
            known |= {target for target, score in scores if score.kills}
            all_recovered &= show(Console(), variant, scores, time.monotonic() - started)
        for nursery in nurseries:
            nursery.close()
    sys.exit(not all_recovered)


if __name__ == "__main__":
    main()
