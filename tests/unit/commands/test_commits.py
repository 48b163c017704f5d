"""Stages in memory: what is on the disk, when, and that it is the same as of a stage on the disk."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.core.events import IterationDone
from pipeline.core.image_formats import PixelKind
from pipeline.store import StageArray
from pipeline.store.memory import HostMemory
from tests.support.e2e import canvases, journal, run_until, write_run

ON_DISK = {"chunk_px": 32, "commit_interval": 0}
IN_MEMORY = {"chunk_px": 32, "commit_interval": "1h"}
# One stage of one tile and four chunks, whose last iteration but one has to be committed before the last.
ONE_STAGE: dict[str, Any] = {
    "initial_size": 64,
    "style_stages": False,
    "compute": {"device": "cpu", "tile_px": 64},
    "optimizer": {"max_iterations": 4, "carry": False},
    "output": "out.tif",
}


class Killed(BaseException):
    """The end of the process: nothing but `finally` runs after it."""


def one_stage(folder: Path, **store: Any) -> Path:
    return write_run(folder, (64, 64), (48, 40), store={**IN_MEMORY, **store}, **ONE_STAGE)


def ending(config: Path) -> tuple[dict[str, bytes], bytes]:
    return canvases(config.parent / "run"), config.with_name("out.tif").read_bytes()


def measured(config: Path) -> list[tuple[Any, ...]]:
    """The values of every iteration, however they were committed."""
    records = [record for record in journal(config.parent / "run") if record["type"] == "iteration"]
    every = [one for record in records for one in (*record["before"], record)]
    return [(one["iteration"], one["objective"], one["layer_losses"], one["mean_abs_u"], one["alpha"]) for one in every]


def batches(config: Path) -> list[int]:
    """How many iterations each commit has."""
    return [1 + len(record["before"]) for record in journal(config.parent / "run") if record["type"] == "iteration"]


VARIANTS: dict[str, dict[str, Any]] = {
    "float": {"loss": {"scales": 2, "tv_weight": 0.2}, "optimizer": {"average": 0.9, "carry": True}},
    "compact": {"store": {"state_dtype": "compact", "codec": "zstd"}, "optimizer": {"carry": True}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bytes_whether_in_memory_or_not(tmp_path, variant):
    """A machine with more memory would render another picture."""
    endings, curves, commits = [], [], []
    keys = VARIANTS[variant]
    for name, interval in (("disk", 0), ("each", "0.0001s"), ("end", "1h")):
        config = write_run(
            tmp_path / name,
            (64, 70),
            (60, 50),
            PixelKind(16, alpha=True),
            optimizer={"max_iterations": 3, **keys["optimizer"]},
            loss=keys.get("loss", {}),
            store={**keys.get("store", {}), "commit_interval": interval},
            output="out.tif",
        )
        loaded = pipeline.load_config(config)
        assert all(bool(stage.resident_bytes) == bool(interval) for stage in pipeline.plan(loaded).stages)
        pipeline.run(loaded)
        endings.append(ending(config))
        curves.append(measured(config))
        commits.append(batches(config))
        assert pipeline.verify(config.parent / "run").remaining == ()
    assert endings[0] == endings[1] == endings[2]
    assert curves[0] == curves[1] == curves[2]
    stages = len(commits[0]) // 3
    assert commits == [[1] * 3 * stages, [1] * 3 * stages, [3] * stages]


def test_killed_at_every_step_of_a_commit_it_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """A slot that the journal says is on the disk would be half overwritten."""
    expected = one_stage(tmp_path / "unbroken", **ON_DISK)
    pipeline.run(pipeline.load_config(expected))
    prepared = one_stage(tmp_path / "prepared")
    with pytest.raises(Killed):
        pipeline.run(pipeline.load_config(prepared), sink=lambda event: kill_if(isinstance(event, IterationDone)))
    assert [record["type"] for record in journal(prepared.parent / "run")] == ["begun", "stage_prepared"]
    write, append = StageArray.write_chunk, pipeline.rundir.Journal.append
    # canvas, m and v of four chunks and a record, for three iterations, and the same for the last one
    for number, committed in ((1, []), (8, []), (13, []), (14, [3]), (21, [3]), (26, [3]), (27, [3, 1])):
        config = tmp_path / str(number) / "config.yaml"
        shutil.copytree(prepared.parent, config.parent)
        calls = itertools.count(1)

        def step(call: Any, calls: Any = calls, last: int = number) -> Any:
            def stepped(array: Any, *arguments: Any) -> Any:
                if getattr(array, "memory", None) is None:
                    kill_if(next(calls) == last)
                return call(array, *arguments)

            return stepped

        with monkeypatch.context() as patch:
            patch.setattr(StageArray, "write_chunk", step(write))
            patch.setattr(pipeline.rundir.Journal, "append", step(append))
            with pytest.raises(Killed):
                pipeline.run(pipeline.load_config(config))
        assert batches(config) == committed, number
        assert pipeline.verify(config.parent / "run").remaining == ()
        pipeline.run(pipeline.load_config(config))
        assert ending(config) == ending(expected), number
        assert measured(config) == measured(expected), number


def kill_if(condition: bool) -> None:
    if condition:
        raise Killed


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_a_stop_commits_what_is_done(tmp_path, iterations):
    """Ctrl-C would cost up to the interval."""
    expected = one_stage(tmp_path / "unbroken", **ON_DISK)
    pipeline.run(pipeline.load_config(expected))
    config = one_stage(tmp_path / "stopped")
    run_until(config, lambda event: isinstance(event, IterationDone) and event.iteration == iterations - 1)
    assert sum(batches(config)) == iterations
    assert pipeline.status(config.parent / "run")["iteration"] == iterations
    assert pipeline.verify(config.parent / "run").remaining == ()
    pipeline.run(pipeline.load_config(config, ["store.commit_interval=0"] if iterations == 2 else []))
    assert ending(config) == ending(expected)
    assert measured(config) == measured(expected)


def test_a_bit_that_flips_in_memory_is_not_committed(tmp_path, monkeypatch):
    """It would be given a checksum, and pass for what was computed."""
    config = one_stage(tmp_path)
    made: list[HostMemory] = []
    create = HostMemory.__init__

    def recorded(memory: HostMemory, *arguments: Any) -> None:
        create(memory, *arguments)
        made.append(memory)

    def flip(event: object) -> None:
        if isinstance(event, IterationDone) and event.iteration == 3:  # v_0 is the third of the newest slot
            made[2].get(1, 0)[5, 7, 1] += 1

    monkeypatch.setattr(HostMemory, "__init__", recorded)
    with pytest.raises(pipeline.errors.DamagedStateError, match=r"v_0: chunk \(1, 0\) has changed in memory"):
        pipeline.run(pipeline.load_config(config), sink=flip)
    assert batches(config) == [3]
    assert pipeline.verify(config.parent / "run").remaining == ()


def test_memory_that_is_not_there_leaves_the_stage_on_the_disk(tmp_path, monkeypatch):
    """Another program took it since the plan: smaller tiles would change the last bits, and an error end the run."""
    expected, config = one_stage(tmp_path / "unbroken", **ON_DISK), one_stage(tmp_path / "short")
    pipeline.run(pipeline.load_config(expected))

    def refuse(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(HostMemory, "__init__", refuse)
    notes: list[str] = []
    pipeline.run(pipeline.load_config(config), sink=lambda event: notes.append(getattr(event, "message", "")))
    assert sum("no longer stay" in note for note in notes) == 1
    assert not any(record["type"] == "smaller_tile" for record in journal(config.parent / "run"))
    assert (batches(config), ending(config)) == ([1] * 4, ending(expected))
