"""Crops at full resolution, rendered from the last finished stage of a run."""

from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
from hypothesis import given
from hypothesis import strategies as st

from pipeline import CropSpec, crop, images, load_config, run
from pipeline.commands.preview.regions import regions, scaled
from pipeline.commands.preview.whole_image import WholeImage
from pipeline.core.errors import Stopped
from pipeline.core.tiling import Rect
from pipeline.core.vgg_layers import ALIGN_PX
from tests.support.crops import CONTENT_PX, SHALLOW, no_estimate, stopped_before
from tests.support.e2e import canvases, read_picture, write_run


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """The folder of a run of 38, 76 and 150 px of which two stages are finished; not to be changed."""
    config = write_run(
        tmp_path_factory.mktemp("begun"),
        CONTENT_PX,
        initial_size=38,
        dequantize=True,
        stage_smoothing=True,
        network=SHALLOW,
        optimizer={"max_iterations": 6, "target_pixel_change": 6.0},
    )
    pixels = read_picture(config.parent / "content.png")
    pixels[:, 100:] = (
        20 + pixels[:, 100:] // 8
    )  # the right third is dark and smooth, so its statistics differ from the whole image's
    pyvips.Image.new_from_array(pixels, interpretation="srgb").write_to_file(str(config.parent / "content.png"))
    stopped_before(config, 2)
    return config.parent


@pytest.fixture
def config(begun, tmp_path) -> Path:
    """A copy of the run, which one test may change."""
    shutil.copytree(begun, tmp_path / "begun")
    return tmp_path / "begun" / "config.yaml"


# --- the result ------------------------------------------------------------------------------------------------------


def test_crop_of_everything_is_the_run(config):
    """With nothing to estimate, the crop must be the run's result bit for bit."""
    result = read_picture(crop(load_config(config), CropSpec(Rect(0, 110, 0, 150))))
    run(load_config(config))
    np.testing.assert_array_equal(result, read_picture(config.parent / "out.png"))


def test_crop_is_closer_to_the_run_with_the_whole_pictures_grams(config, monkeypatch):
    """Without the estimate, the whole style would be matched within the corner."""
    module: Any = sys.modules["pipeline.commands.preview.crop_rendering"]
    monkeypatch.setattr(module, "_SPREAD_PX", 0)
    rect = Rect(40, 72, 100, 150)
    with_whole = read_picture(crop(load_config(config), CropSpec(rect))).astype(float)
    monkeypatch.setattr(WholeImage, "estimate", no_estimate)
    alone = read_picture(crop(load_config(config), CropSpec(rect))).astype(float)
    run(load_config(config))
    real = read_picture(config.parent / "out.png")[40:72, 100:150].astype(float)
    assert with_whole.shape == real.shape == (32, 50, 3)
    assert np.square(with_whole - real).mean() < 0.7 * np.square(alone - real).mean()


@pytest.mark.parametrize("color", ["content", "luminance"])
def test_crop_has_the_colours_of_the_whole(tmp_path, color):
    """Colours must be matched to the whole image's, not to the crop's."""
    config = write_run(tmp_path, CONTENT_PX, initial_size=76, network=SHALLOW)
    stopped_before(config, 1, f"color={color}")
    settings = load_config(config, (f"color={color}",))
    result = read_picture(crop(settings, CropSpec(Rect(0, 110, 0, 150))))
    run(settings)
    np.testing.assert_array_equal(result, read_picture(config.parent / "out.png"))
    assert crop(settings, CropSpec(Rect(0, 30, 0, 40))).exists()  # a part has no reference to compare with


def test_crop_through_several_stages_goes_on_from_its_own(config, begun):
    """If several stages are missing, the crop must render all of them."""
    shutil.rmtree(config.parent / "run")
    stopped_before(config, 1)
    assert read_picture(crop(load_config(config), CropSpec(Rect(10, 40, 20, 60)))).shape == (30, 40, 3)
    result = read_picture(crop(load_config(config), CropSpec(Rect(0, 110, 0, 150))))
    run(load_config(config))
    np.testing.assert_array_equal(result, read_picture(config.parent / "out.png"))


def test_crop_of_a_run_with_several_scales(tmp_path):
    """A crop of everything must be the run's result bit for bit, and a part of it must come close to it."""
    config = write_run(tmp_path, CONTENT_PX, initial_size=38, network=SHALLOW, loss={"scales": 3})
    stopped_before(config, 1)
    settings, rect = load_config(config), Rect(40, 72, 100, 150)
    everything, part = (read_picture(crop(settings, CropSpec(wanted))) for wanted in (Rect(0, 110, 0, 150), rect))
    run(settings)
    result = read_picture(config.parent / "out.png")
    np.testing.assert_array_equal(everything, result)
    assert np.abs(part - result[40:72, 100:150].astype(float)).mean() < 8


