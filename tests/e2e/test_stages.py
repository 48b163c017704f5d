"""The artist's controls: settings per stage, sizes of the styles, and the initial canvas."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import pipeline
from pipeline import images, load_config
from pipeline.commands.status import status
from pipeline.config.config import Config, result_fields
from pipeline.core.cancel import NEVER
from pipeline.core.errors import ConfigError, InputError, Stopped
from pipeline.core.events import IterationDone
from pipeline.rundir.journal import Journal
from pipeline.rundir.open import newest_canvas
from pipeline.rundir.position import position_of
from tests.support.configs import problems
from tests.support.inputs import write_config, write_image
from tests.support.plans import headers, planned, sizes_of
from tests.support.stages import each_record, literal_stage, make_problem, read_whole

EXACT = {"compute": {"dtype": "float64", "device": "cpu", "tile_px": 32}, "store": {"chunk_px": 32}}


def run_to_end(config) -> tuple[list[np.ndarray], list[dict]]:
    """Run a config to its end; returns the canvas of every stage and the records of the journal."""
    pipeline.run(config)
    records = Journal(config.work_dir / "journal.jsonl").read()
    position = position_of(records)
    canvases = [read_whole(newest_canvas(config.work_dir, position, stage)) for stage in sorted(position.slots)]
    return canvases, each_record(records)


def stop_after_an_iteration(config) -> None:
    stop = threading.Event()
    pipeline.run(config, stop=stop, sink=lambda event: stop.set() if isinstance(event, IterationDone) else None)


def enlarged(canvas: np.ndarray, height: int, width: int) -> np.ndarray:
    size = canvas.shape[:2]
    whole = (0, height, 0, width)
    window = images.source_window(whole, size, (height, width))
    y0, y1, x0, x1 = window
    return np.clip(images.resize_window(canvas[y0:y1, x0:x1], window, size, (height, width), whole), 0, 255)


# --- per stage ---


def test_a_stage_has_the_styles_layers_weights_and_iterations_that_it_was_given(tmp_path, narrow_weights):
    """Artists combine textures of several paintings at several scales: a stage would silently use the base settings.

    The expected canvas is computed by the literal algorithm on the whole image.
    """
    content = write_image(tmp_path / "content.png", 61, 96, seed=1).astype(np.float64)
    write_image(tmp_path / "style.png", 40, 44, seed=2)
    other = write_image(tmp_path / "other.png", 40, 37, seed=3).astype(np.float64)
    last = {
        "up_to": 96,
        "styles": [{"image": "other.png"}],
        "network": {"content_layers": {"conv3_1": 2.0}},
        "loss": {"content_weight": 0.3},
        "optimizer": {"max_iterations": 3, "schedule": "constant"},
    }
    config = load_config(
        write_config(
            tmp_path,
            initial_size=48,
            stages=[{"up_to": 48, "optimizer": {"max_iterations": 2}}, last],
            network={"weights": str(narrow_weights)},
            loss={"kind": "gatys", "style_weight": 2.0},
            optimizer={"target_pixel_change": 5.0},
            **EXACT,
        )
    )
    (first, second), records = run_to_end(config)
    resolved = config.for_stage(96)
    assert (resolved.loss.kind, resolved.loss.style_weight, resolved.loss.content_weight) == ("gatys", 2.0, 0.3)
    assert resolved.optimizer.stop_condition == 0.1  # the default depends on the schedule, which this stage overrides
    problem = make_problem(resolved, content, [other], load_file(narrow_weights))
    expected, measured = literal_stage(problem, enlarged(first, 61, 96), resolved.optimizer)
    iterations = [record for record in records if record["type"] == "iteration"]
    assert [record["stage"] for record in iterations] == [0, 0, 1, 1, 1]
    for record, losses in zip(iterations[2:], measured, strict=True):
        assert {key: record[key] for key in losses} == pytest.approx(losses, rel=1e-8)
    assert np.abs(second - expected).max() < 1e-6
    assert [stage["max_iterations"] for stage in status(config.work_dir)["stages"]] == [2, 3]


ALL_KEYS = {
    "initial_size": 48,
    "stage_ratio": 1.5,
    "stage_smoothing": True,
    "style_stages": False,
    "dequantize": True,
    "seed": 5,
    "optimizer": {"max_iterations": 2},
    **EXACT,
}


def test_all_keys_of_the_stages_together_are_the_algorithm_and_resume(tmp_path, narrow_weights):
    """A key that one part of the program overlooks would change the picture, or only that of a run that was stopped.

    The last canvas is computed by the literal algorithm on the whole image, from the canvas of the stage before.
    """
    network = {"weights": str(narrow_weights)}
    for folder in (tmp_path / "whole", tmp_path / "stopped"):
        folder.mkdir()
        content = write_image(folder / "content.png", 61, 96, seed=1).astype(np.float64)
        write_image(folder / "style.png", 110, 120, seed=2)
    config = load_config(write_config(tmp_path / "whole", network=network, **ALL_KEYS))
    whole, records = run_to_end(config)
    assert [canvas.shape[1] for canvas in whole] == [48, 72, 96]  # none for the style of 120 px
    ((_, style),) = images.stream_rgb(tmp_path / "whole" / "style.png", 96, 88, 88, NEVER)
    problem = make_problem(config, content, [style.astype(np.float64)], load_file(narrow_weights))
    expected, measured = literal_stage(problem, enlarged(images.smoothed(whole[1]), 61, 96), config.optimizer)
    last = [record for record in records if record["type"] == "iteration" and record["stage"] == 2]
    for record, losses in zip(last, measured, strict=True):
        assert {key: record[key] for key in losses} == pytest.approx(losses, rel=1e-8)
    assert np.abs(whole[2] - expected).max() < 1e-6

    config = load_config(write_config(tmp_path / "stopped", network=network, **ALL_KEYS))
    for _ in range(4):
        with pytest.raises(Stopped):
            stop_after_an_iteration(config)
    for unbroken_canvas, resumed_canvas in zip(whole, run_to_end(config)[0], strict=True):
        assert np.array_equal(unbroken_canvas, resumed_canvas)


def test_a_run_with_settings_per_stage_resumes_after_a_stop(tmp_path, narrow_weights):
    """A resume with the base settings instead of the stage's would render the rest of the run differently."""
    values = {
        "initial_size": 48,
        "network": {"weights": str(narrow_weights)},
        "optimizer": {"max_iterations": 2},
        "stages": [{"up_to": 48, "loss": {"style_weight": 3.0}}, {"up_to": 64, "styles": [{"image": "other.png"}]}],
        **EXACT,
    }
    for folder in (tmp_path / "whole", tmp_path / "stopped"):
        folder.mkdir()
        write_image(folder / "content.png", 50, 64, seed=1)
        write_image(folder / "style.png", 40, 40, seed=2)
        write_image(folder / "other.png", 30, 40, seed=3)
    whole, _ = run_to_end(load_config(write_config(tmp_path / "whole", **values)))
    config = load_config(write_config(tmp_path / "stopped", **values))
    for _ in range(3):
        with pytest.raises(Stopped):
            stop_after_an_iteration(config)
    resumed, _ = run_to_end(config)
    for unbroken_canvas, resumed_canvas in zip(whole, resumed, strict=True):
        assert np.array_equal(unbroken_canvas, resumed_canvas)
    report = pipeline.verify(config.work_dir)
    assert report.clean and not report.leftovers


