"""Colours from the content's file to the output: wide gamut, printers, transparency, and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import pyvips
import zarr

import pipeline
from pipeline.core.errors import ConfigError
from tests.support import colors as reference
from tests.support.inputs import write_config

SIZE = (48, 64)
# Without a style the picture is the content as it was read.
BARE = {"styles": [], "loss": {"style_weight": 0.0, "content_weight": 1.0}, "optimizer": {"max_iterations": 1}}
BARE |= {"network": {"name": "vgg19-lite"}, "compute": {"device": "cpu"}}


def noise(dtype: type, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (*SIZE, channels), dtype=dtype)


def rendered(folder: Path, **values: object) -> pyvips.Image:
    config = pipeline.load_config(write_config(folder, **{**BARE, **values}))
    return pyvips.Image.new_from_file(str(pipeline.run(config)))


@pytest.mark.parametrize("name", reference.WIDE)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_wide_gamut_content_comes_out_as_it_went_in(tmp_path, name, dtype):
    """ProPhoto lost up to 38 ΔE on the way to sRGB (p95 11.7), Adobe RGB 3.3: nothing may be clipped, in or out."""
    matrix, gamma = reference.WIDE[name]
    pixels, profile = noise(dtype), reference.profile(matrix, gamma)
    reference.write_tagged(tmp_path / "content.tif", pixels, profile)
    picture = rendered(tmp_path, content="content.tif", output="out.tif", export={"profile": "content"})
    assert picture.get("icc-profile-data") == profile and picture.format == ("uchar" if dtype == np.uint8 else "ushort")
    difference = reference.delta_e(
        *(reference.lab(p / np.iinfo(dtype).max, matrix, gamma) for p in (picture.numpy(), pixels))
    )
    assert np.percentile(difference, 95) < (1.0 if dtype == np.uint8 else 0.05)


@pytest.mark.parametrize("name", ["out.png", "out.tif", "out.zarr"])
def test_a_soft_shadow_comes_out_as_it_went_in(tmp_path, name):
    """Its colours were mixed with white, and its alpha was applied to the mixture: shadows became pale haze."""
    pixels = noise(np.uint8, 4)
    pixels[:24] = (0, 0, 0, 77)
    pyvips.Image.new_from_array(pixels, interpretation="srgb").write_to_file(str(tmp_path / "content.png"))
    config = pipeline.load_config(write_config(tmp_path, **BARE, output=name))
    path = pipeline.run(config)
    if name == "out.zarr":
        result = np.moveaxis(zarr.open_group(path, mode="r")["0"][...], 0, 2)
    else:
        result = pyvips.Image.new_from_file(str(path)).numpy()
    assert np.array_equal(result[..., 3], pixels[..., 3])
    share = pixels[..., 3:] / 255
    for background in (0, 255):
        shown, wanted = (p[..., :3] * share + background * (1 - share) for p in (result, pixels))
        assert np.abs(shown - wanted).max() <= 1.5


def test_the_smaller_levels_of_an_ome_zarr_have_no_white_fringes(tmp_path):
    """The hidden white of transparent pixels must not bleed into the shadow beside them."""
    pixels = np.zeros((600, 600, 4), np.uint8)
    pixels[:, ::2, 3] = 255
    pyvips.Image.new_from_array(pixels, interpretation="srgb").write_to_file(str(tmp_path / "content.png"))
    path = pipeline.run(pipeline.load_config(write_config(tmp_path, **BARE, output="out.zarr", initial_size=4096)))
    level = zarr.open_group(path, mode="r")["1"][...]
    assert level[:3].max() <= 1 and np.abs(level[3].astype(int) - 128).max() <= 1


def test_the_working_space_belongs_to_the_run(tmp_path):
    """A finished run is exported with any profile; another canvas is another run, and the message says what to add."""
    reference.write_tagged(tmp_path / "content.png", noise(np.uint8), None)
    config = write_config(tmp_path, **BARE)
    pipeline.run(pipeline.load_config(config))
    with pytest.raises(ConfigError, match="add `working_space: srgb` to the config"):
        pipeline.run(pipeline.load_config(config, ["export.profile=adobe-rgb"]))
    kept = pipeline.load_config(config, ["export.profile=adobe-rgb", "working_space=srgb"])
    picture = pyvips.Image.new_from_file(str(pipeline.run(kept)))
    seen = reference.lab(picture.numpy() / 255, reference.ADOBE_XYZ, 563 / 256)
    wanted = reference.lab(noise(np.uint8) / 255, reference.SRGB_XYZ, None)
    assert np.percentile(reference.delta_e(seen, wanted), 95) < 1.2


def test_a_wide_run_is_exported_as_srgb_and_previewed(tmp_path, call):
    """The canvas's numbers are not sRGB's: every picture of it that leaves the run must be converted."""
    pixels = noise(np.uint8)
    reference.write_tagged(tmp_path / "content.png", pixels, None)
    config = write_config(tmp_path, **BARE, export={"profile": "adobe-rgb"})
    plan = json.loads(call("plan", "-c", config, "--json").out)
    assert plan["notes"] == [
        "the canvas has the colours of adobe-rgb, with sRGB's tone curve",
        "the output has the profile Adobe RGB (1998) compatible",
    ]
    assert call("run", "-c", config).code == 0
    outcome = call("export", "-c", config, "-o", tmp_path / "b.png", "--profile", "srgb")
    assert outcome.code == 0, outcome.err
    outcome = call("preview", "-c", config, "--crop", "8,8,32,32", "-o", tmp_path / "crop.png")
    assert outcome.code == 0, outcome.err
    whole, crop = (pyvips.Image.new_from_file(str(tmp_path / name)).numpy() for name in ("b.png", "crop.png"))
    assert np.abs(whole.astype(int) - pixels).max() <= 8 and np.percentile(np.abs(whole.astype(int) - pixels), 95) <= 1
    assert np.array_equal(crop, whole[8:40, 8:40])
    outcome = call("export", "-c", config, "-o", tmp_path / "p3.tif", "--profile", "display-p3")
    assert outcome.code == 0, outcome.err
    profile = pyvips.Image.new_from_file(str(tmp_path / "p3.tif")).get("icc-profile-data")
    assert profile == pyvips.Operation.call("profile_load", "p3")
    outcome = call("export", "-c", config, "-o", tmp_path / "c.png", "--profile", "adobe")
    assert outcome.code == 2 and "none of srgb, adobe-rgb" in outcome.err


def test_a_print_shop_s_profile(tmp_path, call):
    """CMYK out, proofed on the way: the plan says so, and the file has the shop's inks."""
    reference.write_tagged(
        tmp_path / "content.tif", noise(np.uint16, 3), reference.profile(*reference.WIDE["prophoto"])
    )
    (tmp_path / "shop.icc").write_bytes(bytes(pyvips.Operation.call("profile_load", "cmyk")))
    values = {"content": "content.tif", "output": "out.tif", "proof": "shop.icc"}
    config = write_config(tmp_path, **BARE, **values, export={"profile": "shop.icc", "intent": "perceptual"})
    text = call("plan", "-c", config).out
    for words in ("are clipped", "shop.icc can print", "Chemical proof (CMYK, perceptual, black point compensation)"):
        assert words in text
    outcome = call("run", "-c", config)
    assert outcome.code == 0, outcome.err
    picture = pyvips.Image.new_from_file(str(tmp_path / "out.tif"))
    assert (picture.interpretation, picture.bands, picture.format) == ("cmyk", 4, "ushort")
    # noise hardly compresses: a plan that forgot the fourth ink would promise space that the disk does not have
    plain = call("plan", "-c", config, "--set", "export.compression=none", "--set", "export.for=print", "--json")
    bytes_of = json.loads(plain.out)["output_bytes"]
    assert bytes_of >= picture.width * picture.height * 4 * 2 * 4 // 3
    outcome = call("run", "-c", config, "--set", "proof=null")
    assert outcome.code != 0 and "proof" in outcome.err


def test_ignored_channels_are_said(tmp_path, call):
    """A saved selection that was meant as a mask must not vanish without a word."""
    reference.write_tiff(tmp_path / "content.tif", noise(np.uint8, 5), 2, (2, 0))
    config = write_config(tmp_path, **BARE, content="content.tif")
    assert "content.tif: 1 channel beyond its colours and its alpha: ignored" in call("plan", "-c", config).out
