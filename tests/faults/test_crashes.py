"""Kills at single system calls that change files: a sample of what tools/torture/calls.py does for all calls."""

from __future__ import annotations

import random

import pytest

from tests.support.syscalls import Call, Verdict, supported
from tests.support.torture import PHASES, VARIANTS, Target, Unbroken, kill_at, kill_at_random, targets_of, write_variant

pytestmark = pytest.mark.skipif(not supported(), reason="needs Linux on x86-64 with seccomp's user notification")

KILLS = 4  # per variant


# One variant is in the short part of the suite.
@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.quick] if name == "tiff" else []) for name in VARIANTS],
)
def variant(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def unbroken(nursery, variant, tmp_path_factory) -> Unbroken:
    return Unbroken.of(nursery, tmp_path_factory.mktemp("unbroken") / variant, variant)


def test_killed_at_file_operations_the_resumed_run_ends_with_the_same_bytes(nursery, variant, unbroken, tmp_path):
    """Two file operations in the wrong order would leave, at a moment that few kills hit, a state without resume."""
    assert {
        Call("fsync", "run/journal.jsonl"),
        Call("rename", "run/manifest.json.partial -> run/manifest.json"),
    } <= set(unbroken.calls)
    targets = targets_of(unbroken.calls)
    for number in range(KILLS):
        target = targets[int((number + 0.5) / KILLS * len(targets))]
        config = write_variant(tmp_path / str(number), variant)
        score = kill_at(nursery, config, target, unbroken, again=97 * number)
        assert score.problems == [], target
        assert score.kills, target


def test_killed_in_the_middle_of_a_record_the_resumed_run_ends_with_the_same_bytes(
    nursery, variant, unbroken, tmp_path
):
    """An incomplete line in the journal would be reported as damage, and days of work would be lost."""
    config = write_variant(tmp_path / "half", variant)
    target = Target(Call("write", "run/journal.jsonl"), 4, Verdict.HALF)
    score = kill_at(nursery, config, target, unbroken)
    assert (score.problems, len(score.kills)) == ([], 1)


def test_killed_at_random_moments_of_every_phase_the_resumed_run_ends_with_the_same_bytes(
    nursery, variant, unbroken, tmp_path
):
    """The OOM killer may strike at any moment: an incomplete input, canvas or output image would be used."""
    rng, phases = random.Random(variant), set(unbroken.moments().values())
    assert phases == set(PHASES)
    for number in range(2):
        config = write_variant(tmp_path / str(number), variant)
        score = kill_at_random(nursery, config, unbroken, 3, rng)
        assert score.problems == []
