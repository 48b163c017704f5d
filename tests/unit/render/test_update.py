"""The update pass on a float state: by blocks of rows and from file to file, it is Adam's step on the whole canvas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import store
from pipeline.core.tiling import Rect, grid
from pipeline.plan.processes import BLOCK_VALUES
from pipeline.render import adam
from pipeline.render.update import UpdateSpec, update_specs, update_task
from pipeline.store.layout import GRADIENT, slot_names

STEP = adam.AdamStep(0.9, 0.99, 1e-6, 0.5, clip=True)
READ, WRITTEN = (GRADIENT, *slot_names(0)), slot_names(1)
CHUNK_PX = 272  # three blocks, the last one smaller
SHAPE = (500, 300, 3)  # in both directions the last chunk has pixels that are nobody's


def fill(stage: Path, dtype: str, codec: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A stage with a random state; gives its values and its checksums."""
    rng = np.random.default_rng(2)
    values = {
        GRADIENT: rng.normal(0, 0.01, SHAPE).astype(dtype),
        "canvas_0": rng.uniform(0, 255, SHAPE).astype(dtype),
        "m_0": rng.normal(0, 0.01, SHAPE).astype(dtype),
        "v_0": rng.uniform(1e-6, 1e-4, SHAPE).astype(dtype),
    }
    store.create_stage(stage)
    for name in (*READ, *WRITTEN):
        store.create_array(stage, name, SHAPE, CHUNK_PX, dtype, codec)
    sums = {}
    for name in READ:
        array = store.open_array(stage, name)
        sums[name] = array.packed(array.write_window(Rect(0, SHAPE[0], 0, SHAPE[1]), values[name]))
    return values, sums


def specs_of(stage: Path, sums: Mapping[str, str]) -> list[UpdateSpec]:
    """The tasks of a canvas whose gradient is written."""
    specs = update_specs(UpdateSpec(stage, 0, STEP, sums, (0, 0, 0)), grid(*SHAPE[:2], 2 * CHUNK_PX))
    written = store.open_array(stage, "gradient", sums["gradient"]).checksums
    return [replace(spec, gradient_sums={chunk: written[chunk] for chunk in spec.chunks}) for spec in specs]


@pytest.mark.parametrize(("dtype", "codec"), [("float32", "none"), ("float64", "none"), ("float32", "zstd")])
def test_block_by_block_it_is_the_step_of_the_whole_canvas(tmp_path, dtype, codec):
    """A row that is skipped or done twice would go on as a seam; other bits would be another picture on a resume."""
    assert 2 * BLOCK_VALUES < CHUNK_PX**2 * 3 < 3 * BLOCK_VALUES
    values, sums = fill(tmp_path / "stage_0", dtype, codec)
    results = [update_task(spec) for spec in specs_of(tmp_path / "stage_0", sums)]
    gradient, canvas, m, v = (values[name].copy() for name in READ)
    abs_u = adam.update(gradient, canvas, m, v, np.empty_like(canvas), STEP)
    for name, wanted in zip(WRITTEN, (canvas, m, v), strict=True):
        written = {index: value for result in results for index, value in result.sums[name].items()}
        packed = store.open_array(tmp_path / "stage_0", name).packed(written)
        found = store.open_array(tmp_path / "stage_0", name, packed)  # checks what it reads
        assert np.array_equal(found.read_window(Rect(0, SHAPE[0], 0, SHAPE[1])), wanted), name
    assert max(result.max_abs_u for result in results) == abs_u.max()
    total = sum(sum(result.sums_abs_u) for result in results)
    assert total == np.rint(abs_u * np.float64(2**24)).sum() / 2**24  # whatever the blocks: no sum of them is rounded
    assert total == pytest.approx(abs_u.sum(dtype=np.float64), rel=1e-9)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_damaged_chunk_is_told_of_whatever_block_it_is_in(tmp_path, name, codec):
    """The blocks before it are written by then: they must never be committed."""
    values, sums = fill(tmp_path / "stage_0", "float32", codec)
    array = store.open_array(tmp_path / "stage_0", name)
    damaged = values[name].copy()
    damaged[-1, -1] += 1  # in the last chunk, in its last block that holds pixels
    array.write_window(Rect(0, SHAPE[0], 0, SHAPE[1]), damaged)
    (spec,) = specs_of(tmp_path / "stage_0", sums)
    with pytest.raises(store.ChunkError, match=f"{name}/c/1/1/0: is not what was written"):
        update_task(spec)