def test_changing_a_stage_of_a_run_is_refused(tmp_path, make_config):
    """The run would mix two textures: a resume needs the same settings and the same content of the files."""
    config = make_config(initial_size=48, stages=[{"up_to": 64, "styles": [{"image": "other.png"}]}])
    write_image(tmp_path / "other.png", 40, 40, seed=3)
    pipeline.run(config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"max_iterations": 1})}))
    again = load_config(tmp_path / "config.yaml", ["optimizer.max_iterations=1", "stages.0.loss={style_weight: 3}"])
    with pytest.raises(ConfigError, match=r"stages\.0\.loss\.style_weight: was 1.0, is 3"):
        pipeline.run(again)
    write_image(tmp_path / "other.png", 40, 40, seed=4)
    with pytest.raises(ConfigError, match=r"stages\.0\.styles\.0\.image: the content of the file has changed"):
        pipeline.run(load_config(tmp_path / "config.yaml", ["optimizer.max_iterations=1"]))


def test_keys_added_later_are_no_change_while_they_have_their_defaults(make_config):
    """A run that was started before a key existed could no longer resume."""
    fields = result_fields(make_config())
    assert not [key for key in fields if key.startswith("stages") or key.endswith(("scale", "max_size"))]
    scaled = result_fields(make_config(styles=[{"image": "style.png", "scale": 0.5}]))
    assert scaled["styles.0.scale"] == 0.5


