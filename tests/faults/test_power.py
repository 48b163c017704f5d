"""Power cuts during a run: a sample of what tools/torture/power.py does at hundreds of moments."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pipeline.core.files import sync_file_system
from tests.support.power import MODES, Plan, disks, missing, suffer
from tests.support.syscalls import Call, supported
from tests.support.torture import Unbroken

REASON = missing() or (None if supported() else "needs Linux on x86-64 with seccomp's user notification")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"cannot cut the power of a disk here: {REASON}")


@pytest.fixture(scope="module", autouse=True)
def mounts_are_allowed(tmp_path_factory) -> None:
    """Skip these tests where a container does not permit root to mount."""
    try:
        with disks(tmp_path_factory.mktemp("try") / "disk", mode="ordered"):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot cut the power of a disk here: {error}")


@pytest.fixture(scope="module")
def unbroken(nursery, tmp_path_factory) -> Unbroken:
    return Unbroken.of(nursery, tmp_path_factory.mktemp("unbroken") / "power", "power")


@pytest.mark.parametrize("mode", MODES)
def test_unsynced_data_is_lost(tmp_path, mode):
    """If a cut lost nothing, all tests below would pass for a program that never syncs."""
    with disks(tmp_path / "disk", mode=mode) as (disk,):
        synced, lost = disk.folder / "synced", disk.folder / "lost"
        for path in (synced, lost):
            path.write_bytes(b"first")
        sync_file_system(disk.folder)  # not all: a disk of a test beside this one must lose its data too
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
        if mode != "journal":  # there all data goes through the journal, which the sync of the other file commits
            assert lost.read_bytes() == b"first"


def nth(calls: list[Call], call: Call, occurrence: int) -> int:
    """The number of this occurrence of a call among all calls of a run, from 1."""
    return [number for number, candidate in enumerate(calls, start=1) if candidate == call][occurrence - 1]


@pytest.mark.parametrize(
    ("mode", "call", "occurrence", "two_disks"),
    [
        ("writeback", Call("rename", "run/store.zarr/stage_0.partial -> run/store.zarr/stage_0"), 1, False),
        (
            "ordered",
            Call("fsync", "run/journal.jsonl"),
            3,
            False,
        ),  # the record of the first iteration is not synced yet
        ("none", Call("openat", "run/journal.jsonl"), 5, False),
        ("writeback", Call("openat", "run/journal.jsonl"), 7, True),
        ("none", Call("unlink", "run/lock.owner"), 1, True),  # the run is complete
    ],
)
def test_a_power_cut_loses_nothing_committed(nursery, unbroken, tmp_path, mode, call, occurrence, two_disks):
    """A record without its chunks on the disk would end the run for good, or give a wrong output image."""
    number = nth(unbroken.calls, call, occurrence)
    plan = Plan("power", mode, (number,), two_disks, leaky=True, seed=occurrence)
    score = suffer(nursery, tmp_path / "run", plan, unbroken)
    assert (score.problems, len(score.kills)) == ([], 1)


def test_without_power_durability_a_lost_chunk_is_detected(nursery, unbroken, tmp_path: Path):
    """`process` does not promise to survive a power cut, but lost chunks must be reported and never rendered."""
    number = nth(unbroken.calls, Call("openat", "run/journal.jsonl"), 5)
    plan = Plan("power", "ordered", (number,), two_disks=False, leaky=False, durability="process")
    for attempt in range(3):
        score = suffer(nursery, tmp_path / str(attempt), plan, unbroken)
        if score.code == 6:
            break  # otherwise the machine was so busy that the kernel had already written everything
    assert score.code == 6, score
    assert any("stage_0" in problem for problem in score.problems)
