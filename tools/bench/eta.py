"""How well a run foretold its own end: what its journal said was left, beside what was.

python -m tools.bench.eta poster.run

Stages in memory have one estimate for each commit; with `store.commit_interval: 0` there is one for each iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import click

from pipeline.plan import Speed, StagePlan
from pipeline.rundir import Begun, Exported, Iteration, Journal, Record, StagePrepared, journal_path


@dataclass(frozen=True)
class Estimate:
    """After an iteration: the share of the run's time that is over, and the seconds left, said and true."""

    stage: int
    iteration: int
    share: float
    said_s: float
    true_s: float


def estimates(records: Sequence[Record], stages: Sequence[StagePlan] = (), export_s: float = 0.0) -> list[Estimate]:
    """The estimates of a run that was neither stopped nor resumed, from the times of its records.

    With `stages`, what today's program would have said instead of what the journal has.
    """
    start_s, end_s = (
        _time(next(one for one in way if isinstance(one, Begun | Exported))) for way in (records, records[::-1])
    )
    speed, before_s, is_warm = Speed(export_s=export_s), start_s, False
    found = []
    for record in records:
        now_s = _time(record)
        if isinstance(record, StagePrepared) and stages and is_warm:
            speed.preparations.add(stages[record.stage].prepare_flop, now_s - before_s)
        if isinstance(record, Iteration):
            said_s = record.remaining_s
            if stages:
                if is_warm:
                    flop = stages[record.stage].flop_per_iteration
                    speed.iterations.add(flop, now_s - before_s, record.iteration == 0)
                said_s = speed.remaining_s(stages[record.stage :], record.iteration + 1)
            is_warm = True
            if said_s is not None:
                share = (now_s - start_s) / (end_s - start_s)
                found.append(Estimate(record.stage, record.iteration, share, said_s, end_s - now_s))
        before_s = now_s
    return found


def _time(record: Record) -> float:
    return datetime.fromisoformat(record.time).timestamp()


@click.command()
@click.argument("work_dir", type=click.Path(path_type=Path, exists=True))
def main(work_dir: Path) -> None:
    """Print what was said and what was true, and the largest error after a tenth of the time."""
    records = Journal(journal_path(work_dir)).read()
    if not any(isinstance(record, Exported) for record in records):
        raise click.UsageError(f"{work_dir}: the run has not ended")
    found = estimates(records)
    for one in found:
        print(
            f"{one.share:6.1%}  stage {one.stage + 1}, iteration {one.iteration + 1}: said {one.said_s:.0f} s, was "
            f"{one.true_s:.0f} s, ratio {one.said_s / one.true_s if one.true_s else 0:.2f}"
        )
    total_s = found[0].true_s / (1 - found[0].share)
    late = [one for one in found if one.share >= 0.1]
    off = [one for one in late if abs(one.said_s - one.true_s) > max(0.25 * one.true_s, 0.02 * total_s)]
    print(f"after a tenth: {len(late)} estimates, {len(off)} off by more than 25 % of the rest and 2 % of the run")


if __name__ == "__main__":
    main()
