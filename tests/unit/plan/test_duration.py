"""The time that is left: stages of unlike sizes, a cost of every iteration, other programs on the machine."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest

from pipeline.plan import duration
from pipeline.plan.duration import Costs, Speed
from pipeline.rundir import Begun, Exported, Iteration, Manifest, Record, StagePrepared
from pipeline.rundir.records import measured_alone
from tests.support.plans import planned
from tools.bench.eta import estimates

PLAN = planned(
    (6000, 4000),
    stage_ratio=1.7,
    style_stages=False,
    memory={"limit": "8GiB"},
    compute={"tile_px": 1024, "device": "cpu"},
)
MANIFEST = Manifest.model_validate(
    {
        "format": 2,
        "created": "",
        "config": {"output": "/o.tif", "optimizer": {"max_iterations": 1}},
        "stages": [{"size": (8, 8), "style_sizes": []}],
        "threads": 1,
        "result_fields": {},
        "inputs": {},
    }
)


EXPORT_S = 20.0


def made_journal(rate: float, overhead_s: float, load: float, drift: float) -> list[Record]:
    """The records of a run whose times are made up, on a machine that other programs use too.

    `rate`: seconds per FLOP. `overhead_s`: of every iteration. `load`: how much longer something takes at most, at
    random. `drift`: how much slower the machine is in the last stage than in the first. Small feature maps stay in a
    cache; a stage decodes its images and begins with a slower iteration; the run loads weights first; the export takes
    longer than was foretold.
    """
    rng, now_s, last = random.Random(1), 1.8e9, len(PLAN.stages) - 1
    times: list[tuple[Record, float]] = []
    for stage in PLAN.stages:
        busy = (1 + drift * stage.index / last) * (0.75 + 0.25 * stage.index / last)
        seconds = [3.0 + overhead_s + busy * rate * stage.prepare_flop]
        each_s = overhead_s + busy * rate * stage.flop_per_iteration
        seconds += [each_s * (1.0 if number else 1.6) for number in range(stage.max_iterations)]
        prepared = StagePrepared(stage=stage.index, content_energies={}, checksums={})
        times += [(prepared, seconds[0] + (0 if stage.index else 8.0))]
        times += [(iteration_record(stage.index, number), each_s) for number, each_s in enumerate(seconds[1:])]
    records: list[Record] = [Begun(manifest=MANIFEST, time=text(now_s))]
    for record, seconds_s in [*times, (Exported(output="o.tif"), 1.3 * EXPORT_S)]:
        took_s = seconds_s * rng.uniform(1, 1 + load)
        now_s += took_s
        wall = {"busy": {"wall": took_s}} if isinstance(record, Iteration) else {}
        records.append(record.model_copy(update={"time": text(now_s), **wall}))
    return records


def text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def iteration_record(stage: int, number: int) -> Record:
    losses = dict.fromkeys(("objective", "content_loss", "style_loss", "mean_abs_u", "max_abs_u"), 0.0)
    return Iteration(stage=stage, iteration=number, **losses, alpha=None, seconds={}, stepped=True, checksums={})


@pytest.mark.parametrize("rate", [1e-12, 1e-13])
@pytest.mark.parametrize("overhead_s", [0.0, 0.3])
@pytest.mark.parametrize(("load", "drift"), [(0.0, 0.0), (0.8, 0.0), (0.4, 0.3)])
def test_after_a_tenth_of_the_run_the_rest_is_known_within_a_quarter(monkeypatch, rate, overhead_s, load, drift):
    """A user decides by it whether to wait. A cost of every iteration counts much in small stages only, a first
    iteration is no measure of the others, and the program ends after the last iteration, not with it.
    """
    monkeypatch.setattr(duration, "slowness", lambda: 1.0)
    records = made_journal(rate, overhead_s, load, drift)
    found = estimates(records, PLAN.stages, EXPORT_S)
    late = [one for one in found if one.share > 0.1]
    assert len(late) > PLAN.stages[-1].max_iterations
    total_s = late[0].true_s / (1 - late[0].share)
    for one in late:
        assert one.said_s == pytest.approx(one.true_s, rel=0.25, abs=0.02 * total_s), one


def test_stages_in_memory_are_judged_by_each_of_their_iterations(monkeypatch):
    """A commit every 30 s holds hundreds of them: by its own time alone, a run of a minute has three estimates."""
    monkeypatch.setattr(duration, "slowness", lambda: 1.0)
    records = made_journal(1e-12, 0.3, load=0.4, drift=0.0)
    together: list[Record] = []
    waiting: list[Iteration] = []
    for one in records:
        if isinstance(one, Iteration):
            waiting.append(one)
            if one.iteration % 7 and one.iteration + 1 < PLAN.stages[one.stage].max_iterations:
                continue
            together.append(one.model_copy(update={"before": tuple(map(measured_alone, waiting[:-1]))}))
            waiting = []
        else:
            together.append(one)
    expected, found = (estimates(way, PLAN.stages, EXPORT_S) for way in (records, together))
    assert len(found) == len(expected) > 200
    for one, other in zip(found, expected, strict=True):
        assert (one.stage, one.iteration) == (other.stage, other.iteration)
        assert (one.share, one.said_s, one.true_s) == pytest.approx((other.share, other.said_s, other.true_s), rel=1e-3)


def test_other_work_for_a_moment_does_not_change_what_is_said_of_hours():
    """The iterations of a small stage take hundredths of a second: nine of them are over before a web page is open."""
    speed, first = Speed(), PLAN.stages[0]
    for _ in range(30):
        speed.iterations.add(first.flop_per_iteration, 0.04)
    quiet = speed.remaining_s(PLAN.stages, 30)
    for _ in range(9):
        speed.iterations.add(first.flop_per_iteration, 0.08)
    assert speed.remaining_s(PLAN.stages, 39) < 1.35 * quiet


def test_the_time_of_a_size_is_that_of_its_newest_measurements():
    """Another program that ran for an hour would be part of every later estimate."""
    costs = Costs()
    for seconds in [50.0] * 40 + [10.0] * 30:
        costs.add(10**12, seconds)
    assert costs.seconds_for(10**12) == 10
    assert costs.seconds_for(2 * 10**12) == pytest.approx(20, rel=0.01)


def test_noise_between_two_sizes_does_not_turn_an_estimate_over():
    """A large stage that was measured in a quiet moment would let larger ones take less time, or a negative one."""
    costs = Costs()
    for flop, seconds in [(10**10, 1.0)] * 4 + [(10**11, 0.9)] * 4:
        costs.add(flop, seconds)
    assert 1.0 < costs.seconds_for(10**12) < 9.0  # all of it overhead, or all of it work


def test_nothing_is_said_before_anything_is_measured():
    """An invented time is worse than none."""
    assert Speed().remaining_s(PLAN.stages, 0) is None
    assert Speed().stage_s(PLAN.stages[0]) is None
