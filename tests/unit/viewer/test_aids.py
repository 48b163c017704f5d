"""The files that a run writes for viewers: no run and no check depends on them, and the page shows them."""

from __future__ import annotations

import json
import shutil
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import pyvips

import pipeline
from pipeline.core.errors import ConfigError
from pipeline.core.events import IterationDone
from pipeline.core.image_formats import PixelKind
from pipeline.images.tile_codec import encode_tile
from pipeline.rundir import stage_path
from pipeline.store import TILE_LOSSES, Overview, OverviewChunk, overview_path
from pipeline.viewer.canvas import Canvas, Recent
from pipeline.viewer.inputs import Inputs, inputs_of_run
from pipeline.viewer.maps import chunk_map
from pipeline.viewer.pictures import NoPictureError, Pictures, TileAddress, canvas_of
from pipeline.viewer.snapshot import RunReader
from tests.support.e2e import canvases, journal, results, run_until, write_picture, write_run
from tests.support.pictures import write


@pytest.fixture(scope="module")
def half_like_the_style(tmp_path_factory) -> Path:
    """The config of a finished run whose content is the style itself on the left, and something else on the right."""
    folder = tmp_path_factory.mktemp("half")
    loss = {"tv_weight": 1.0, "content_weight": 0.5}
    compute = {"device": "cpu", "tile_px": 64}
    config = write_run(
        folder, (256, 128), (256, 128), initial_size=256, loss=loss, compute=compute, optimizer={"max_iterations": 1}
    )
    style, other = (pixels_of(folder / name) for name in ("style.png", "content.png"))
    write(folder / "content.png", np.concatenate([style[:, :128], 255 - other[:, 128:] // 2], axis=1))
    pipeline.run(pipeline.load_config(config))
    return config


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(pyvips.Image.new_from_file(str(path)).numpy())


def test_losses_of_the_tiles_say_where_the_style_is_missing(half_like_the_style) -> None:
    run = half_like_the_style.parent / "run"
    style = np.array(chunk_map(RunReader(run), "style")["values"])
    assert style.shape == (2, 4)
    assert style[:, 2:].min() > 2 * style[:, :2].max()
    record = next(one for one in reversed(journal(run)) if one["type"] == "iteration")
    whole = 0.5 * record["content_loss"] + record["style_loss"] + record["layer_losses"]["variation"]
    losses = chunk_map(RunReader(run), "losses")
    assert np.mean(losses["values"]) == pytest.approx(whole)  # all tiles are equally large
    assert (losses["iteration"], losses["cell_px"]) == (1, 64)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"iteration": 1, "tile_px": 0, "terms": {}}',
        b'{"iteration": 1, "tile_px": 64, "terms": {"style": [1]}}',
    ],
)
def test_a_strangers_losses_are_refused_in_a_sentence(half_like_the_style, tmp_path, data: bytes) -> None:
    run = shutil.copytree(half_like_the_style.parent / "run", tmp_path / "run")
    (stage_path(run, 0) / TILE_LOSSES).write_bytes(data)
    with pytest.raises(NoPictureError, match=TILE_LOSSES):
        chunk_map(RunReader(run), "style")


def test_coarse_levels_come_from_the_overview(half_like_the_style, tmp_path) -> None:
    """Without its chunks the canvas has no pixels at 100 %, but the same picture at 1/8."""
    run = shutil.copytree(half_like_the_style.parent / "run", tmp_path / "run")
    reader = RunReader(run)
    array = canvas_of(reader, reader.latest(), 0)
    whole = Canvas(array, Recent(2**20, attrgetter("nbytes")))
    overview_path(array).rename(tmp_path / "aside")
    read = [whole.tile(level, 0, 0) for level in range(6)]
    (tmp_path / "aside").rename(overview_path(array))
    shutil.rmtree(array.path / "c")
    written = Canvas(array, Recent(2**20, attrgetter("nbytes")))
    for level, pixels in enumerate(read):
        assert np.abs(written.tile(level, 0, 0).astype(int) - pixels).max() <= 1  # one is rounded twice


