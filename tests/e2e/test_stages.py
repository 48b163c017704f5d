"""What differs from stage to stage, how large styles are, and what a run starts from: the artist's controls."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import pipeline
from pipeline import images, load_config
from pipeline.commands.status import status
from pipeline.config.config import result_fields
from pipeline.core.errors import ConfigError, InputError, Stopped
from pipeline.core.events import IterationDone
from pipeline.rundir.journal import Journal
from pipeline.rundir.open import newest_canvas
from pipeline.rundir.position import position_of
from pipeline.rundir.records import as_json
from tests.support.configs import problems
from tests.support.inputs import write_config, write_image
from tests.support.plans import headers, planned, sizes_of
from tests.support.stages import literal_stage, make_problem, read_whole

EXACT = {"compute": {"dtype": "float64", "device": "cpu", "tile_px": 32}, "store": {"chunk_px": 32}}


def ended(config) -> tuple[list[np.ndarray], list[dict]]:
    """Every stage's canvas after a run, and the journal."""
    pipeline.run(config)
    records = Journal(config.work_dir / "journal.jsonl").read()
    position = position_of(records)
    canvases = [read_whole(newest_canvas(config.work_dir, position, stage)) for stage in sorted(position.slots)]
    return canvases, [as_json(record) for record in records]


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
    """The paper's tool for artists: another painting's texture at another scale. The full size, here the last stage,
    has settings of its own; computed once more by the algorithm's own loop on the whole image."""
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
    (first, second), records = ended(config)
    resolved = config.for_stage(96)
    assert (resolved.loss.kind, resolved.loss.style_weight, resolved.loss.content_weight) == ("gatys", 2.0, 0.3)
    assert resolved.optimizer.stop_condition == 0.1  # it follows the schedule, which is another one here
    problem = make_problem(resolved, content, [other], load_file(narrow_weights))
    wanted, measured = literal_stage(problem, enlarged(first, 61, 96), resolved.optimizer)
    made = [record for record in records if record["type"] == "iteration"]
    assert [record["stage"] for record in made] == [0, 0, 1, 1, 1]
    for found, expected in zip(made[2:], measured, strict=True):
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-8)
    assert np.abs(second - wanted).max() < 1e-6
    assert [stage["max_iterations"] for stage in status(config.work_dir)["stages"]] == [2, 3]


def test_a_run_with_stages_goes_on_after_a_stop(tmp_path, narrow_weights):
    """A resume that took the base settings for those of a stage would paint the rest of the picture otherwise."""
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
    whole, _ = ended(load_config(write_config(tmp_path / "whole", **values)))
    config = load_config(write_config(tmp_path / "stopped", **values))
    for _ in range(3):
        with pytest.raises(Stopped):
            stop_after_an_iteration(config)
    parts, _ = ended(config)
    for one, other in zip(whole, parts, strict=True):
        assert np.array_equal(one, other)
    found = pipeline.verify(config.work_dir)
    assert found.clean and not found.leftovers


def test_changing_a_stage_of_a_run_is_refused(tmp_path, make_config):
    """Half a picture with one texture and half with another, unless the file's content is what it was."""
    config = make_config(initial_size=48, stages=[{"up_to": 64, "styles": [{"image": "other.png"}]}])
    write_image(tmp_path / "other.png", 40, 40, seed=3)
    pipeline.run(config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"max_iterations": 1})}))
    again = load_config(tmp_path / "config.yaml", ["optimizer.max_iterations=1", "stages.0.loss={style_weight: 3}"])
    with pytest.raises(ConfigError, match=r"stages\.0\.loss\.style_weight: was 1.0, is 3"):
        pipeline.run(again)
    write_image(tmp_path / "other.png", 40, 40, seed=4)
    with pytest.raises(ConfigError, match=r"stages\.0\.styles\.0\.image: the content of the file has changed"):
        pipeline.run(load_config(tmp_path / "config.yaml", ["optimizer.max_iterations=1"]))


def test_keys_that_came_later_are_no_change_while_they_have_their_defaults(make_config):
    """A run that was begun before there was such a key has to go on."""
    fields = result_fields(make_config())
    assert not [key for key in fields if key.startswith("stages") or key.endswith(("scale", "max_size"))]
    scaled = result_fields(make_config(styles=[{"image": "style.png", "scale": 0.5}]))
    assert scaled["styles.0.scale"] == 0.5


def test_settings_of_a_stage_survive_being_written_down(make_config):
    """The manifest keeps the config: what a stage does not say must not come back as if it had."""
    config = make_config(
        loss={"content_weight": 0.7, "kind": "gatys"}, stages=[{"up_to": 64, "loss": {"style_weight": 3}}]
    )
    again = type(config).model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again.for_stage(64).loss == config.for_stage(64).loss
    assert (again.for_stage(64).loss.content_weight, again.for_stage(64).loss.kind) == (0.7, "gatys")
    assert again.for_stage(65) is again


