"""How well a run foretold its own end: what its journal said was left, beside what was.

python -m tools.bench.eta poster.run
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
    start_s = _time(next(one for one in records if isinstance(one, Begun)))
    end_s = _time(next(one for one in reversed(records) if isinstance(one, Exported)))
    speed, before_s, is_warm = Speed(export_s=export_s), start_s, False
    found = []
    for record in records:
        now_s = _time(record)
        if isinstance(record, StagePrepared) and stages and is_warm:
            speed.preparations.add(stages[record.stage].prepare_flop, now_s - before_s)
        for one, seconds, after_s in _timed(record) if isinstance(record, Iteration) else ():
            said_s = one.remaining_s
            if stages:
                if is_warm and one.iteration:
                    speed.iterations.add(stages[one.stage].flop_per_iteration, seconds)
                said_s = speed.remaining_s(stages[one.stage :], one.iteration + 1)
            is_warm = True
            if said_s is not None:
                share, true_s = (now_s - after_s - start_s) / (end_s - start_s), end_s - now_s + after_s
                found.append(Estimate(one.stage, one.iteration, share, said_s, true_s))
        before_s = now_s
    return found


def _timed(record: Iteration) -> list[tuple[Iteration, float, float]]:
    """(iteration, its seconds, seconds from its end to the commit) of each iteration that the record commits."""
    each = [(one, one.busy.get("wall", sum(one.seconds.values()))) for one in record.each]
    return [
        (one, seconds, sum(later for _, later in each[number:])) for number, (one, seconds) in enumerate(each, start=1)
    ]


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