def test_no_run_and_no_check_depends_on_them(tmp_path) -> None:
    """A disk that refuses them, or a hand that deletes them, must not cost a day's work."""
    configs = [write_run(tmp_path / name, optimizer={"max_iterations": 3}) for name in ("a", "b")]
    pipeline.run(pipeline.load_config(configs[0]))
    run_until(configs[1], lambda event: isinstance(event, IterationDone) and (event.stage, event.iteration) == (1, 0))
    run = tmp_path / "b" / "run"
    aids = [stage_path(run, 1) / name for name in ("canvas_0.overview", f"{TILE_LOSSES}.partial")]
    for path in aids:
        path.unlink(missing_ok=True)
        path.mkdir()
    pipeline.run(pipeline.load_config(configs[1]))
    assert canvases(run) == canvases(tmp_path / "a" / "run")
    assert results(run) == results(tmp_path / "a" / "run")
    for path in aids:
        shutil.rmtree(path, ignore_errors=True)
    for path in run.glob("store.zarr/stage_*/canvas_*.overview"):
        path.write_bytes(b"torn")
    report = pipeline.verify(run)
    assert (report.found, report.leftovers) == ((), ())


def test_transparent_parts_are_transparent(tmp_path) -> None:
    """A canvas with alpha is shown as it is exported, and so is its content."""
    config = write_run(tmp_path, content_kind=PixelKind(8, alpha=True))
    pipeline.run(pipeline.load_config(config))
    reader = RunReader(tmp_path / "run")
    inputs = Inputs(pipeline.load_config(config).limits, lambda: None)
    try:
        snapshot = reader.latest()
        assert snapshot.manifest is not None
        pictures = Pictures(reader, inputs)
        inputs.want(inputs_of_run(snapshot.manifest))
        while not all(one.pixels for one in inputs.all()):
            assert not any(one.problem for one in inputs.all())
        for identity, file in (("stage_1", "out.png"), ("content", "content.png")):
            entry = next(one for one in pictures.listing(snapshot) if one["id"] == identity)
            assert entry["format"] == "webp"
            expected = pixels_of(tmp_path / file)
            top = (max(expected.shape[:2]) - 1).bit_length()
            tile = pictures.tile(TileAddress(identity, entry["version"], top, 0, 0, "webp"))
            shown = np.asarray(pyvips.Image.new_from_buffer(tile, "").numpy()).astype(int)
            assert shown.shape == expected.shape
            assert np.abs(shown[..., 3] - expected[..., 3]).max() <= 1
            opaque = expected[..., 3] > 250
            reference = pyvips.Image.new_from_buffer(encode_tile(expected, "webp"), "").numpy()
            assert np.abs(shown - reference)[opaque].mean() < 3
    finally:
        inputs.close()


def test_page_of_a_preview_has_every_image_and_its_config(tmp_path) -> None:
    """What is chosen on the page must render what was seen there."""
    config = write_run(tmp_path / "job")
    write_picture(tmp_path / "job" / "other style.png", 40, 40, seed=5)
    vary = ["loss.style_weight=0.5,2", f"styles.0.image={tmp_path}/job/style.png,{tmp_path}/job/other style.png"]
    overrides = ["optimizer.max_iterations=1"]
    preview = pipeline.preview(config, pipeline.GridSpec(vary, overrides, 48, page=tmp_path / "grid"))
    data = json.loads((tmp_path / "grid" / "grid.json").read_text())
    assert (len(data["pictures"]), data["across"]) == (4, 2)
    assert (tmp_path / "grid" / "assets" / "grid.js").is_file()
    for entry, rendered in zip(data["pictures"], preview.pictures, strict=True):
        assert entry["settings"] == list(rendered.settings)
        assert (tmp_path / "grid" / entry["picture"]).read_bytes() == rendered.picture.read_bytes()
        chosen = tmp_path / "job" / "chosen.yaml"
        chosen.write_text(entry["config"])
        expected = pipeline.load_config(config, [*overrides, *rendered.settings])
        assert pipeline.load_config(chosen) == expected
    with pytest.raises(ConfigError, match="exists"):
        pipeline.preview(config, pipeline.GridSpec(vary, overrides, 48, page=tmp_path / "grid"))


def test_a_stage_in_memory_leaves_its_overview_too(tmp_path) -> None:
    """Otherwise the first look at a large canvas reads all of it."""
    config = write_run(tmp_path, (150, 100), store={"commit_interval": 30.0})
    pipeline.run(pipeline.load_config(config))
    reader = RunReader(tmp_path / "run")
    array = canvas_of(reader, reader.latest(), reader.latest().position.stage)
    for chunk, seen in Overview(array).chunks(array.chunk_indices()):
        made = OverviewChunk(array, chunk)
        made.add(array.read_window(array.rect.intersection(array.chunk_rect(*chunk))))
        assert np.array_equal(seen, made.pixels())