@pytest.mark.parametrize(
    ("text", "said"),
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
def test_wrong_stages_and_starts(tmp_path, text, said):
    """Said before the run, at the key that is wrong: a stage is hours of work."""
    path = tmp_path / "c.yaml"
    path.write_text(f"content: a.tif\nstyles: [{{image: s.jpg}}]\noutput: r.tif\n{text}\n")
    (line,) = problems(path)
    assert said in line


def test_an_entry_for_no_stage_is_refused():
    """It would be passed over in silence, and the artist would wonder why nothing changes."""
    with pytest.raises(ConfigError, match=r"stages\.1: applies to canvases of 513 to 900 px, and this run has none"):
        planned((1000, 800), stages=[{"up_to": 512}, {"up_to": 900}, {"up_to": 2000}])


def test_the_plan_counts_every_stage_by_itself():
    """Iterations, layers and styles of a stage are its own: so are its work, its halo and its disk."""
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
    """A style that stays small gives stronger detail (Fig. 8), and adds no stages."""
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


def test_a_style_may_be_larger_than_the_canvas_but_not_than_itself():
    """Enlarging a style invents nothing; a full style from the beginning needs no more stages for it."""
    doubled = sizes_of((512, 512), [(1000, 500)], 256, None, [{"scale": 2.0}])
    assert [(canvas, styles[0]) for canvas, styles in doubled] == [((256, 256), (512, 256)), ((512, 512), (1000, 500))]


def test_a_style_too_small_for_the_network_is_refused_before_the_run():
    """At the stage where it would fail, which may be the second."""
    with pytest.raises(InputError, match=r"style image /s0.png: at stage 0 it is 20×16 px, but the deepest layer"):
        network = {"padding": "reflect"}
        planned((1000, 800), styles=[{"image": "/s0.png", "max_size": 20}], style_sizes=[(700, 900)], network=network)


# --- starting point ---


def test_a_run_may_start_from_a_picture(tmp_path, narrow_weights):
    """A sketch, or the result of another program, instead of the content; its pixels count for a resume."""
    content = write_image(tmp_path / "content.png", 48, 61, seed=1).astype(np.float64)
    start = write_image(tmp_path / "start.png", 48, 61, seed=5).astype(np.float64)
    config = load_config(
        write_config(
            tmp_path,
            styles=[],
            init="start.png",
            network={"weights": str(narrow_weights)},
            loss={"style_weight": 0.0},
            optimizer={"max_iterations": 2},
            **EXACT,
        )
    )
    (canvas,), _ = ended(config)
    problem = make_problem(config, content, [], load_file(narrow_weights))
    wanted, _ = literal_stage(problem, start, config.optimizer)
    assert np.abs(canvas - wanted).max() < 1e-6
    write_image(tmp_path / "start.png", 48, 61, seed=6)
    with pytest.raises(ConfigError, match="init: the content of the file has changed"):
        pipeline.run(config)
    write_image(tmp_path / "start.png", 61, 48, seed=6)
    with pytest.raises(InputError, match=r"has 48×61 px, .* the canvas's \(61×48 px\), so it would be distorted"):
        pipeline.plan(config)


def test_gray_is_the_middle_everywhere(tmp_path, narrow_weights):
    """Content reconstruction as Gatys shows it: nothing of the content is in the canvas that it begins with."""
    content = write_image(tmp_path / "content.png", 48, 61, seed=1).astype(np.float64)
    config = load_config(
        write_config(
            tmp_path,
            styles=[],
            init="gray",
            # where all neighbours are alike, rounding decides which is the largest
            network={"weights": str(narrow_weights), "pooling": "average"},
            loss={"style_weight": 0.0},
            optimizer={"max_iterations": 2},
            **EXACT,
        )
    )
    (canvas,), _ = ended(config)
    problem = make_problem(config, content, [], load_file(narrow_weights))
    wanted, _ = literal_stage(problem, np.full_like(content, 127.5), config.optimizer)
    assert np.abs(canvas - wanted).max() < 1e-6


def test_a_texture_needs_no_content(tmp_path, narrow_weights):
    """Texture synthesis (Gatys 2015): a picture of any shape in the style alone, exact over tiles."""
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
    (canvas,), records = ended(config)
    assert canvas.shape == (60, 90, 3)
    start = np.zeros((60, 90, 3))
    for cy, cx in np.ndindex(2, 3):
        part = start[cy * 32 : cy * 32 + 32, cx * 32 : cx * 32 + 32]
        part[...] = np.random.default_rng([0, cy, cx]).uniform(0, 255, part.shape)
    wanted, _ = literal_stage(make_problem(config, start, [style], load_file(narrow_weights)), start, config.optimizer)
    assert np.abs(canvas - wanted).max() < 1e-6
    assert "content" not in records[1]["checksums"]
    assert pipeline.verify(config.work_dir).clean
    assert load_config(write_config(tmp_path, content=None, size=64, loss={"content_weight": 0.0})).size == 64


def test_a_texture_is_planned_without_content():
    """Square, or of the shape that was asked for; no image but the style is looked at."""
    values = {"content": None, "loss": {"content_weight": 0}, "memory": {"limit": "64GiB"}}
    wide = planned(None, size=(1000, 300), **values)
    assert [stage.size for stage in wide.stages] == [(154, 512), (300, 1000)]
    assert planned(None, size=600, **values).stages[-1].size == (600, 600)
    assert list(headers(None, [(7, 9)])) == [Path("/s0.png")]
