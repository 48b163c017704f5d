"""The compact state: arrays on disk, the update pass, the resulting image and resuming."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline
from pipeline import store
from pipeline.config.output_sections import ExportConfig
from pipeline.core.tiling import Rect, grid
from pipeline.render import adam
from pipeline.render.update import UpdateResult, UpdateSpec, update_specs, update_task
from pipeline.rundir.journal import Journal
from pipeline.rundir.open import newest_canvas
from pipeline.rundir.position import position_of
from pipeline.store import metadata
from pipeline.store.encodings import BFLOAT16, FIXED16, RoundingBytes
from tests.support.e2e import canvases, journal, read_picture, results, write_picture, write_run
from tests.support.inputs import write_image

COMPACT = {"state_dtype": "compact", "chunk_px": 32}
STEP = adam.AdamStep(beta1=0.9, beta2=0.99, epsilon=1e-6, size=0.8, clip=True)
AVERAGING = replace(STEP, average_weight=0.3)
NAMES = ("gradient", "canvas_0", "m_0", "v_0", "average_0")
FORMS = ("bfloat16", "fixed16", "bfloat16", "bfloat16", "fixed16")


# --- arrays ---


def create(stage: Path, name: str, form: str, shape=(70, 45, 3), chunk_px: int = 16, codec: str = "none"):
    store.create_array(stage, name, shape, chunk_px, form, codec)
    return store.open_array(stage, name)


def whole(array) -> Rect:
    return Rect(0, array.shape[0], 0, array.shape[1])


@pytest.fixture
def stage(tmp_path) -> Path:
    metadata.create_store(tmp_path / "store.zarr")
    store.create_stage(tmp_path / "store.zarr" / "stage_0")
    return tmp_path / "store.zarr" / "stage_0"


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("form", ["fixed16", "bfloat16"])
def test_windows_are_values_and_chunks_are_16_bits(stage, form, codec):
    """Reads must decode: codes used as pixels would be noise."""
    array = create(stage, "a", form, codec=codec)
    values = np.random.default_rng(0).uniform(0, 255, array.shape).astype(np.float32)
    sums = array.write_window(whole(array), values)
    checked = store.open_array(stage, "a", array.packed(sums))
    result = checked.read_window(whole(array))
    assert result.dtype == np.float32
    assert np.abs(result - values).max() <= (0.5 if form == "bfloat16" else 0.002)
    part = Rect(7, 50, 3, 41)
    assert np.array_equal(checked.read_window(part), result[7:50, 3:41])
    chunk = np.empty(array.chunk_shape, np.uint16)
    checked.read_chunk(4, 2, chunk)
    assert not chunk[6:].any() and not chunk[:, 13:].any()  # beyond the border: zeros
    assert array.rounded(float(values[0, 0, 0])) == result[0, 0, 0]


def test_an_array_says_itself_what_its_numbers_mean(stage):
    """`export` and other programs open a store without its config."""
    array = create(stage, "canvas_0", "fixed16")
    array.write_window(whole(array), np.full(array.shape, 128, np.float32))
    other = zarr.open_array(stage / "canvas_0", mode="r")
    assert other.dtype == np.uint16 and other.attrs["encoding"] == "fixed16"
    assert (other[...] == 128 * 257).all()


def test_an_encoding_of_a_later_version_is_refused(stage):
    """An unknown encoding must be refused: its codes would be read as pixels."""
    create(stage, "canvas_0", "fixed16")
    path = stage / "canvas_0" / "zarr.json"
    path.write_text(path.read_text().replace("fixed16", "fixed24"))
    with pytest.raises(store.ChunkError, match="cannot be read"):
        store.open_array(stage, "canvas_0")


# --- the update pass ---


def fill(stage: Path, chunk_px: int, shape=(70, 45, 3)) -> dict[str, str]:
    """Fill a stage's state with random values; returns the checksums."""
    rng = np.random.default_rng(1)
    values = {
        "gradient": rng.normal(0, 0.01, shape),
        "canvas_0": rng.uniform(0, 255, shape),
        "m_0": rng.normal(0, 0.01, shape),
        "v_0": rng.uniform(1e-6, 1e-4, shape),
        "average_0": rng.uniform(0, 255, shape),
    }
    sums = {}
    for name, form in zip(NAMES, FORMS, strict=True):
        array = create(stage, name, form, shape, chunk_px)
        sums[name] = array.packed(array.write_window(whole(array), values[name].astype(np.float32)))
        if name != "gradient":
            create(stage, name.replace("0", "1"), form, shape, chunk_px)
    return sums


def update_all(stage: Path, sums: dict[str, str], rounding: tuple[int, int, int]) -> list[UpdateResult]:
    """The update pass over a canvas whose gradient has been written."""
    gradient = store.open_array(stage, "gradient", sums["gradient"])
    specs = update_specs(UpdateSpec(stage, 0, AVERAGING, sums, rounding), grid(*gradient.shape[:2], gradient.chunk_px))
    written = ({chunk: gradient.checksums[chunk] for chunk in spec.chunks} for spec in specs)
    return [update_task(replace(spec, gradient_sums=sums)) for spec, sums in zip(specs, written, strict=True)]