def test_finished_stage_is_cut_and_not_rendered(config, call):
    """A crop of a finished stage must be cut from its canvas, not rendered again."""
    export = config.parent / "stage.png"
    assert call("export", "-c", config, "--stage", 2, "-o", export).code == 0
    outcome = call("preview", "-c", config, "--crop", "60,20,50,41", "--stage", 2)
    assert outcome.code == 0, outcome.err
    assert "nothing is rendered" in outcome.err
    y0, y1, x0, x1 = 20 * 56 // 110, -(-61 * 56 // 110), 60 * 76 // 150, -(-110 * 76 // 150)
    np.testing.assert_array_equal(read_picture(Path(outcome.out.strip())), read_picture(export)[y0:y1, x0:x1])


# --- the run is unchanged --------------------------------------------------------------------------------------------


def test_the_run_is_only_read(config, call):
    """A crop must not change an active run, or leave folders behind."""
    before = canvases(config.parent / "run"), (config.parent / "run" / "journal.jsonl").read_bytes()
    outcome = call("preview", "-c", config, "--crop", "60,20,50,41")
    assert outcome.code == 0, outcome.err
    assert (canvases(config.parent / "run"), (config.parent / "run" / "journal.jsonl").read_bytes()) == before
    assert sorted(path.name for path in (config.parent / "out.preview").iterdir()) == ["journal.jsonl", "lock"]
    assert read_picture(config.parent / "out.crop.png").shape == (41, 50, 3)


def test_stopped_crop_leaves_nothing(config):
    """A stopped crop must leave neither temporary files nor an incomplete image."""
    stop = threading.Event()
    with pytest.raises(Stopped):
        crop(load_config(config), CropSpec(Rect(20, 61, 60, 110)), sink=lambda event: stop.set(), stop=stop)
    assert not (config.parent / "out.preview" / "crop").exists()
    assert not (config.parent / "out.crop.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--crop", "100,0,51,10"], "150×110", 3),
        (["--crop", "0,0,0,10"], "is not inside the image", 3),
        (["--crop", "0,0,10"], "x,y,width,height", 2),
        (["--crop", "-1,0,10,10"], "x,y,width,height", 2),
        (["--crop", "0,0,10,10", "--stage", "4"], "the run's stages are 1 to 3", 3),
        (["--crop", "0,0,10,10", "--vary", "seed=1"], "omit --vary", 2),
        (["--stage", "1"], "--stage requires --crop", 2),
        (["--crop", "0,0,10,10", "--set", "loss.style_weight=3"], "loss.style_weight: was 1.0, is 3", 3),
        (["--crop", "0,0,10,10", "--set", "work_dir=elsewhere"], "there is no run of this config yet", 3),
        (["--crop", "0,0,10,10", "-o", "content.png"], "is the config's content", 3),
    ],
)
def test_wrong_crops_are_refused(begun, call, monkeypatch, arguments, message, code):
    """A typing error must not render another part, or another image than the run's."""
    monkeypatch.chdir(begun)
    before = sorted(begun.rglob("*"))
    outcome = call("preview", "-c", "config.yaml", *arguments)
    assert outcome.code == code, outcome.err
    assert message in " ".join(outcome.err.split())
    assert sorted(begun.rglob("*")) == before


def test_run_without_a_finished_stage_says_what_to_do(tmp_path, call):
    """Without a finished stage nothing can be estimated, and the error must say what to do."""
    config = write_run(tmp_path, CONTENT_PX)
    stopped_before(config, 0)
    outcome = call("preview", "-c", config, "--crop", "0,0,10,10")
    assert outcome.code == 3
    assert "has not finished its first stage" in outcome.err and "Ctrl-C" in outcome.err


# --- regions ---------------------------------------------------------------------------------------------------------

sides = st.integers(20, 3000)


@given(st.data())
def test_regions_hold_the_crop_and_what_the_next_is_enlarged_from(data):
    """Every region must contain the pixels that the next one is enlarged from."""
    height, width = data.draw(sides), data.draw(sides)
    sizes = [(max(1, height >> shift), max(1, width >> shift)) for shift in (2, 1, 0)]
    y0, x0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    rect = Rect(y0, data.draw(st.integers(y0 + 1, height)), x0, data.draw(st.integers(x0 + 1, width)))
    around = data.draw(st.integers(0, 300))
    result = regions(rect, sizes, [around] * 3)
    for size, region in zip(sizes, result, strict=True):
        own = scaled(rect, sizes[-1], size).grown(around, *size)
        assert region.intersection(own) == own
        assert all(
            edge % ALIGN_PX == 0 or edge == side for edge, side in zip(region, (0, size[0], 0, size[1]), strict=True)
        )
        assert 0 <= region.y0 < region.y1 <= size[0] and 0 <= region.x0 < region.x1 <= size[1]
    for below, above, size, larger in zip(result, result[1:], sizes, sizes[1:], strict=False):
        window = Rect(*images.source_window(above, size, larger)) if size != larger else above
        assert below.intersection(window) == window
