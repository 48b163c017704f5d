"""Previews: the grid of variations, the contact sheet, resuming, and what is never overwritten."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import pyvips
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import GridSpec, load_config, plan, preview, run
from pipeline.commands.preview.at_size import at_size
from pipeline.commands.preview.grid import Grid
from pipeline.commands.preview.sweep import MAX_VARIATIONS, load_variations
from pipeline.config.config import Config, input_files
from pipeline.core.cancel import NEVER
from pipeline.core.errors import ConfigError, Stopped
from pipeline.core.events import Note, PictureDone
from pipeline.images.sheet import ContactSheet, Row, SheetImage, shortened
from pipeline.plan import resolve_device
from pipeline.plan.checks import check_overrides
from pipeline.plan.sizes import long_sides, stage_sizes
from pipeline.rundir.lock import RunLock
from pipeline.rundir.manifest import read_manifest
from tests.support.e2e import (
    canvases,
    journal,
    read_picture,
    results,
    run_pipeline,
    write_picture,
    write_run,
)

CONTENT_PX = (130, 100)


@pytest.fixture
def config(tmp_path) -> Path:
    """A run of stages of 48, 96 and 130 px."""
    return write_run(tmp_path, CONTENT_PX, optimizer={"max_iterations": 1})


def test_a_preview_says_nothing_of_cleaning(config, call):
    """The runs of a preview are reused; advice to delete the state of each would bury the lines of its images."""
    outcome = call("preview", "-c", config, "--size", "48")
    assert outcome.code == 0 and "pipeline clean" not in outcome.err, outcome


@pytest.mark.quick
def test_the_sheet_names_every_set(config, tmp_path):
    """A sheet that is looked at a week later must say which settings all its images have."""
    overrides = ["size=96", "loss.content_weight=0.5", "styles.0.weight=2"]
    axes, variations = load_variations(config, overrides, ["seed=1"])
    grid = Grid(axes, variations, 48, resolve_device("cpu"))
    grid.plan(tmp_path / "sheets", NEVER)
    with_settings, without = grid.sheet("c.yaml", overrides), grid.sheet("c.yaml", [])
    assert with_settings.settings == [f"--set {setting}" for setting in overrides]
    assert with_settings.size[0] - without.size[0] >= 3 * with_settings._text_px  # a line each


# --- which images --------------------------------------------------------------------------------------------------


def test_all_combinations_are_made_and_mean_what_set_means(config):
    """All combinations must be present, with values read as `--set` reads them."""
    axes, variations = load_variations(config, ("seed=3",), ("loss.style_weight=0.5,1e1", "init=content,noise"))
    assert [axis.values for axis in axes] == [("0.5", "1e1"), ("content", "noise")]
    assert [variation.settings for variation in variations] == [
        (f"loss.style_weight={weight}", f"init={init}") for weight in ("0.5", "1e1") for init in ("content", "noise")
    ]
    for variation in variations:
        assert variation.config == load_config(config, ("seed=3", *variation.settings))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("size", ["null", "200"]),
        ("styles", ["[{image: a.png}, {image: b.png, weight: 2}]", "[{image: c.png}]"]),
        ("network.style_layers", ["{conv1_1: 1.0, conv2_1: 0.5}", "{conv3_1: 1.0}"]),
        ("content", ['"a, b.png"', "b c.png"]),
    ],
)
def test_commas_inside_values_do_not_part_them(config, key, values):
    """Otherwise a list of styles, or a path with a comma, could not be varied."""
    axes, variations = load_variations(config, (), (f"{key}={','.join(values)}",))
    assert list(axes[0].values) == values
    assert [variation.config for variation in variations] == [
        load_config(config, (f"{key}={value}",)) for value in values
    ]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["loss.style_wieght=1,2"], "--vary loss.style_wieght=2: loss.style_wieght: unknown key"),
        (["loss.style_weight=1,much"], "--vary loss.style_weight=much: loss.style_weight: expected a number"),
        (["loss.style_weight"], "--vary loss.style_weight: this is not key=value,value"),
        (["loss.style_weight="], "--vary loss.style_weight=: this is not key=value,value"),
        (["loss.style_weight=1,,2"], "--vary loss.style_weight=1,,2: not valid YAML"),
        (["seed=1", "seed=2"], "--vary seed=2: seed: varied twice"),
        (["styles.4.weight=1"], "--vary styles.4.weight=1: styles: there is no entry 4"),
        ([f"seed={','.join(map(str, range(9)))}", "loss.style_weight=1,2,3,4,5,6,7,8"], "72 combinations"),
        (["size=64,128"], "--vary size: --size sets the size"),
        (["output=a.png,b.png"], "--vary output: -o names the sheet"),
        (["compute.tile_px=32,64"], "--vary compute.tile_px: does not change the image"),
        (["content=content.png,lost.png"], "lost.png"),
    ],
)
def test_wrong_variations_are_refused_before_anything_is_made(config, call, vary, message, monkeypatch):
    """A mistake must be reported before rendering, with the --vary that contains it."""
    monkeypatch.chdir(config.parent)
    outcome = call("preview", "-c", config, *(part for axis in vary for part in ("--vary", axis)))
    assert outcome.code == 3
    assert message in outcome.err
    assert sorted(path.name for path in config.parent.iterdir()) == ["config.yaml", "content.png", "style.png"]


def test_a_file_that_is_missing_is_an_error_of_the_config(config, call):
    """A missing input is an error of the config, not of a file that was deleted."""
    outcome = call("preview", "-c", config, "--set", "content=gone.png")
    assert outcome.code == 3 and "content: no such file: " in outcome.err and "gone.png" in outcome.err, outcome.err


def test_every_wrong_value_is_told_once(config):
    """Every problem must be listed, and an error of the file only once for all images."""
    with pytest.raises(ConfigError) as caught:
        load_variations(config, ("seed=x",), ("loss.style_weight=a,1,b", "init=content,noise"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and all(sum(word in line for line in lines) == 1 for word in ("=a:", "=b:", "seed=x"))
    assert MAX_VARIATIONS >= 16


# --- what is rendered ------------------------------------------------------------------------------------------------


def test_preview_is_the_runs_own_stage_of_that_size(config, call):
    """The preview at a stage's size must be that stage of the run; a large style adds no stage."""
    write_picture(config.parent / "style.png", 300, 260, seed=5)
    settings = ("loss.style_weight=2.0", "stages=[{up_to: 48, loss: {content_weight: 0.5}}, {up_to: 500}]")
    run(load_config(config, settings))
    call(
        "export",
        "-c",
        config,
        *(f"--set={setting}" for setting in settings),
        "--stage",
        2,
        "-o",
        config.parent / "stage.png",
    )
    result = preview(config, GridSpec(vary=(f"{settings[0]},3",), overrides=settings[1:], size_px=96))
    assert result.pictures[0].size == (74, 96)
    np.testing.assert_array_equal(read_picture(result.pictures[0].picture), read_picture(config.parent / "stage.png"))
    assert (read_picture(result.pictures[0].picture) != read_picture(result.pictures[1].picture)).any()


