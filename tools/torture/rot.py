"""Damage small runs one file at a time, in every state that a run stops in, and check that all damage is detected.

The tool runs three stages per codec and keeps copies of the run directory at several moments. Each trial restores a
copy and changes one file: first it flips single bits until `--flips` of them have hit relevant bytes; then, `--others`
times, it deletes, truncates, swaps, reverts or adds a file. `verify` must detect the change. A resume must refuse, or
must not depend on the file: in a quarter of the trials it continues to the end, and the output image must be that of an
undamaged run. An eighth of the trials is repaired, and must end with the same bytes.

    python -m tools.torture.rot --flips 1000 --others 500 --jobs 2
"""

from __future__ import annotations

import itertools
import json
import multiprocessing as mp
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.support.rot import FINISHED, KINDS, STATES, VARIANTS, Trial, make_base, try_fault

REPAIRED, COMPLETED = 1 / 8, 1 / 4
OTHERS = tuple(kind for kind in KINDS if kind != "flip")
COLUMNS: dict[str, Callable[[Trial], object]] = {
    "damaged": lambda trial: True,
    "detected by verify": lambda trial: trial.detected,
    "unused bytes": lambda trial: trial.fault.detected is False and not trial.detected,
    "an earlier position": lambda trial: trial.fault.detected is None and not trial.detected,
    "refused by run": lambda trial: trial.run_code in (3, 6),
    "completed": lambda trial: trial.ended,
    "repaired": lambda trial: trial.mended,
    "undetected or wrong": lambda trial: trial.problems,
}


def trials_of(job: int, jobs: int, flips: int, others: int, seconds: float) -> list[Trial]:
    """The trials of one process: `flips` and `others` that hit relevant bytes, or as many as time allows."""
    states, done, started = (*STATES, FINISHED), [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        bases = []
        for variant in VARIANTS:
            (folder := Path(name) / variant).mkdir()
            bases.append(make_base(folder, variant))
        for kinds, target in ((("flip",), flips), (OTHERS, others)):
            counted, share = 0, flips / (flips + others) if kinds == ("flip",) else 1.0
            for number in itertools.count():
                if counted >= target or time.monotonic() - started > share * seconds:
                    break
                base, state = bases[number % len(bases)], states[number // len(bases) % len(states)]
                seed = number * jobs + job
                dice = random.Random(f"more {seed}").random()
                trial = try_fault(base, state, seed, mend=dice < REPAIRED, to_end=dice > 1 - COMPLETED, kinds=kinds)
                if trial is None:
                    continue
                done.append(trial)
                counted += trial.fault.detected is not False
                if trial.problems:
                    print(f"{trial.variant}, {state}, seed {seed}: {trial.fault}: {trial.problems}", flush=True)
    return done


def show(console: Console, trials: list[Trial], seconds: float) -> None:
    table = Table(title=f"{len(trials)} damages in {seconds / 60:.0f} min")
    for column in ("", *COLUMNS):
        table.add_column(column, justify="right")
    for title, chosen in groups(trials):
        table.add_row(title, *(str(sum(bool(counts(trial)) for trial in chosen)) for counts in COLUMNS.values()))
    console.print(table)


def groups(trials: list[Trial]) -> Iterator[tuple[str, list[Trial]]]:
    """Groups by kind of damage, then flips by the kind of file, then all."""
    for kind in KINDS:
        yield kind, [trial for trial in trials if trial.fault.kind == kind]
    for what in sorted({trial.fault.what for trial in trials if trial.fault.kind == "flip"}):
        yield f"flip, {what}", [trial for trial in trials if (trial.fault.kind, trial.fault.what) == ("flip", what)]
    yield "all", trials


@click.command()
@click.option("--flips", default=1000, show_default=True, help="Flipped bits in relevant bytes, all jobs together.")
@click.option("--others", default=500, show_default=True, help="Other damages of relevant files, all jobs together.")
@click.option("--jobs", default=2, show_default=True, help="Number of processes.")
@click.option("--minutes", default=600.0, show_default=True, help="Time limit; results so far are reported.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all results to this file.")
def main(flips: int, others: int, jobs: int, minutes: float, json_path: Path | None) -> None:
    """Damage runs; exit with 1 if damage is undetected or reaches an output image."""
    started = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"  # per job
    share = (jobs, -(-flips // jobs), -(-others // jobs), 60 * minutes)
    with ProcessPoolExecutor(jobs, mp_context=mp.get_context("spawn")) as pool:
        futures = [pool.submit(trials_of, job, *share) for job in range(jobs)]
        trials = [trial for future in futures for trial in future.result()]
    show(Console(width=140), trials, time.monotonic() - started)
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(trial) for trial in trials], indent=2), encoding="utf-8")
    sys.exit(any(trial.problems for trial in trials))


if __name__ == "__main__":
    main()
