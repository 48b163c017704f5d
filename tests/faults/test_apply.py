"""`pipeline apply` killed for real, in worker processes and in none, and on disks that fail or fill up."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pyvips

from pipeline.rundir import Journal, journal_path
from pipeline.rundir.records import Pass
from tests.e2e.test_apply_workers import write_apply
from tests.support.disks import CannotMountError, Faulted, calls_of, failing_from, run_failing, small_disk
from tests.support.e2e import Nursery, Outcome
from tests.support.inputs import write_image
from tests.support.networks import write_network
from tests.support.syscalls import supported
from tests.support.torture import Ending, damage, start

pytestmark = pytest.mark.fault


def passes(run_dir: Path) -> list[Pass]:
    journal = Journal(journal_path(run_dir))
    return [record for record in journal.read() if isinstance(record, Pass)] if journal.path.exists() else []


def test_a_kill_costs_the_pass_in_progress_and_workers_give_the_same_bytes(
    nursery: Nursery, call: Callable[..., Outcome], tmp_path: Path
) -> None:
    """With stored activations; the sweep below computes them again."""
    net, content = tmp_path / "net.safetensors", tmp_path / "content.png"
    write_network(net)
    write_image(content, 150, 90)
    settings = ("store.chunk_px=32", "compute.tile_px=64", "activations=store")
    line = ["apply", net, content, *(f"--set={one}" for one in settings)]
    out, once, killed_run = tmp_path / "out.png", tmp_path / "once.png", tmp_path / "out.run"
    child = nursery.start(*line, "-o", out, "--set=compute.workers=1", "--log-format", "json")
    assert child.wait_until(lambda _events: len(passes(killed_run)) >= 3), child.err
    child.kill()
    before = passes(killed_run)
    assert len(before) < 8
    assert nursery.run(*line, "-o", out).wait() == 0
    assert passes(killed_run)[: len(before)] == before  # none was repeated
    assert nursery.run(*line, "-o", once).wait() == 0
    assert out.read_bytes() == once.read_bytes()
    assert np.std(pyvips.Image.new_from_file(str(out)).numpy()) > 1
    assert "8/8" in call("status", "--run", killed_run).out
    refused = call("apply", content, content, "-o", tmp_path / "no.png")
    assert (refused.code, refused.out) == (3, "")
    assert "cannot be read as weights" in refused.err
    assert not (tmp_path / "no.run").exists()


@pytest.fixture(scope="module")
def expected(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Ending:
    config = write_apply(tmp_path_factory.mktemp("expected"), "network")
    assert start(nursery, config).wait() == 0
    return Ending.of(config)


def test_a_sweep_of_kills_on_processes_ends_with_the_same_bytes(
    nursery: Nursery, expected: Ending, tmp_path: Path
) -> None:
    """A kill in a phase that no other test reaches would cost the passes before it, or change the picture."""
    for aim, compute in (
        ("content", {"workers": 1}),
        ("pass 2 of 8", {"devices": ["cpu", "cpu"]}),
        ("pass 6 of 8", {"workers": 1}),
        ("export", {}),
    ):
        child = start(nursery, write_apply(tmp_path, "network", **compute))
        assert child.wait_until(lambda events, aim=aim: any(event.get("what") == aim for event in events)), child.err
        before = passes(tmp_path / "run")
        child.kill()
        assert damage(tmp_path / "run") == []
        assert passes(tmp_path / "run")[: len(before)] == before
    assert start(nursery, write_apply(tmp_path, "network")).wait() == 0
    assert expected.differences(Ending.of(tmp_path / "apply.yaml")) == []
    assert len(passes(tmp_path / "run")) == 8  # none was committed twice


@pytest.mark.skipif(not supported(), reason="needs Linux on x86-64 with seccomp's user notification")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_ends_apply_with_a_sentence(
    nursery: Nursery, expected: Ending, tmp_path: Path, number: int
) -> None:
    """A full disk after hours of passes would end with a traceback, or with holes in the picture."""
    calls = len(calls_of(nursery, write_apply(tmp_path / "calls", "network"), reads=False))
    refused = 0
    for share in (0.2, 0.6, 0.97):
        first = 1 + int(share * calls)
        config = write_apply(tmp_path / str(first), "network")
        fault = f"{errno.errorcode[number]} from call {first}"
        outcome = run_failing(nursery, config, expected, fault, failing_from(first, number))
        assert outcome.problems == [], outcome
        refused += outcome.codes[0] == 5
    assert refused >= 2


@pytest.mark.parametrize("aim", ["content", "pass 2 of 8", "pass 8 of 8"])
def test_a_disk_that_fills_up_costs_the_pass_in_progress(
    nursery: Nursery, expected: Ending, tmp_path: Path, aim: str
) -> None:
    """On a real full file system a write may succeed in part: the state must be what the journal says."""
    try:
        with small_disk(tmp_path / "disk", "size=2m,nr_inodes=600") as disk:
            config = write_apply(tmp_path, "network", work_dir="disk/run", output="disk/out.tif")
            child, outcome = start(nursery, config), Faulted(f"filled at {aim}")
            assert child.wait_until(lambda events: any(event.get("what") == aim for event in events)), child.err
            with child.paused():
                disk.fill()
            before = len(passes(disk.path / "run"))
            outcome.check(config, child.wait(), child.err)
            assert (outcome.codes, outcome.problems) == ([5], [])
            assert before <= len(passes(disk.path / "run")) < 8
            disk.free()
            outcome.finish(nursery, config, expected)
            assert outcome.problems == []
    except CannotMountError as error:
        pytest.skip(str(error))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(nursery: Nursery, tmp_path: Path) -> None:
    """A picture of 30,000 px would compute for hours before its canvas finds no room."""
    try:
        with small_disk(tmp_path / "disk", "size=128k,nr_inodes=600") as disk:
            config = write_apply(tmp_path, "network", work_dir="disk/run", output="disk/out.tif")
            child, outcome = start(nursery, config), Faulted("too small")
            outcome.check(config, child.wait(), child.err)
            assert (outcome.codes, outcome.problems) == ([5], [])
            assert not passes(disk.path / "run") and not (disk.path / "run" / "store.zarr").exists()
    except CannotMountError as error:
        pytest.skip(str(error))