@pytest.mark.parametrize(
    ("style_px", "settings"),
    [
        ((300, 260), ()),
        ((300, 260), ("styles.0.scale=1.3",)),
        ((300, 260), ("styles.0.scale=0.6", "styles.0.max_size=100")),
        ((300, 260), ("stages=[{up_to: 96, optimizer: {max_iterations: 2}}, {up_to: 500}]",)),
        ((60, 50), ("stages=[{up_to: 48, styles: [{image: style.png, max_size: 32}]}]",)),
    ],
)
def test_preview_is_the_run(config, call, monkeypatch, style_px, settings):
    """The preview at the result's size must be the run's result; with a large style they were 17 dB apart."""
    monkeypatch.chdir(config.parent)
    write_picture(config.parent / "style.png", *style_px, seed=5)
    run(load_config(config, settings))
    whole = preview(config, GridSpec(overrides=settings, size_px=130)).pictures[0].picture
    np.testing.assert_array_equal(read_picture(whole), read_picture(config.parent / "out.png"))
    call("export", "-c", config, *(f"--set={setting}" for setting in settings), "--stage", 2, "-o", "stage.png")
    part = preview(config, GridSpec(overrides=settings, size_px=96)).pictures[0].picture
    np.testing.assert_array_equal(read_picture(part), read_picture(config.parent / "stage.png"))
    mine, runs = results(part.parent / "run"), results(config.parent / "run")
    assert mine == runs[: len(mine)]  # every number of every iteration, and the checksum of every chunk


