"""Kills at every system call of `clean`, at a sample of those of more iterations, and stops of the measurement."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from pipeline.commands import measure
from tests.support.e2e import Nursery, write_run
from tests.support.syscalls import Call, Verdict, Watch, supported
from tests.support.torture import KILLED, SMALL_RUN, Ending, at_number, damage, places

pytestmark = pytest.mark.skipif(not supported(), reason="needs Linux on x86-64 with seccomp's user notification")

ONE_STAGE = {**SMALL_RUN, "initial_size": 64, "style_stages": False}
MORE = ("--more-iterations", "2", "--log-format", "json")


@pytest.fixture(scope="module")
def finished(nursery, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert nursery.run("run", "-c", write_run(folder, (64, 64), (48, 40), **ONE_STAGE)).wait() == 0
    return folder


def copy_of(finished: Path, folder: Path) -> Path:
    """The config of a copy of the run: its configs' paths are relative, and its image is recognised by its hash."""
    shutil.copytree(finished, folder, copy_function=shutil.copy2)
    return folder / "config.yaml"


def calls_of(nursery: Nursery, config: Path, *command: object) -> list[Call]:
    watch = Watch(config.parent, lambda _call: Verdict.GO)
    assert nursery.start(*command, watch=watch).wait() == 0
    return watch.wait()


def kill(nursery: Nursery, config: Path, number: int, *command: object) -> bool:
    """Kill a command at its call of this number; whether it came so far."""
    watch = Watch(config.parent, at_number(number))
    code = nursery.start(*command, watch=watch).wait()
    watch.wait()
    return code == KILLED


def test_clean_killed_at_any_call_leaves_a_run_that_it_can_finish_to_clean(nursery, finished, tmp_path):
    """A store that is half deleted would be taken for damage, and the run's own picture for a stranger's."""
    work_dir = places(finished / "config.yaml")[0]
    config = copy_of(finished, tmp_path / "whole")
    calls = calls_of(nursery, config, "clean", "-c", config, "--yes")
    journal = next(number for number, call in enumerate(calls, 1) if call.path.endswith("journal.jsonl"))
    assert len(calls) > journal + 10
    # before, in and after the record, and a sample of the many deletions
    numbers = [*range(1, journal + 6), *range(journal + 6, len(calls) + 1, max(1, len(calls) // 6))]
    for number in numbers:
        config = copy_of(finished, tmp_path / str(number))
        work_dir, output = places(config)
        before = output.read_bytes()
        assert kill(nursery, config, number, "clean", "-c", config, "--yes"), number
        assert damage(work_dir) == [], number
        assert nursery.run("run", "-c", config).wait() == 0, number  # finds its picture: nothing is rendered
        assert nursery.run("clean", "-c", config, "--yes").wait() == 0, number
        assert not (work_dir / "store.zarr").exists() and output.read_bytes() == before, number
        assert damage(work_dir) == [], number


def test_more_iterations_killed_anywhere_end_with_the_same_bytes(nursery, finished, tmp_path):
    """A day's run that is continued for an hour must not be lost in that hour."""
    config = copy_of(finished, tmp_path / "whole")
    calls = calls_of(nursery, config, "run", "-c", config, *MORE)
    unbroken = Ending.of(config)
    record = next(number for number, call in enumerate(calls, 1) if call == Call("write", "run/journal.jsonl"))
    numbers = [record, record + 1, record + 2, *range(record + 3, len(calls) + 1, len(calls) // 6)]
    for place, number in enumerate(numbers):
        config = copy_of(finished, tmp_path / str(number))
        assert kill(nursery, config, number, "run", "-c", config, *MORE), calls[number - 1]
        assert damage(places(config)[0]) == []
        # the plain command resumes what was added; before that is recorded, only the same command adds it
        options = MORE if place == 0 or place % 2 else ()
        assert nursery.run("run", "-c", config, *options).wait() == 0, calls[number - 1]
        assert unbroken.differences(Ending.of(config)) == [], calls[number - 1]


def partial_names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".partial" in path.name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_measurement_and_leaves_nothing(nursery, tmp_path, number):
    """Five seconds are long enough to change one's mind; a folder of noise beside the picture would puzzle anybody."""
    config = write_run(tmp_path / "run", (64, 64), (48, 40), **ONE_STAGE)
    child = nursery.start("plan", "-c", config, "--time")
    deadline = time.monotonic() + 60
    while not partial_names(config.parent) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(child.pid, number)
    assert child.wait() == 75, child.err
    assert "Traceback" not in child.err
    assert sorted(path.name for path in config.parent.iterdir()) == ["config.yaml", "content.png", "style.png"]


def test_what_a_killed_measurement_left_is_deleted_by_the_next(nursery, tmp_path):
    """Nothing else would ever delete it."""
    config = write_run(tmp_path / "run", (64, 64), (48, 40), **ONE_STAGE)
    child = nursery.start("plan", "-c", config, "--time")
    deadline = time.monotonic() + 60
    while not partial_names(config.parent) and time.monotonic() < deadline:
        time.sleep(0.001)
    child.kill()
    assert len(partial_names(config.parent)) == 1
    assert nursery.run("plan", "-c", config, "--time").wait() == 0
    assert partial_names(config.parent) == []


def test_a_run_that_was_measured_has_the_same_bytes(tmp_path, monkeypatch):
    """The measurement computes in the same process, and its random numbers and its network must not reach the run."""
    import pipeline

    endings = []
    for name, seconds in (("measured", 0.0), ("as it is", math.inf)):
        monkeypatch.setattr(measure, "_WORTH_MEASURING_S", seconds)
        config = write_run(tmp_path / name / "run", (64, 64), (48, 40), **ONE_STAGE)
        pipeline.run(pipeline.load_config(config))
        endings.append(Ending.of(config))
    assert endings[0].differences(endings[1]) == []
