"""Adam's moments carried from stage to stage (optimizer.carry): values, resume, damage, and what is refused."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import pipeline
from pipeline import images, load_config
from pipeline.core.errors import ConfigError, Stopped
from pipeline.core.events import IterationDone
from pipeline.core.tiling import Rect
from pipeline.rundir.journal import Journal
from pipeline.rundir.open import newest_canvas, newest_moments
from pipeline.rundir.position import position_of
from tests.support.inputs import write_config, write_image
from tests.support.stages import each_record, literal_stage, make_problem, read_whole

FLOAT64 = {"compute": {"dtype": "float64", "device": "cpu", "tile_px": 32}, "store": {"chunk_px": 32}}
COMPACT = {"compute": {"device": "cpu", "tile_px": 32}, "store": {"chunk_px": 32, "state_dtype": "compact"}}
CARRY = {"optimizer": {"max_iterations": 3, "carry": True}, "initial_size": 48}


def write_run(folder: Path, weights: Path, **values) -> Path:
    folder.mkdir(exist_ok=True)
    write_image(folder / "content.png", 61, 96, seed=1)
    write_image(folder / "style.png", 40, 44, seed=2)
    return write_config(folder, network={"weights": str(weights)}, **values)


def position(config):
    return position_of(Journal(config.work_dir / "journal.jsonl").read())


def stop_after(config, iterations: int) -> None:
    """Run until this many iterations of this call are done."""
    stop, left = threading.Event(), iter(range(iterations - 1))
    sink = lambda event: stop.set() if isinstance(event, IterationDone) and next(left, None) is None else None  # noqa: E731
    with pytest.raises(Stopped):
        pipeline.run(config, stop=stop, sink=sink)


def files(config) -> dict[str, bytes]:
    """The chunks of the store, and the output image."""
    paths = [path for path in (config.work_dir / "store.zarr").rglob("c/*/*/*") if path.is_file()]
    return {str(path.relative_to(config.work_dir)): path.read_bytes() for path in paths} | {
        "output": config.output.read_bytes()
    }


def bilinear(values: np.ndarray, height: int, width: int) -> np.ndarray:
    for axis, target in ((0, height), (1, width)):
        source = values.shape[axis]
        at = (np.arange(target) + 0.5) * source / target - 0.5  # np.interp repeats the ends
        values = np.apply_along_axis(lambda line: np.interp(at, np.arange(source), line), axis, values)  # noqa: B023
    return values


def test_the_next_stage_continues_where_the_optimizer_was(tmp_path, narrow_weights):
    """Moments of another size or place, or a bias correction of a fresh start, would distort the first steps.

    The second stage is computed by the literal algorithm on the whole image, from what the first has left on disk.
    """
    config = load_config(write_run(tmp_path, narrow_weights, **CARRY, **FLOAT64))
    pipeline.run(config)
    at = position(config)
    first, second = (read_whole(newest_canvas(config.work_dir, at, stage)) for stage in (0, 1))
    m, v = (read_whole(array) for array in newest_moments(config.work_dir, at, 0))
    assert np.abs(m).max() > 0 and v.min() >= 0 and m.shape == v.shape == first.shape
    size, whole = first.shape[:2], (0, 61, 0, 96)
    window = images.source_window(whole, size, (61, 96))
    start, moment = (images.resize_window(values, window, size, (61, 96), whole) for values in (first, m))

    records = each_record(Journal(config.work_dir / "journal.jsonl").read())
    prepared = [record for record in records if record["type"] == "stage_prepared"]
    alpha = next(record["alpha"] for record in records if record["type"] == "iteration")
    assert [(record["alpha"], record["adam_steps"], record["carries"]) for record in prepared] == [
        (None, 0, True), (alpha, 3, False),
    ]  # fmt: skip
    content, style = (
        images.stream_rgb(tmp_path / name, *px, px[1])
        for name, px in (("content.png", (96, 61)), ("style.png", (44, 40)))
    )
    pixels = [next(iter(bands))[1].astype(np.float64) for bands in (content, style)]
    problem = make_problem(config, pixels[0], pixels[1:], load_file(narrow_weights))
    carried = moment, bilinear(v, 61, 96), 3, alpha
    expected, measured = literal_stage(problem, np.clip(start, 0, 255), config.optimizer, carried)
    last = [record for record in records if record["type"] == "iteration" and record["stage"] == 1]
    for record, losses in zip(last, measured, strict=True):
        assert {key: record[key] for key in losses} == pytest.approx(losses, rel=1e-8)
    assert np.abs(second - expected).max() < 1e-6
    fresh, _ = literal_stage(problem, np.clip(start, 0, 255), config.optimizer)
    assert np.abs(second - fresh).max() > 1


@pytest.mark.parametrize("state", [FLOAT64, COMPACT])
def test_stopped_anywhere_it_ends_with_the_same_bytes(tmp_path, narrow_weights, state):
    """A resume that starts a stage afresh, or counts Adam's steps anew, would show in the picture."""
    values = {**CARRY, "stage_ratio": 1.4, **state}
    configs = [load_config(write_run(tmp_path / name, narrow_weights, **values)) for name in ("whole", "stopped")]
    pipeline.run(configs[0])
    for iterations in (1, 2, 1, 3):  # in a stage, at the end of one, and after it
        stop_after(configs[1], iterations)
        assert pipeline.verify(configs[1].work_dir).clean
    pipeline.run(configs[1])
    assert files(configs[0]) == files(configs[1])
    assert {path.name[0] for path in (configs[1].work_dir / "store.zarr" / "stage_0").glob("*_?")} == {"c", "m", "v"}
    report = pipeline.verify(configs[1].work_dir)
    assert report.clean and not report.leftovers


@pytest.mark.parametrize(("iterations", "damaged"), [(3, "stage_0/m_1"), (4, "stage_1/content"), (4, "stage_0/v_1")])
def test_damaged_moments_are_found_and_repaired(tmp_path, narrow_weights, iterations, damaged):
    """A flipped bit of m would be enlarged into every later stage, and a rollback needs the moments again."""
    configs = [
        load_config(write_run(tmp_path / name, narrow_weights, **CARRY, **FLOAT64)) for name in ("whole", "damaged")
    ]
    pipeline.run(configs[0])
    stop_after(configs[1], iterations)
    chunk = configs[1].work_dir / "store.zarr" / damaged / "c" / "0" / "0" / "0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    assert not pipeline.verify(configs[1].work_dir).clean
    pipeline.verify(configs[1].work_dir, repair=True)
    pipeline.run(configs[1])
    assert configs[0].output.read_bytes() == configs[1].output.read_bytes()


def test_a_stage_of_its_own_settings_may_start_afresh(tmp_path, narrow_weights):
    """What a stage continues is its own setting; arrays that no stage continues would fill the disk."""
    stages = [{"up_to": 70, "optimizer": {"carry": False}}]
    config = load_config(write_run(tmp_path, narrow_weights, **CARRY, stage_ratio=1.4, stages=stages, **FLOAT64))
    assert [stage.carries for stage in pipeline.plan(config).stages] == [False, True, False]


def test_a_crop_of_carried_stages_is_refused(tmp_path, narrow_weights):
    """It would show a picture that the run does not make."""
    config = load_config(write_run(tmp_path, narrow_weights, **CARRY, **FLOAT64))
    with pytest.raises(ConfigError, match=r"--crop.*: .* optimizer\.carry"):
        pipeline.crop(config, pipeline.CropSpec(Rect(0, 16, 0, 16)))