def test_stages_that_a_large_style_adds_are_there(config, call):
    """A key that has an effect only at larger sizes must not be called ineffective in the run."""
    write_picture(config.parent / "style.png", 400, 300, seed=5)
    result = preview(config, GridSpec(vary=("styles.0.max_size=100,6400",), size_px=130))
    for rendered in result.pictures:
        run(load_config(config, (*rendered.settings, f"work_dir={rendered.picture.parent}/whole")), force=True)
        np.testing.assert_array_equal(read_picture(rendered.picture), read_picture(config.parent / "out.png"))
    assert (read_picture(result.pictures[0].picture) != read_picture(result.pictures[1].picture)).any()
    outcome = call("preview", "-c", config, "--size", 96, "--vary", "styles.0.max_size=200,6400")
    assert outcome.code == 3 and "changes nothing at 96 px" in outcome.err and "--size" in outcome.err


@dataclass(frozen=True)
class Header:
    width_px: int
    height_px: int


@st.composite
def runs_and_sizes(draw):
    """A config, the headers of its images, and the size of a preview, often that of a stage or of the run."""
    px, scales = st.integers(16, 900), st.sampled_from([0.3, 0.5, 1.0, 1.3, 1.7, 2.0, 3.33, 99.999])
    start, target = draw(px), draw(px)
    ratio = draw(st.just(2.0) | st.floats(1.2, 4) | st.sampled_from([1.2, 2**0.5, 1.7]))

    def styles(prefix: str) -> list[dict]:
        return [
            {
                "image": f"{prefix}{index}.png",
                "scale": draw(scales | st.floats(0.05, 100)),
                "max_size": draw(st.none() | st.integers(16, 3000)),
            }
            for index in range(draw(st.integers(1, 3)))
        ]

    values = {"content": "content.png", "output": "out.png", "size": target, "initial_size": start}
    values |= {"stage_ratio": ratio, "style_stages": draw(st.booleans())}
    canvases = [min(side, target) for side in long_sides(start, ratio, target)]
    entries = []
    for up_to in sorted(draw(st.sets(st.sampled_from(canvases), max_size=3))):
        others = {"styles": styles("other")} if draw(st.booleans()) else {}
        entries.append({"up_to": up_to, "optimizer": {"max_iterations": draw(st.integers(1, 9))}, **others})
    if entries and draw(st.booleans()):
        entries[-1]["up_to"] += draw(st.integers(0, 500))
    values |= {"styles": styles("style"), "stages": entries}
    config = Config.model_validate(values, context={"base": Path("/")})
    sides = st.integers(20, 3000)
    images = {path: Header(draw(sides), draw(sides)) for _, path in input_files(config)}
    return config, images, draw(px | st.sampled_from(canvases))


@given(runs_and_sizes())
@settings(max_examples=400)
def test_stages_of_a_preview_are_those_of_the_run(result):
    """A style of another size at one stage, or an additional stage, would give another image than the run."""
    config, images, long_px = result
    shorter = at_size(config, long_px)
    expected, stages = stage_sizes(config, images), stage_sizes(shorter, images)
    check_overrides(shorter, [max(canvas) for canvas, _ in stages])  # every entry applies to a stage
    Config.model_validate(shorter.model_dump(mode="json"), context={"base": Path("/")})  # as a manifest is read
    if long_px >= config.size:
        assert stages == expected and shorter == config
        return
    assert max(stages[-1][0]) == long_px
    is_the_runs = any(long_px == max(canvas) for canvas, _ in expected)
    same = len(stages) if is_the_runs else len(stages) - 1
    assert stages[:same] == expected[:same]
    for canvas, styles in stages:
        whole, largest = next(pair for pair in expected if max(pair[0]) >= max(canvas))
        mine, theirs = shorter.for_stage(max(canvas)), config.for_stage(max(canvas))
        assert (mine.optimizer, mine.loss, mine.network) == (theirs.optimizer, theirs.loss, theirs.network)
        assert [style.image for style in mine.styles] == [style.image for style in theirs.styles]
        if theirs.styles == config.for_stage(max(whole)).styles:
            assert all(max(size) <= max(limit) for size, limit in zip(styles, largest, strict=True))