def chunk_files(stage: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    files = [path for name in names for path in sorted((stage / name / "c").rglob("*")) if path.is_file()]
    return {str(path.relative_to(stage)): path.read_bytes() for path in files}


WRITTEN = ("canvas_1", "m_1", "v_1", "average_1")


@pytest.mark.parametrize("chunk_px", [16, 48, 208])
def test_a_compact_update_is_the_formulas_on_what_is_stored(stage, chunk_px):
    """Processing by blocks must give the same values and use the same random bytes."""
    sums = fill(stage, chunk_px, (250, 225, 3) if chunk_px == 208 else (70, 45, 3))  # 208: a chunk of two blocks
    arrays = [store.open_array(stage, name) for name in NAMES]
    made = update_all(stage, sums, (7, 2, 5))
    largest = total = 0.0
    for cy, cx in arrays[0].chunk_indices():
        values = []
        for array in arrays:
            codes = np.empty(array.chunk_shape, np.uint16)
            array.read_chunk(cy, cx, codes)
            values.append(np.empty(array.chunk_shape, np.float32))
            array.encoding.decode(codes, values[-1])
        gradient, canvas, m, v, average = values
        abs_u = adam.update(gradient, canvas, m, v, np.empty_like(canvas), AVERAGING)
        adam.move_average(average, canvas, np.empty_like(canvas), 0.3)
        random = RoundingBytes(7, 2, 5, (cy, cx)).take(canvas.shape)
        expected = [np.empty(canvas.shape, np.uint16) for _ in range(4)]
        FIXED16.encode_stochastic(canvas, random, expected[0], np.empty(canvas.shape, np.uint32))
        BFLOAT16.encode(m, expected[1])
        BFLOAT16.encode_stochastic(v, random, expected[2], np.empty(canvas.shape, np.uint32))
        FIXED16.encode_stochastic(average, random, expected[3], np.empty(canvas.shape, np.uint32))
        for name, codes in zip(WRITTEN, expected, strict=True):
            result = np.empty(codes.shape, np.uint16)
            store.open_array(stage, name).read_chunk(cy, cx, result)
            assert np.array_equal(result, codes), name
        inside = abs_u[arrays[0].valid_part(cy, cx)]
        whole = np.rint(inside * adam.SUM_SCALE)  # summed in any order to the same number
        largest, total = max(largest, inside.max()), total + whole.sum(dtype=np.float64) / adam.SUM_SCALE
    assert max(result.max_abs_u for result in made) == largest
    assert sum(sum(result.sums_abs_u) for result in made) == pytest.approx(total, rel=1e-12)


def test_a_task_that_runs_twice_writes_the_same_bytes_and_another_iteration_others(stage):
    """Any task may run again after a crash, and must write the same bytes."""
    sums = fill(stage, 16)
    written = []
    for rounding in ((7, 2, 5), (7, 2, 5), (7, 2, 6), (7, 3, 5), (8, 2, 5)):
        results = update_all(stage, sums, rounding)
        written.append((chunk_files(stage, WRITTEN), [result.sums for result in results]))
    assert written[0] == written[1]
    for other in written[2:]:
        changed = {name.split("/")[0] for name, data in other[0].items() if written[0][0][name] != data}
        assert changed == {"canvas_1", "v_1", "average_1"}  # m is rounded to nearest


# --- runs ---


def read_canvas(work_dir: Path, stage: int) -> np.ndarray:
    canvas = newest_canvas(work_dir, position_of(Journal(work_dir / "journal.jsonl").read()), stage)
    return canvas.read_window(Rect(0, canvas.shape[0], 0, canvas.shape[1]))


def last_iteration(folder: Path, state: str, **optimizer) -> tuple[dict, np.ndarray]:
    keys = {"store": {"state_dtype": state}, "initial_size": 128, "optimizer": optimizer}
    config = write_run(folder / state, (128, 96), **keys)
    pipeline.run(pipeline.load_config(config))
    records = [record for record in journal(config.with_name("run")) if record["type"] == "iteration"]
    return records[-1], read_canvas(config.with_name("run"), 0)


def test_a_compact_run_ends_like_a_float_one(tmp_path):
    """The compact state must give as good a result as float32."""
    float_, compact = (last_iteration(tmp_path, state, max_iterations=40)[0] for state in ("float", "compact"))
    for name in ("objective", "mean_abs_u", "alpha"):
        assert compact[name] == pytest.approx(float_[name], rel=0.03), name


def test_a_compact_run_begins_like_a_float_one(tmp_path):
    """After a few iterations, before small differences grow, the canvases must be close."""
    canvases = [last_iteration(tmp_path, state, max_iterations=3)[1] for state in ("float", "compact")]
    difference = np.abs(canvases[0] - canvases[1])
    assert 0 < np.median(difference) < 0.4  # of steps of 12.8
    assert difference.mean() < 1


def test_a_16_bit_export_is_the_canvas_itself(tmp_path):
    """A code of the canvas is a level of a 16-bit file."""
    config = write_run(tmp_path, store=COMPACT, output="out.tif", export={"bits": 16}, initial_size=80)
    picture = read_picture(pipeline.run(pipeline.load_config(config)))
    canvas = zarr.open_array(tmp_path / "run" / "store.zarr" / "stage_0" / "canvas_0", mode="r")
    assert np.array_equal(picture, canvas[...])
    again = pipeline.export(tmp_path / "run", tmp_path / "again.png", options=ExportConfig(bits=8))
    assert np.array_equal(read_picture(again), np.rint(picture / 257).astype(np.uint8))


@pytest.mark.parametrize("keys", [{}, {"loss": {"style_weight": 0}}, {"compute": {"tile_px": 32}}])
def test_a_compact_picture_in_its_own_style_is_left_as_it_is(tmp_path, keys):
    """The rounding of the content's features must not be treated as a difference to optimise."""
    content = write_image(tmp_path / "content.png", 70, 52, seed=1)
    config = write_run(tmp_path, store=COMPACT, styles=[{"image": "content.png"}], initial_size=80, **keys)
    write_image(tmp_path / "content.png", 70, 52, seed=1)
    pipeline.run(pipeline.load_config(config))
    ended = [record["reason"] for record in journal(tmp_path / "run") if record["type"] == "stage_done"]
    assert ended == ["converged"]
    assert np.array_equal(read_canvas(tmp_path / "run", 0), content)


@settings(max_examples=5)
@given(st.integers(0, 3))
def test_noise_start_and_first_step_keep_their_promise(tmp_path_factory, seed):
    """target_pixel_change is the largest change in the first step, from the gradient as stored."""
    folder = tmp_path_factory.mktemp("first")
    keys = {"init": "noise", "seed": seed, "initial_size": 80, "compute": {"tile_px": 32}}
    config = write_run(
        folder,
        store=COMPACT,
        optimizer={"max_iterations": 1, "target_pixel_change": 12.8, "color_space": "rgb"},
        **keys,
    )
    before = []

    def keep_first(_event) -> None:
        if not before and (folder / "run" / "journal.jsonl").read_text().count('"stage_prepared"'):
            before.append(read_canvas(folder / "run", 0))

    pipeline.run(pipeline.load_config(config), sink=keep_first)
    moved = np.abs(read_canvas(folder / "run", 0) - before[0])
    (record,) = [record for record in journal(folder / "run") if record["type"] == "iteration"]
    assert record["alpha"] * record["max_abs_u"] == pytest.approx(12.8, rel=1e-5)  # b of the first step is 1
    assert 10 < moved.max() <= 12.8 + 1 / 257  # less if clipped


def test_tiles_do_not_change_a_compact_run(tmp_path):
    """Tile sizes may differ after a resume on another machine, so the rounding depends on chunks only."""
    runs = []
    for tile_px in (32, 64):
        # without maxima: rounding decides between equal ones
        keys = {"network": {"name": "random", "padding": "replicate", "pooling": "average"}}
        compute = {"tile_px": tile_px, "dtype": "float32"}
        config = write_run(tmp_path / str(tile_px), store=COMPACT, compute=compute, **keys)
        pipeline.run(pipeline.load_config(config))
        runs.append(read_canvas(config.with_name("run"), 0))
    assert np.abs(runs[0] - runs[1]).mean() < 0.02  # only the float32 sums of other tiles differ


# --- killed ---


def write_two_stages(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write_picture(folder / "second.png", 64, 75, seed=3)
    keys = {"initial_size": 64, "optimizer": {"max_iterations": 3}, "compute": {"tile_px": 64}}
    return write_run(folder, (128, 96), (70, 60), store=COMPACT, output="out.tif", **keys)


def test_a_compact_run_killed_in_both_slots_ends_with_the_same_bits(nursery, tmp_path):
    """A resumed run must round stochastically in the same way, in every pass, slot and stage."""
    unbroken = write_two_stages(tmp_path / "unbroken")
    child = nursery.run("run", "-c", unbroken, "--log-format", "json")
    assert child.wait() == 0, child.err
    moments = [event for event in child.events() if event["event"] in ("WorkDone", "IterationDone")]
    broken, kills, rng = write_two_stages(tmp_path / "broken"), set(), np.random.default_rng(0)
    for attempt in range(14):
        child = nursery.start("run", "-c", broken, "--log-format", "json")
        child.wait_until(lambda events, number=attempt: len(events) > 1 + number)
        time.sleep(rng.uniform(0, 0.02))
        if child.kill() != 0:
            done = [record for record in journal(broken.with_name("run")) if record["type"] == "iteration"]
            kills.add((len(done) > 3, len(done) % 2))
    last = nursery.run("run", "-c", broken)
    assert last.wait() == 0, last.err
    assert len(moments) > 14 and {slot for _, slot in kills} == {0, 1}
    assert results(broken.with_name("run")) == results(unbroken.with_name("run"))
    assert canvases(broken.with_name("run")) == canvases(unbroken.with_name("run"))
    assert broken.with_name("out.tif").read_bytes() == unbroken.with_name("out.tif").read_bytes()