def test_settings_of_a_stage_survive_the_manifest(make_config):
    """After a resume, a key that a stage leaves to the base settings would count as set by the stage."""
    config = make_config(
        loss={"content_weight": 0.7, "kind": "gatys"}, stages=[{"up_to": 64, "loss": {"style_weight": 3}}]
    )
    again = type(config).model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again.for_stage(64).loss == config.for_stage(64).loss
    assert (again.for_stage(64).loss.content_weight, again.for_stage(64).loss.kind) == (0.7, "gatys")
    assert again.for_stage(65) is again


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [{up_to: 64}, {up_to: 64}]", "stages.1.up_to: 64 is not above that of the previous entry (64)"),
        ("stages: [{up_to: 64, styles: []}]", "stages.0.styles: expected a list with at least one entry"),
        ("stages: [{up_to: 64, loss: {style_wieght: 1}}]", "stages.0.loss.style_wieght: unknown key"),
        ("stages: [{up_to: 64, loss: {style_weight: -1}}]", "stages.0.loss.style_weight: expected a number >= 0"),
        (
            "stages: [{up_to: 64, network: {pooling: max}}]",
            "stages.0.network.pooling: unknown key; allowed: content",
        ),
        ("stages: [{loss: {style_weight: 1}}]", "stages.0.up_to: missing"),
        ("size: [64, 64]", "size: [width, height] is for textures"),
        ("init: gray\nloss: {content_weight: 0}", "init: without a content loss every pixel of a gray canvas"),
    ],
)
def test_invalid_stages_and_initial_canvases_are_refused(tmp_path, text, message):
    """An error in the entry of a late stage would show after hours of work."""
    path = tmp_path / "c.yaml"
    path.write_text(f"content: a.tif\nstyles: [{{image: s.jpg}}]\noutput: r.tif\n{text}\n")
    (line,) = problems(path)
    assert message in line


def test_an_entry_for_no_stage_is_refused():
    """It would be ignored silently, and the artist would not see why nothing changes."""
    with pytest.raises(ConfigError, match=r"stages\.1: applies to canvases of 513 to 900 px, and this run has none"):
        planned((1000, 800), stages=[{"up_to": 512}, {"up_to": 900}, {"up_to": 2000}])


def test_the_plan_uses_the_settings_of_every_stage():
    """Time, memory and disk would be planned for other iterations and layers than those of the stage."""
    values = {"memory": {"limit": "64GiB"}, "compute": {"tile_px": 512, "device": "cpu"}}
    plain = planned((1000, 800), **values)
    layers = {"content_layers": {"conv1_1": 1.0}, "style_layers": {"conv2_1": 1.0}}
    first, last = planned(
        (1000, 800), stages=[{"up_to": 512, "network": layers, "optimizer": {"max_iterations": 7}}], **values
    ).stages
    assert (first.max_iterations, last.max_iterations) == (7, 60)
    assert last == plain.stages[1]
    assert first.flop_per_iteration < plain.stages[0].flop_per_iteration
    # 64 channels at every pixel instead of 512 at every 64th
    assert first.store_bytes - plain.stages[0].store_bytes == 512 * 512 * 4 * (64 - 8)


# --- size of a style ---


def test_a_style_may_stay_small():
    """A style that stays small gives stronger detail (Fig. 8) and must not add stages."""
    assert [styles[0] for _, styles in sizes_of((1024, 1024), [(2000, 1000)], 256, None)] == [
        (256, 128),
        (512, 256),
        (1024, 512),
        (2000, 1000),
    ]
    capped = sizes_of((1024, 1024), [(2000, 1000)], 256, None, [{"max_size": 400}])
    assert [styles[0] for _, styles in capped] == [(256, 128), (400, 200), (400, 200)]
    scaled = sizes_of((1024, 1024), [(1000, 500)], 256, None, [{"scale": 0.5}])
    assert [styles[0] for _, styles in scaled] == [(128, 64), (256, 128), (512, 256)]


def test_a_large_style_adds_no_stages_unless_asked_to():
    """A photograph of 100 megapixels as the style of a small canvas would add hours at the full size."""
    stages = sizes_of((300, 240), [(5000, 4000)], 128, None, [{"scale": 2.0}], style_stages=False)
    assert [(max(canvas), max(styles[0])) for canvas, styles in stages] == [(128, 256), (256, 512), (300, 600)]
    small = sizes_of((100, 80), [(1000, 700)], 512, None, style_stages=False)
    assert small == [((100, 80), ((100, 70),))]
    assert sizes_of((512, 512), [(1000, 500)], 256, None) != sizes_of(
        (512, 512), [(1000, 500)], 256, None, style_stages=False
    )


