"""Power lost in the middle of a run: a part of what tools/torture/power.py does at hundreds of moments."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.e2e import Nursery
from tests.support.power import MODES, Plan, disks, missing, suffer
from tests.support.syscalls import Call, supported
from tests.support.torture import Unbroken

REASON = missing() or (None if supported() else "needs Linux on x86-64 with seccomp's user notification")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no disk here whose power can be cut: {REASON}")


@pytest.fixture(scope="module", autouse=True)
def mounts_are_allowed(tmp_path_factory) -> None:
    """Root in a container may be refused mounts: then these tests are skipped, and say so."""
    try:
        with disks(tmp_path_factory.mktemp("try") / "disk", mode="ordered"):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk here whose power can be cut: {error}")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def unbroken(nursery, tmp_path_factory) -> Unbroken:
    return Unbroken.of(nursery, tmp_path_factory.mktemp("unbroken") / "power", "power")


@pytest.mark.parametrize("mode", MODES)
def test_what_was_not_synced_is_lost(tmp_path, mode):
    """If a cut lost nothing, all tests below would pass for a program that never syncs."""
    with disks(tmp_path / "disk", mode=mode) as (disk,):
        synced, lost = disk.folder / "synced", disk.folder / "lost"
        for path in (synced, lost):
            path.write_bytes(b"first")
        os.sync()
        for path in (synced, lost):
            with path.open("r+b") as file:
                file.write(b"later")
                if path == synced:
                    file.flush()
                    os.fsync(file.fileno())
        disk.cut()
        with pytest.raises(OSError):
            (disk.folder / "after").write_bytes(b"")
        disk.restore()
        assert synced.read_bytes() == b"later"
        if mode != "journal":  # all bytes go through the journal, which the other file's sync brought to the disk
            assert lost.read_bytes() == b"first"


def nth(calls: list[Call], call: Call, occurrence: int) -> int:
    """The number of a call among all of a run."""
    return [number for number, one in enumerate(calls, start=1) if one == call][occurrence - 1]


@pytest.mark.parametrize(
    ("mode", "call", "occurrence", "two_disks"),
    [
        ("writeback", Call("rename", "run/store.zarr/stage_0.partial -> run/store.zarr/stage_0"), 1, False),
        ("ordered", Call("fsync", "run/journal.jsonl"), 3, False),  # the first iteration's record is not synced yet
        ("none", Call("openat", "run/journal.jsonl"), 5, False),
        ("writeback", Call("openat", "run/journal.jsonl"), 7, True),
        ("none", Call("unlink", "run/lock.owner"), 1, True),  # all is done
    ],
)
def test_power_lost_costs_nothing_that_was_committed(nursery, unbroken, tmp_path, mode, call, occurrence, two_disks):
    """A record on the disk whose chunks are not there would stop the run for good, or give a wrong picture."""
    number = nth(unbroken.calls, call, occurrence)
    plan = Plan("power", mode, (number,), two_disks, leaky=True, seed=occurrence)
    score = suffer(nursery, tmp_path / "run", plan, unbroken)
    assert (score.problems, len(score.kills)) == ([], 1)


def test_without_power_durability_a_lost_chunk_is_found(nursery, unbroken, tmp_path: Path):
    """`process` promises nothing here, but what is missing must be said and not be painted over."""
    number = nth(unbroken.calls, Call("openat", "run/journal.jsonl"), 5)
    plan = Plan("power", "ordered", (number,), two_disks=False, leaky=False, durability="process")
    for again in range(3):
        score = suffer(nursery, tmp_path / str(again), plan, unbroken)
        if score.code == 6:
            break  # else the machine was so busy that the kernel had written everything by itself
    assert score.code == 6, score
    assert any("stage_0" in problem for problem in score.problems)
