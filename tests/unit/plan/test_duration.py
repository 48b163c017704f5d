"""The time that is left: stages of unlike sizes, a cost of every iteration, other programs on the machine."""

from __future__ import annotations

import random

import pytest

from pipeline.plan.duration import Costs, Speed, export_s
from tests.support.plans import planned

PLAN = planned(
    (6000, 4000),
    stage_ratio=1.7,
    style_stages=False,
    memory={"limit": "8GiB"},
    compute={"tile_px": 1024, "device": "cpu"},
)
RATE = 1e-11  # seconds per FLOP


def iteration_s(flop: int, overhead_s: float) -> float:
    return overhead_s + RATE * flop


@pytest.mark.parametrize("overhead_s", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("load", [0.0, 0.2])
def test_after_a_tenth_of_the_run_the_rest_is_known_within_a_quarter(overhead_s, load):
    """A user decides by it whether to wait. A cost of every iteration counts much in small stages only, and the time
    per FLOP of those stages, taken for the whole run, was a multiple of the truth.
    """
    speed, rng = Speed(), random.Random(1)
    events = [
        (index, number, stage, iteration_s(stage.flop_per_iteration, overhead_s))
        for index, stage in enumerate(PLAN.stages)
        for number in range(stage.max_iterations)
    ]
    preparing = {index: iteration_s(stage.prepare_flop, overhead_s) for index, stage in enumerate(PLAN.stages)}
    total = sum(seconds for *_, seconds in events) + sum(preparing.values()) + export_s(PLAN.stages[-1])
    passed, checked = 0.0, 0
    for index, number, stage, seconds in events:
        if number == 0:
            speed.preparations.add(stage.prepare_flop, preparing[index] * rng.uniform(1, 1 + load))
            passed += preparing[index]
        speed.iterations.add(stage.flop_per_iteration, seconds * rng.uniform(1 - load / 2, 1 + load / 2))
        passed += seconds
        left = speed.remaining_s(PLAN.stages[index:], number + 1)
        if passed > total / 10 and total - passed > total / 100:
            assert left == pytest.approx(total - passed, rel=0.25)
            checked += 1
    assert checked > PLAN.stages[-1].max_iterations


def test_the_time_of_a_size_is_that_of_its_newest_measurements():
    """Another program that ran for an hour would be part of every later estimate."""
    costs = Costs()
    for seconds in [50.0] * 20 + [10.0] * 9:
        costs.add(10**12, seconds)
    assert costs.seconds_for(10**12) == 10
    assert costs.seconds_for(2 * 10**12) == 20


def test_noise_between_two_sizes_does_not_turn_an_estimate_over():
    """A large stage that was measured in a quiet moment would let larger ones take less time, or a negative one."""
    costs = Costs()
    costs.add(10**10, 1.0)
    costs.add(10**11, 0.9)
    assert costs.seconds_for(10**12) == pytest.approx(9.0)


def test_nothing_is_said_before_anything_is_measured():
    """An invented time is worse than none."""
    assert Speed().remaining_s(PLAN.stages, 0) is None
    assert Speed().stage_s(PLAN.stages[0]) is None