def test_a_style_may_be_larger_than_the_canvas_but_is_never_upsampled():
    """Upsampling adds no detail to a style: stages for it would cost hours for nothing."""
    doubled = sizes_of((512, 512), [(1000, 500)], 256, None, [{"scale": 2.0}])
    assert [(canvas, styles[0]) for canvas, styles in doubled] == [((256, 256), (512, 256)), ((512, 512), (1000, 500))]


def test_a_style_too_small_for_the_network_is_refused_before_the_run():
    """It would fail at the stage that needs it, hours later."""
    with pytest.raises(InputError, match=r"style image /s0.png: at stage 1 it is 20×16 px, but the deepest layer"):
        network = {"padding": "reflect"}
        planned((1000, 800), styles=[{"image": "/s0.png", "max_size": 20}], style_sizes=[(700, 900)], network=network)


# --- starting point ---


def assert_content_is_reconstructed(folder: Path, start: np.ndarray, **keys: Any) -> Config:
    """Two iterations of the content loss alone, from `start`, are those of the literal algorithm; gives the config."""
    content = write_image(folder / "content.png", 48, 61, seed=1).astype(np.float64)
    config = load_config(
        write_config(folder, styles=[], loss={"style_weight": 0.0}, optimizer={"max_iterations": 2}, **EXACT, **keys)
    )
    (canvas,), _ = run_to_end(config)
    problem = make_problem(config, content, [], load_file(Path(keys["network"]["weights"])))
    expected, _ = literal_stage(problem, start, config.optimizer)
    assert np.abs(canvas - expected).max() < 1e-6
    return config


def test_a_run_may_start_from_an_image(tmp_path, narrow_weights):
    """Artists start from a sketch or another program's result; a resume after a change of it would mix two images."""
    start = write_image(tmp_path / "start.png", 48, 61, seed=5).astype(np.float64)
    network = {"weights": str(narrow_weights)}
    config = assert_content_is_reconstructed(tmp_path, start, init="start.png", network=network)
    write_image(tmp_path / "start.png", 48, 61, seed=6)
    with pytest.raises(ConfigError, match="init: the content of the file has changed"):
        pipeline.run(config)
    write_image(tmp_path / "start.png", 61, 48, seed=6)
    with pytest.raises(InputError, match=r"has 48×61 px, .* the canvas's \(61×48 px\), so it would be distorted"):
        pipeline.plan(config)


def test_a_gray_start_is_mid_gray_everywhere(tmp_path, narrow_weights):
    """Content reconstruction as in Gatys would be meaningless if the initial canvas held anything of the content."""
    # max pooling: among equal neighbours, rounding would decide which is the largest
    network = {"weights": str(narrow_weights), "pooling": "average"}
    assert_content_is_reconstructed(tmp_path, np.full((48, 61, 3), 127.5), init="gray", network=network)


def test_a_texture_needs_no_content(tmp_path, narrow_weights):
    """Texture synthesis (Gatys 2015) would need a content image, or depend on the tiles."""
    style = write_image(tmp_path / "style.png", 50, 60, seed=2).astype(np.float64)
    config = load_config(
        write_config(
            tmp_path,
            content=None,
            size=[90, 60],
            initial_size=90,
            network={"weights": str(narrow_weights)},
            loss={"content_weight": 0.0},
            optimizer={"max_iterations": 2},
            **EXACT,
        )
    )
    assert config.init == "noise"
    (canvas,), records = run_to_end(config)
    assert canvas.shape == (60, 90, 3)
    start = np.zeros((60, 90, 3))
    for cy, cx in np.ndindex(2, 3):
        chunk = start[cy * 32 : cy * 32 + 32, cx * 32 : cx * 32 + 32]
        chunk[...] = np.random.default_rng([0, cy, cx]).uniform(0, 255, chunk.shape)
    expected, _ = literal_stage(
        make_problem(config, start, [style], load_file(narrow_weights)), start, config.optimizer
    )
    assert np.abs(canvas - expected).max() < 1e-6
    assert "content" not in records[1]["checksums"]
    assert pipeline.verify(config.work_dir).clean
    assert load_config(write_config(tmp_path, content=None, size=64, loss={"content_weight": 0.0})).size == 64


def test_a_texture_is_planned_without_content():
    """`plan` would ask for a content image, or plan for another size than the run has."""
    values = {"content": None, "loss": {"content_weight": 0}, "memory": {"limit": "64GiB"}}
    wide = planned(None, size=(1000, 300), **values)
    assert [stage.size for stage in wide.stages] == [(154, 512), (300, 1000)]
    assert planned(None, size=600, **values).stages[-1].size == (600, 600)
    assert list(headers(None, [(7, 9)])) == [Path("/s0.png")]