def test_initial_size_above_the_shown_size_has_its_effect(config, call):
    """Otherwise all values of `initial_size` above the preview's size would give the same image."""
    outcome = call("preview", "-c", config, "--size", 64, "--vary", "initial_size=48,96", "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert [picture["width_px"] for picture in result["pictures"]] == [96, 96]
    assert result["shown_px"] == 64
    stages = [
        len({record["stage"] for record in journal(Path(picture["picture"]).parent / "run") if "stage" in record})
        for picture in result["pictures"]
    ]
    assert stages == [2, 1]


def test_an_automatic_first_stage_is_the_runs(config):
    """A preview has other sizes than the run: from these another first stage would follow, and another picture."""
    automatic = ("initial_size=auto", "loss.style_weight=0", "network.content_layers={conv2_1: 1.0}")
    result = preview(config, GridSpec(overrides=automatic, size_px=110))
    (run_dir,) = (rendered.picture.parent / "run" for rendered in result.pictures)
    assert [tuple(stage.size) for stage in read_manifest(run_dir / "manifest.json").stages] == [(65, 84), (85, 110)]
    assert plan(load_config(config, automatic)).stages[0].size == (65, 84)


def test_no_picture_is_larger_than_the_run_would_make_it(config):
    """A preview of a small image would show an enlargement that no run makes."""
    assert preview(config).pictures[0].size == (100, 130)
    assert preview(config, GridSpec(overrides=("size=64",))).pictures[0].size == (49, 64)


def test_texture_without_content_has_a_preview(config):
    """Textures, which have no content, must have previews too."""
    texture = ("content=null", "loss.content_weight=0", "size=[300, 150]", "initial_size=64")
    assert preview(config, GridSpec(overrides=texture, size_px=64)).pictures[0].size == (32, 64)


def test_masks_are_varied_like_all_else(config, monkeypatch):
    """Masks must be applied in previews; they are in the content's coordinates at any size."""
    ramp = np.tile(np.linspace(0, 255, CONTENT_PX[0]).astype(np.uint8), (CONTENT_PX[1], 1))
    pyvips.Image.new_from_array(ramp, interpretation="b-w").write_to_file(str(config.parent / "mask.png"))
    monkeypatch.chdir(config.parent)
    values = ("[{image: style.png}]", "[{image: style.png, mask: mask.png}]")
    result = preview(
        config, GridSpec(vary=(f"styles={','.join(values)}", "loss.content_mask=null,mask.png"), size_px=96)
    )
    assert [rendered.size for rendered in result.pictures] == [(74, 96)] * 4
    pixels = [read_picture(rendered.picture) for rendered in result.pictures]
    assert all((pixels[0] != other).any() for other in pixels[1:])
    settings = (f"styles={values[1]}", "loss.content_mask=mask.png")
    run(load_config(config, (*settings, "size=96")))
    np.testing.assert_array_equal(pixels[3], read_picture(load_config(config).output))


def test_keys_that_are_printed_make_the_picture(config, call, monkeypatch):
    """The printed `--set` options must reproduce the image that was chosen."""
    monkeypatch.chdir(config.parent)
    outcome = call("preview", "-c", config, "--size", 64, "--vary", "styles=[{image: 'style.png', weight: 3}]")
    words = shlex.split(outcome.out.splitlines()[1])
    assert words[0] == "--set" and load_config(config, words[1:2]).styles[0].weight == 3


# --- keys that change nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["content", "noise", "gray"])
@pytest.mark.parametrize("network", ["random", "a file"])
@pytest.mark.parametrize("state", ["float", "compact"])
def test_a_seed_that_nothing_is_drawn_from_is_refused(tmp_path, narrow_weights, init, network, state):
    """An ineffective seed must be refused, and one that has an effect must not be."""
    of_file = {"name": "vgg19", "weights": str(narrow_weights)}
    keys = {"init": init, "network": {"name": "random"} if network == "random" else of_file}
    config = write_run(tmp_path, store={"chunk_px": 32, "state_dtype": state}, **keys)
    matters = init == "noise" or network == "random" or state == "compact"
    try:
        result = preview(config, GridSpec(vary=("seed=1,2",), size_px=48))
    except ConfigError as error:
        assert "--vary seed: does not change the image" in str(error)
        assert not matters and not (tmp_path / "out.preview").exists()
        for number in (1, 2):
            run(load_config(config, (f"seed={number}", f"work_dir={tmp_path / str(number)}")), force=True)
        assert canvases(tmp_path / "1") == canvases(tmp_path / "2")
        return
    first, second = (canvases(picture.picture.parent / "run") for picture in result.pictures)
    assert matters and first != second


def test_keys_that_made_no_difference_are_told(config, narrow_weights):
    """Keys without effect are reported, so that the user does not look for differences."""
    vary = ("init=content,noise", "seed=1,2", "styles.0.weight=1,3", "loss.style_weight=1,2")
    notes: list[str] = []
    preview(
        config,
        GridSpec(vary=vary, overrides=(f"network={{name: vgg19, weights: {narrow_weights}}}",), size_px=48),
        sink=lambda event: notes.append(event.message) if isinstance(event, Note) else None,
    )
    (weight,) = (note for note in notes if note.startswith("styles.0.weight"))
    assert weight == "styles.0.weight made no difference: its images are the same, byte for byte"
    (seed,) = (note for note in notes if note.startswith("seed"))
    assert "with init=content, styles.0.weight=1, loss.style_weight=1;" in seed and "init=noise" not in seed
    assert not any(note.startswith(("init", "loss")) for note in notes)


# --- resume, locks, overwriting ---------------------------------------------------------------------------------------


def test_stopped_preview_goes_on(config):
    """Otherwise a stopped preview would render all images again, or leave an incomplete sheet."""
    stop, message = threading.Event(), []

    def sink(event):
        if isinstance(event, PictureDone):
            message.append(event)
            stop.set()

    arguments = {"vary": ("seed=1,2,3",), "size_px": 64}
    with pytest.raises(Stopped):
        preview(config, GridSpec(**arguments), sink=sink, stop=stop)
    sheet = config.parent / "out.preview.png"
    assert not sheet.exists()
    first = Path(message[0].output)
    before = (first.parent / "run" / "journal.jsonl").read_bytes(), first.stat().st_mtime_ns

    message.clear()
    result = preview(config, GridSpec(**arguments), sink=sink)
    assert result.sheet == sheet and sheet.exists()
    assert [event.seconds is None for event in message] == [True, False, False]
    assert ((first.parent / "run" / "journal.jsonl").read_bytes(), first.stat().st_mtime_ns) == before

    message.clear()
    preview(
        config, GridSpec(vary=("seed=2,4",), size_px=64), sink=sink
    )  # another grid reuses the images that it shares
    assert [event.seconds is None for event in message] == [True, False]


def test_changed_input_is_rendered_anew(config):
    """Otherwise the sheet would show the result of the old content."""
    old = preview(config, GridSpec(size_px=64)).pictures[0].picture
    write_picture(config.parent / "content.png", *CONTENT_PX, seed=9)
    new = preview(config, GridSpec(size_px=64)).pictures[0].picture
    assert (read_picture(old) != read_picture(new)).any()


def test_killed_preview_goes_on(config):
    """A kill during a preview must not lose finished images, or leave a folder that no preview accepts."""
    from tests.support.e2e import Nursery

    nursery = Nursery(config.parent)
    try:
        for commits in (1, 3, 8):
            child = nursery.start("preview", "-c", config, "--size", 64, kill_before=commits)
            assert child.wait() == -9, child.err
        child = nursery.run("preview", "-c", config, "--size", 64)
        assert child.wait() == 0, child.err
    finally:
        nursery.close()
    assert (config.parent / "out.preview.png").exists()


def test_two_previews_of_one_config_are_kept_apart(config, call):
    """Two previews of one config must not write the same sheet."""
    preview(config, GridSpec(size_px=64))
    with RunLock(config.parent / "out.preview"):
        outcome = call("preview", "-c", config, "--size", 64)
    assert outcome.code == 4 and "out.preview" in outcome.err


def test_only_own_sheets_are_replaced(config, call):
    """Otherwise another image of that name would be overwritten."""
    foreign = config.parent / "out.preview.png"
    foreign.write_bytes(b"somebody's")
    refused = call("preview", "-c", config, "--size", 64)
    assert refused.code == 3 and "no preview of this config made it" in refused.err
    assert foreign.read_bytes() == b"somebody's"
    assert call("preview", "-c", config, "--size", 64, "--force").code == 0
    assert read_picture(foreign).ndim == 3
    assert call("preview", "-c", config, "--size", 48).code == 0  # now the sheet is the preview's own


@pytest.mark.parametrize(
    "name", ["content.png", "out.png", "out.preview/x.png", "run/store.zarr/x.png", "sheet.dz", "x"]
)
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_sheet_is_never_put_over_inputs_or_state(config, call, name, force):
    """Even --force must never overwrite an input, the result or the state of the run."""
    before = (config.parent / "content.png").read_bytes()
    outcome = call("preview", "-c", config, "--size", 64, "-o", config.parent / name, *force)
    assert outcome.code == 3, outcome.err
    assert (config.parent / "content.png").read_bytes() == before
    assert not (config.parent / "out.preview").exists()


@pytest.mark.parametrize("what", ["files", "run", "work_dir"])
def test_folder_of_previews_is_nobody_elses(config, call, what):
    """Previews must not be rendered into another folder, or into the state of a run."""
    folder, settings = config.parent / "out.preview", []
    if what == "files":
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    elif what == "run":
        run(load_config(config, (f"work_dir={folder}",)))
        (config.parent / "out.png").unlink()
    else:
        settings = [f"--set=work_dir={folder}"]
    before = sorted(folder.rglob("*"))
    outcome = call("preview", "-c", config, "--size", 64, *settings)
    assert outcome.code == 3 and str(folder) in outcome.err
    assert sorted(folder.rglob("*")) == before


def test_the_runs_own_state_stays_as_it_is(config):
    """A preview must not change a stopped run."""
    run(load_config(config))
    before = canvases(config.parent / "run"), (config.parent / "run" / "journal.jsonl").read_bytes()
    preview(config, GridSpec(size_px=64))
    assert (canvases(config.parent / "run"), (config.parent / "run" / "journal.jsonl").read_bytes()) == before


# --- the sheet -------------------------------------------------------------------------------------------------------


def solid(folder: Path, name: str, size: tuple[int, int], colour: tuple[int, int, int]) -> SheetImage:
    import pyvips

    pixels = np.broadcast_to(np.uint8(colour), (*size, 3))
    pyvips.Image.new_from_array(np.ascontiguousarray(pixels), interpretation="srgb").write_to_file(str(folder / name))
    return SheetImage(folder / name, size)


def place_of(sheet: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(y0, y1, x0, x1) of all pixels of a colour."""
    rows, columns = np.nonzero((sheet == colour).all(axis=2))
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def written(sheet: ContactSheet, path: Path) -> np.ndarray:
    sheet.write(path, NEVER, lambda share: None)
    pixels = read_picture(path)
    assert pixels.shape == (*sheet.size, 3)
    return pixels


@pytest.mark.parametrize("text", ["1", "/a/very/long/path/" + "name_of_a_picture" * 20 + ".jpg"])
def test_pictures_stand_whole_in_rows_and_columns_with_their_labels(tmp_path, text):
    """No image or label may be cropped, overlap another or be in the wrong place."""
    size, colours = (40, 60), {(row, column): (200, 50 * row, 50 * column) for row in (0, 1) for column in (0, 1, 2)}
    pictures = {at: solid(tmp_path, f"{at[0]}{at[1]}.png", size, colour) for at, colour in colours.items()}
    rows = [
        Row(
            (("down", f"{text} {row}"),),
            ((("across", text),),) * 3 if row == 0 else (),
            tuple(pictures[row, c] for c in range(3)),
        )
        for row in (0, 1)
    ]
    reference = solid(tmp_path, "reference.png", (20, 30), (0, 0, 250))
    pixels = written(ContactSheet("title", [((("content", text),), reference)], rows), tmp_path / "sheet.png")
    places = {at: place_of(pixels, colour) for at, colour in colours.items()}
    assert all((y1 - y0, x1 - x0) == size for y0, y1, x0, x1 in places.values())
    for row in (0, 1):
        assert len({places[row, column][0] for column in range(3)}) == 1
        assert places[row, 0][3] < places[row, 1][2] and places[row, 1][3] < places[row, 2][2]
        y0, y1, left, _ = places[row, 0]
        label = pixels[y0:, :left].min(axis=(1, 2)) < 128
        assert label[: y1 - y0 + 8].any()  # its label, at its height
    assert places[0, 0][1] < places[1, 0][0]
    y0, y1, x0, x1 = place_of(pixels, (0, 0, 250))
    assert (y1 - y0, x1 - x0) == (20, 30) and y1 < places[0, 0][0]
    for column in range(3):
        _, _, x0, x1 = places[0, column]
        assert (pixels[y1 : places[0, column][0], x0:x1].min(axis=(1, 2)) < 128).any()
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 255).all()  # nothing is cropped at the sheet's border


def test_long_list_of_values_is_wrapped(config):
    """Twelve images side by side would not fit on a screen."""
    result = preview(config, GridSpec(vary=(f"seed={','.join('1' * 12)}",), size_px=32))
    height, width, _ = read_picture(result.sheet).shape
    assert result.across == 5 and len(result.pictures) == 12
    assert width < 2 * height


def test_pictures_of_other_proportions_fit(config):
    """Contents of different aspect ratios must be neither cropped nor distorted."""
    write_picture(config.parent / "tall.png", 60, 120, seed=4)
    result = preview(
        config, GridSpec(vary=(f"content={config.parent / 'content.png'},{config.parent / 'tall.png'}",), size_px=64)
    )
    assert [rendered.size for rendered in result.pictures] == [(49, 64), (64, 32)]


def test_sheet_larger_than_memory_is_refused(config, call):
    """Otherwise the last step, after all images are rendered, would run out of memory."""
    large = [*("--set", "size=40000"), *("--set", "memory.limit=600MiB"), *("--set", "compute.tile_px=auto")]
    outcome = call("preview", "-c", config, "--size", 20000, "--vary", "seed=1,2,3", *large)
    assert outcome.code == 3 and "memory" in outcome.err


def test_middle_of_long_names_is_left_out():
    """Paths often differ at their ends, so the middle is left out."""
    assert shortened("abc", 8) == "abc"
    assert shortened("0123456789", 7) == "01…6789"
    assert shortened("two\nlines\x1b[0m", 40).isprintable()


def test_labels_need_no_fonts_on_the_machine(tmp_path):
    """On a machine without fonts every letter would be the same box."""
    (tmp_path / "fonts.conf").write_text(f"<fontconfig><cachedir>{tmp_path}</cachedir></fontconfig>")
    code = """
from pipeline.images.sheet import text_image
print(*(int((text_image((("", c),), 20).numpy() < 128).sum()) for c in 'il.m'))
"""
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FONTCONFIG_FILE": str(tmp_path / "fonts.conf")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(set(out.stdout.split())) == 4


def test_preview_works_as_a_command(config):
    """From the shell: progress on stderr, the sheet and the `--set` options on stdout."""
    done = run_pipeline("preview", "-c", config, "--size", 48, "--vary", "loss.style_weight=1,2")
    assert done.code == 0, done.err
    sheet, *lines = done.out.splitlines()
    assert read_picture(Path(sheet)).ndim == 3
    assert [line.strip() for line in lines if "--set" in line] == [f"--set loss.style_weight={n}" for n in (1, 2)]
    assert [line.split(":")[0] for line in done.err.splitlines()[1:]] == ["image 1 of 2", "image 2 of 2"]
