"""Averaging of iterates: the result of a stage is the mean of its canvases, and the optimiser is unaffected."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline
from pipeline import images
from pipeline.core.events import IterationDone
from pipeline.core.tiling import Rect
from pipeline.render import adam
from pipeline.rundir.journal import Journal
from pipeline.rundir.open import newest_canvas
from pipeline.rundir.position import position_of
from pipeline.store.array import open_array
from tests.support.e2e import canvases, journal, read_picture, results, write_run

# Two stages of one and of four tiles.
TWO_STAGES: dict[str, Any] = {"output": "out.tif", "initial_size": 64, "compute": {"tile_px": 64}}
STATES = ("float", "compact")


# --- the formula ---


def literal_ema(iterates: list[np.ndarray], decay: float) -> np.ndarray:
    """The exponential moving average of style-transfer-pytorch (its class EMA), starting at its first update."""
    value, accumulated = np.zeros_like(iterates[0]), 1.0
    for iterate in iterates:
        accumulated *= decay
        value = decay * value + (1 - decay) * iterate
    return value / (1 - accumulated)


def our_average(iterates: list[np.ndarray], decay: float, before: float = np.nan) -> np.ndarray:
    average = np.full_like(iterates[0], before)
    for number, iterate in enumerate(iterates):
        weight = adam.average_weight(decay, number)
        adam.move_average(average, iterate, np.empty_like(iterate), weight)
    return average


@pytest.mark.parametrize("decay", [1e-9, 0.5, 0.95, 0.9999])
def test_it_is_the_debiased_moving_average_of_style_transfer_pytorch(decay):
    """With another weighting, the decay that users know from that tool would give a smoother or noisier image."""
    iterates = list(np.random.default_rng(0).uniform(0, 255, (40, 30)))
    assert np.abs(our_average(iterates, decay) - literal_ema(iterates, decay)).max() < 1e-9


levels = st.sampled_from([0.0, 255.0, 254.99998, 1e-30, 128.3]) | st.floats(0, 255, width=32)


@given(st.lists(levels, min_size=1, max_size=12), st.floats(1e-12, 0.9999))
def test_it_never_leaves_the_range_of_pixel_values(values, decay):
    """The compact state can hold 0..255 only: a value rounded beyond would end a run of days."""
    average = our_average([np.full(8, value, np.float32) for value in values], decay)
    assert average.dtype == np.float32
    assert (average >= 0).all() and (average <= 255).all()


# --- runs ---


def rendered(folder: Path, **keys: Any) -> Path:
    """The folder of a finished run of two stages."""
    config = write_run(folder, (128, 96), (70, 60), **TWO_STAGES, **keys)
    pipeline.run(pipeline.load_config(config))
    return folder


def result_of(folder: Path, stage: int) -> np.ndarray:
    canvas = newest_canvas(folder / "run", position_of(Journal(folder / "run" / "journal.jsonl").read()), stage)
    return whole(canvas)


def whole(array) -> np.ndarray:
    return array.read_window(Rect(0, array.shape[0], 0, array.shape[1]))


def after_iteration(event: object, stage: int) -> bool:
    return isinstance(event, IterationDone) and event.stage == stage


@pytest.mark.parametrize("state", STATES)
def test_a_stages_result_is_the_average_and_the_next_stage_starts_from_it(tmp_path, state):
    """Otherwise the last canvas would be exported or upsampled, with the noise that averaging removes."""
    keys = {"store": {"state_dtype": state, "chunk_px": 32}, "optimizer": {"max_iterations": 5, "average": 0.8}}
    config = write_run(tmp_path, (128, 96), (70, 60), **TWO_STAGES, **keys)
    iterates: list[np.ndarray] = []
    starts: list[np.ndarray] = []

    def watch(event: object) -> None:
        stages = [tmp_path / "run" / "store.zarr" / f"stage_{index}" for index in range(2)]
        if after_iteration(event, 0):
            iterates.append(whole(open_array(stages[0], f"canvas_{(event.iteration + 1) % 2}")))
        if not starts and stages[1].exists():
            starts.append(whole(open_array(stages[1], "canvas_0")))
            assert np.array_equal(whole(open_array(stages[1], "average_0")), starts[0])

    pipeline.run(pipeline.load_config(config), sink=watch)
    first, last = (result_of(tmp_path, stage) for stage in (0, 1))
    tolerance = 1e-4 if state == "float" else 3 / 257  # five stochastic roundings, each by less than one step
    assert len(iterates) == 5
    assert np.abs(first - literal_ema(iterates, 0.8)).max() < tolerance
    assert np.abs(first - iterates[-1]).mean() > 0.1  # not the last canvas
    whole_rect = (0, 96, 0, 128)
    window = images.source_window(whole_rect, first.shape[:2], (96, 128))
    enlarged = images.resize_window(first, window, first.shape[:2], (96, 128), whole_rect)
    assert np.abs(starts[0] - np.clip(enlarged, 0, 255)).max() <= (0 if state == "float" else 1 / 257)
    assert np.array_equal(read_picture(tmp_path / "out.tif"), np.rint(last).astype(np.uint8))
    assert {path.name for path in (tmp_path / "run" / "store.zarr").glob("stage_*/*_?")} == {"average_1"}


@pytest.mark.parametrize("state", STATES)
def test_the_optimiser_continues_from_the_canvas_and_not_from_the_average(tmp_path, state):
    """Steps from the average would be another optimiser, with moments of other points."""
    store = {"state_dtype": state, "chunk_px": 32}
    runs = [
        rendered(tmp_path / str(average), store=store, optimizer={"max_iterations": 4, "average": average})
        for average in (0.0, 0.9)
    ]
    plain, averaged = ([record for record in results(run / "run") if record.get("stage") == 0] for run in runs)
    for without, with_average in zip(plain, averaged, strict=True):
        if without["type"] == "iteration":
            sums, more_sums = without["checksums"], with_average["checksums"]
            assert {name: more_sums[name] for name in sums} == sums and len(more_sums) == len(sums) + 1
            assert {**without, "checksums": {}} == {**with_average, "checksums": {}}
    assert not [path for path in (tmp_path / "0.0" / "run").rglob("average*")]


def test_a_stage_without_an_iteration_results_in_its_initial_canvas(tmp_path):
    """An image in its own style converges before the first iteration: an average of zeros would be a black image."""
    keys = {"styles": [{"image": "content.png"}], "initial_size": 80, "optimizer": {"average": 0.9}}
    config = write_run(tmp_path, store={"state_dtype": "compact", "chunk_px": 32}, **keys)
    pipeline.run(pipeline.load_config(config))
    assert [record["reason"] for record in journal(tmp_path / "run") if record["type"] == "stage_done"] == ["converged"]
    assert np.array_equal(read_picture(tmp_path / "out.png"), read_picture(tmp_path / "content.png"))


def test_an_export_while_it_runs_is_the_average_too(tmp_path):
    """A preview of a running stage would be noisier than its result, and users would stop or change the run."""
    config = write_run(tmp_path, initial_size=80, optimizer={"max_iterations": 4, "average": 0.9})
    averages = []

    def sink(event: object) -> None:
        if after_iteration(event, 0) and event.iteration == 2:
            pipeline.export(tmp_path / "run", tmp_path / "half.png")
            averages.append(result_of(tmp_path, 0))

    pipeline.run(pipeline.load_config(config), sink=sink)
    assert np.array_equal(read_picture(tmp_path / "half.png"), np.rint(averages[0]).astype(np.uint8))
    assert not np.array_equal(read_picture(tmp_path / "half.png"), read_picture(tmp_path / "out.png"))


# --- resume ---


@pytest.mark.parametrize("state", STATES)
def test_killed_in_both_slots_the_resumed_run_ends_with_the_same_bytes(nursery, tmp_path, state):
    """The average accumulates over a stage: a canvas that a resume adds twice, or not at all, would stay in it."""
    keys = {"store": {"state_dtype": state, "chunk_px": 32}, "optimizer": {"max_iterations": 3, "average": 0.7}}
    configs = [write_run(tmp_path / name, (128, 96), (70, 60), **TWO_STAGES, **keys) for name in ("unbroken", "broken")]
    child = nursery.run("run", "-c", configs[0], "--log-format", "json")
    assert child.wait() == 0, child.err
    kills, rng = set(), np.random.default_rng(0)
    for attempt in range(14):
        child = nursery.start("run", "-c", configs[1], "--log-format", "json")
        child.wait_until(lambda events, number=attempt: len(events) > 1 + number)
        time.sleep(rng.uniform(0, 0.02))
        if child.kill() != 0:
            done = [record for record in journal(configs[1].with_name("run")) if record["type"] == "iteration"]
            kills.add((len(done) > 3, len(done) % 2))
    last = nursery.run("run", "-c", configs[1])
    assert last.wait() == 0, last.err
    assert {slot for _, slot in kills} == {0, 1}
    assert results(configs[1].with_name("run")) == results(configs[0].with_name("run"))
    assert canvases(configs[1].with_name("run")) == canvases(configs[0].with_name("run"))
    assert configs[1].with_name("out.tif").read_bytes() == configs[0].with_name("out.tif").read_bytes()


def test_a_resume_with_another_decay_is_refused_and_none_is_what_older_runs_did(tmp_path, call):
    """A resume would mix two averages; and runs that are older than this key could not resume."""
    config = write_run(tmp_path, optimizer={"max_iterations": 2, "average": 0.9})
    assert call("run", "-c", config).code == 0
    refused = call("run", "-c", config, "--set", "optimizer.average=0.8")
    assert refused.code == 3 and "optimizer.average: was 0.9, is 0.8" in refused.err
    plain = pipeline.load_config(config, ["optimizer.average=0"])
    assert "optimizer.average" not in pipeline.config.config.result_fields(plain)


def test_the_plan_counts_the_average(tmp_path):
    """The run would end after days, when it needs disk or memory that the plan has not counted."""
    config = write_run(tmp_path, store={"state_dtype": "compact", "chunk_px": 32})
    plain, averaged = (pipeline.plan(pipeline.load_config(config, [f"optimizer.average={d}"])) for d in (0, 0.9))
    chunks = math.ceil(70 / 32) * math.ceil(52 / 32)
    for before, after in zip(plain.stages[-1:], averaged.stages[-1:], strict=True):
        assert after.store_chunks == before.store_chunks + 2 * chunks
        assert after.store_bytes == before.store_bytes + 2 * chunks * 32 * 32 * 3 * 2
    assert averaged.host_bytes["update pass"] > plain.host_bytes["update pass"]


@pytest.mark.parametrize("average", [1, 1.5, -0.1])
def test_a_decay_out_of_range_is_refused(tmp_path, call, average):
    """At 1 the average would never move, and its debiasing would divide by zero."""
    config = write_run(tmp_path, optimizer={"average": average})
    outcome = call("plan", "-c", config)
    assert outcome.code == 3 and "optimizer.average" in outcome.err
