"""Damage small runs one file at a time, in every state that a run stops in, and see that no damage goes unseen.

A run of three stages per codec is left alone, and its folder is kept as it was at moments on the way. Each trial puts
one of these back and changes one file of it: a bit is flipped, until --flips of those have hit something that counts;
then, --others times, a file is deleted, cut off, put in another's place, brought back to what it was before, or added.
`verify` has to find it. A resume has to refuse, or must not need that file: of a quarter of the trials it then goes on
to its end, which must be the picture of a run that was left alone. An eighth is repaired, and has to end with the same
bytes.

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

MENDED, TO_END = 1 / 8, 1 / 4
OTHERS = tuple(kind for kind in KINDS if kind != "flip")
COLUMNS: dict[str, Callable[[Trial], object]] = {
    "damaged": lambda trial: True,
    "found by verify": lambda trial: trial.detected,
    "nobody's bytes": lambda trial: trial.fault.detected is False and not trial.detected,
    "an earlier position": lambda trial: trial.fault.detected is None and not trial.detected,
    "refused by run": lambda trial: trial.run_code in (3, 6),
    "run to its end": lambda trial: trial.ended,
    "mended": lambda trial: trial.mended,
    "undetected or wrong": lambda trial: trial.problems,
}


def trials_of(job: int, jobs: int, flips: int, others: int, seconds: float) -> list[Trial]:
    """One process' share: so many flips that hit what counts, and so many others, of each what it has time for."""
    states, done, started = (*STATES, FINISHED), [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        bases = []
        for variant in VARIANTS:
            (folder := Path(name) / variant).mkdir()
            bases.append(make_base(folder, variant))
        for kinds, wanted in ((("flip",), flips), (OTHERS, others)):
            counted, share = 0, flips / (flips + others) if kinds == ("flip",) else 1.0
            for number in itertools.count():
                if counted >= wanted or time.monotonic() - started > share * seconds:
                    break
                base, state = bases[number % len(bases)], states[number // len(bases) % len(states)]
                seed = number * jobs + job
                dice = random.Random(f"more {seed}").random()
                trial = try_fault(base, state, seed, mend=dice < MENDED, to_end=dice > 1 - TO_END, kinds=kinds)
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
    """By what was done, then the flips by what they hit, then all."""
    for kind in KINDS:
        yield kind, [trial for trial in trials if trial.fault.kind == kind]
    for what in sorted({trial.fault.what for trial in trials if trial.fault.kind == "flip"}):
        yield f"flip, {what}", [trial for trial in trials if (trial.fault.kind, trial.fault.what) == ("flip", what)]
    yield "all", trials


@click.command()
@click.option("--flips", default=1000, show_default=True, help="Flipped bits that count, of all jobs.")
@click.option("--others", default=500, show_default=True, help="Other damages that count, of all jobs.")
@click.option("--jobs", default=2, show_default=True, help="Processes.")
@click.option("--minutes", default=600.0, show_default=True, help="End after these, with what was done till then.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all that was seen here.")
def main(flips: int, others: int, jobs: int, minutes: float, json_path: Path | None) -> None:
    """Damage runs; exit 1 if a damage was not found, or got into a picture."""
    started = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"  # of each job
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
