"""Disks that fail or fill up during a run: a sample of what tools/torture/disk.py does at many moments."""

from __future__ import annotations

import errno
import os
import resource
import subprocess

import pytest

from tests.support.disks import CannotMountError, Faulted, failing_from, run_failing, small_disk, write_on_disk
from tests.support.e2e import PIPELINE, TIMEOUT_S
from tests.support.syscalls import Call, Verdict, Watch, supported
from tests.support.torture import Ending, damage, places, start, write_variant

pytestmark = pytest.mark.skipif(not supported(), reason="needs Linux on x86-64 with seccomp's user notification")


@pytest.fixture(scope="module")
def calls(nursery, tmp_path_factory) -> dict[bool, list[Call]]:
    """The calls of an undisturbed run: those that change files (False), and those including reads (True)."""
    calls = {}
    for reads in (False, True):
        config = write_variant(tmp_path_factory.mktemp("calls") / "run", "tiff")
        watch = Watch(config.parent, lambda _call: Verdict.GO, reads)
        assert start(nursery, config, watch=watch).wait() == 0
        calls[reads] = watch.wait()
    return calls


@pytest.fixture(scope="module")
def expected(nursery, tmp_path_factory) -> Ending:
    config = write_variant(tmp_path_factory.mktemp("expected") / "run", "tiff")
    assert start(nursery, config).wait() == 0
    return Ending.of(config)


@pytest.mark.parametrize(
    ("number", "once", "reads"),
    [
        (errno.EIO, False, False),
        (errno.EIO, True, False),
        (errno.EROFS, False, False),
        (errno.EDQUOT, True, False),
        (errno.EIO, False, True),
    ],
)
def test_a_failing_disk_ends_the_run_with_a_sentence(nursery, calls, expected, tmp_path, number, once, reads):
    """A bad cable would end a week's run with a traceback or, worse, with holes in the output image."""
    refused = 0
    for share in (0, 0.4, 0.75, 0.97):
        first = 1 + int(share * len(calls[reads]))
        config = write_variant(tmp_path / str(first), "tiff")
        fault = f"{errno.errorcode[number]} from call {first}"
        outcome = run_failing(nursery, config, expected, fault, failing_from(first, number, once), reads)
        assert outcome.problems == [], outcome
        refused += outcome.codes[0] == 5
    assert refused >= 2


@pytest.mark.parametrize("limit", [24, 40])
def test_few_file_descriptors_are_enough_or_refused_with_a_sentence(nursery, expected, tmp_path, limit):
    """Some systems allow few descriptors by default: a library's own error would not say what to do."""
    config, outcome = write_variant(tmp_path / "run", "tiff"), Faulted(f"ulimit -n {limit}")
    result = subprocess.run(
        [PIPELINE, "run", "-c", config, "--log-format", "json"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in the nursery's runs
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
    )
    outcome.check(config, result.returncode, result.stdout + result.stderr)
    outcome.finish(nursery, config, expected)
    assert outcome.problems == [], outcome


@pytest.mark.parametrize("leave", [65_536, None])
def test_room_is_looked_for_before_the_next_stage(nursery, tmp_path, leave):
    """A disk that another program has filled would be noticed only hours later, in the middle of the largest stage.

    `leave`: free bytes; None: the disk has free bytes but no free inode.
    """
    config = write_on_disk(tmp_path / "run", "tiff")
    reached: list[Call] = []
    try:
        with small_disk(tmp_path / "run" / "disk", "size=16m,nr_inodes=600") as disk:

            def judge(call: Call) -> Verdict:
                if not reached and call.path.startswith("disk/run/store.zarr/stage_0/"):
                    if call.name == "unlinkat":  # the first stage is done and its arrays are deleted
                        reached.append(call)
                        disk.fill(leave) if leave else disk.fill_with_files()
                elif reached and "stage_1" in call.path:
                    reached.append(call)
                return Verdict.GO

            watch, outcome = Watch(config.parent, judge), Faulted("filled between stages")
            child = start(nursery, config, watch=watch)
            outcome.check(config, child.wait(), child.err)
            watch.wait()
            assert (outcome.codes, outcome.problems) == ([5], [])
            assert "stage 2" in outcome.message and "still needs" in outcome.message
            assert len(reached) == 1  # nothing of stage 1 was written
            disk.free()
            again = start(nursery, config)
            assert again.wait() == 0, again.err
            assert places(config)[1].exists()
    except CannotMountError as error:
        pytest.skip(str(error))


def test_a_run_on_a_full_disk_can_be_verified(nursery, tmp_path):
    """After a disk was full, users first check their run: the check must not need free space there."""
    config = write_on_disk(tmp_path / "run", "tiff")
    try:
        # few inodes: by default a tmpfs has one per page of memory, and filling it would take a minute
        with small_disk(tmp_path / "run" / "disk", "size=16m,nr_inodes=600") as disk:
            assert start(nursery, config).wait() == 0
            for fill in (disk.fill, disk.fill_with_files):
                fill()
                assert damage(places(config)[0]) == []
                disk.free()
    except CannotMountError as error:
        pytest.skip(str(error))
