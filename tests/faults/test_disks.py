"""Disks that fail or fill up in the middle of a run: a part of what tools/torture/disk.py does at many moments."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.disks import CannotMountError, Faulted, failing_from, run_failing, small_disk, write_on_disk
from tests.support.e2e import PIPELINE, TIMEOUT_S, Nursery
from tests.support.syscalls import Call, Verdict, Watch, supported
from tests.support.torture import Ending, damage, places, start, write_variant

pytestmark = pytest.mark.skipif(not supported(), reason="needs Linux on x86-64 with seccomp's user notification")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def calls(nursery, tmp_path_factory) -> dict[bool, list[Call]]:
    """The calls of a run that nothing disturbs: those that change files, and with those that read."""
    found = {}
    for reads in (False, True):
        config = write_variant(tmp_path_factory.mktemp("calls") / "run", "tiff")
        watch = Watch(config.parent, lambda _call: Verdict.GO, reads)
        assert start(nursery, config, watch=watch).wait() == 0
        found[reads] = watch.wait()
    return found


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
    """A bad cable would end a week's run in a traceback, or, worse, in a picture with holes."""
    refused = 0
    for share in (0, 0.4, 0.75, 0.97):
        first = 1 + int(share * len(calls[reads]))
        config = write_variant(tmp_path / str(first), "tiff")
        fault = f"{errno.errorcode[number]} from call {first}"
        found = run_failing(nursery, config, expected, fault, failing_from(first, number, once), reads)
        assert found.problems == [], found
        refused += found.codes[0] == 5
    assert refused >= 2


@pytest.mark.parametrize("limit", [24, 40])
def test_few_open_files_are_enough_or_refused_in_a_sentence(nursery, expected, tmp_path, limit):
    """The default of some systems is low: a library's words about descriptors would help nobody."""
    config, found = write_variant(tmp_path / "run", "tiff"), Faulted(f"ulimit -n {limit}")
    done = subprocess.run(
        [PIPELINE, "run", "-c", config, "--log-format", "json"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as the nursery's runs
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
    )
    found.check(config, done.returncode, done.stdout + done.stderr)
    found.finish(nursery, config, expected)
    assert found.problems == [], found


@pytest.mark.parametrize("leave", [65_536, None])
def test_room_is_looked_for_before_the_next_stage(nursery, tmp_path, leave):
    """What took the room since the start would be met after an hour, in the middle of the stage that needs most.

    `leave`: bytes that are left; None: it takes no bytes, but every file that the disk can hold.
    """
    config = write_on_disk(tmp_path / "run", "tiff")
    reached: list[Call] = []
    try:
        with small_disk(tmp_path / "run" / "disk", "size=16m,nr_inodes=600") as disk:

            def judge(call: Call) -> Verdict:
                if not reached and call.path.startswith("disk/run/store.zarr/stage_0/"):
                    if call.name == "unlinkat":  # the first stage has ended, and gives its arrays back
                        reached.append(call)
                        disk.fill(leave) if leave else disk.fill_with_files()
                elif reached and "stage_1" in call.path:
                    reached.append(call)
                return Verdict.GO

            watch, found = Watch(config.parent, judge), Faulted("filled between stages")
            child = start(nursery, config, watch=watch)
            found.check(config, child.wait(), child.err)
            watch.wait()
            assert (found.codes, found.problems) == ([5], [])
            assert "rendering from stage 1 on still needs" in found.message
            assert len(reached) == 1  # and none of stage 1 was made
            disk.free()
            again = start(nursery, config)
            assert again.wait() == 0, again.err
            assert places(config)[1].exists()
    except CannotMountError as error:
        pytest.skip(str(error))


def test_a_run_on_a_full_disk_can_be_looked_at(nursery, tmp_path):
    """Whether all is whole is what one asks first when a disk was found full; to ask must not need room there."""
    config = write_on_disk(tmp_path / "run", "tiff")
    try:
        with small_disk(tmp_path / "run" / "disk") as disk:
            assert start(nursery, config).wait() == 0
            for fill in (disk.fill, disk.fill_with_files):
                fill()
                assert damage(places(config)[0]) == []
                disk.free()
    except CannotMountError as error:
        pytest.skip(str(error))
