"""16 bits and alpha, from the content's file through the store to the output, preserved if the format supports them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import zarr

import pipeline
from pipeline import store
from pipeline.core.image_formats import RGB8, PixelKind, picture_kind
from pipeline.core.tiling import Rect
from pipeline.executors.threads import ThreadExecutor
from pipeline.images import reader
from pipeline.images.header import read_header
from pipeline.images.writer import ImageSpec, write_image
from pipeline.render import color_tasks
from pipeline.rundir.manifest import _manifest_text
from tests.support.colors import P3_XYZ, in_srgb, profile
from tests.support.e2e import read_picture, write_config, write_picture, write_run

RGB16, RGBA8, RGBA16 = PixelKind(16), PixelKind(8, alpha=True), PixelKind(16, alpha=True)
KINDS = [RGB8, RGB16, RGBA8, RGBA16]


def stream(path: Path, width: int, height: int, kind: PixelKind, band_px: int = 16) -> np.ndarray:
    return np.concatenate([rows for _, rows in reader.stream_rgb(path, width, height, band_px, kind=kind)])


def vips(pixels: np.ndarray, interpretation: str) -> Any:
    return pyvips.Image.new_from_array(np.ascontiguousarray(pixels), interpretation=interpretation)


def over_white(pixels: np.ndarray) -> np.ndarray:
    max_level = np.iinfo(pixels.dtype).max
    share = pixels[..., 3:] / max_level
    return pixels[..., :3] * share + max_level * (1 - share)


# --- reading ---


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_pictures_own_pixels_come_in(tmp_path, kind, suffix):
    """Values and alpha must be read exactly."""
    path = write_picture(tmp_path / f"a{suffix}", 75, 50, kind=kind)
    assert read_header(path).kind == kind
    pixels, result = read_picture(path), stream(path, 75, 50, kind)
    assert result.dtype == pixels.dtype and result.shape == (50, 75, kind.channels)
    if not kind.alpha:
        assert np.array_equal(result, pixels)
        return
    assert np.array_equal(result[..., 3], pixels[..., 3])
    assert np.abs(result[..., :3] - over_white(pixels)).max() <= 1
    assert np.array_equal(result[..., :3], stream(path, 75, 50, PixelKind(kind.bits)))


@pytest.mark.parametrize("size", [(40, 31), (150, 100), (40, 100)])
def test_alpha_is_resized_like_a_picture_of_its_own(tmp_path, size):
    """Alpha must be resized like a colour, not premultiplied, which would change its edges and the colours."""
    path = write_picture(tmp_path / "a.png", 75, 50, kind=RGBA16)
    alpha = read_picture(path)[..., 3]
    vips(np.dstack([alpha] * 3), "rgb16").write_to_file(str(tmp_path / "alpha.png"))
    result = stream(path, *size, RGBA16)
    assert np.array_equal(result[..., 3], stream(tmp_path / "alpha.png", *size, RGB16)[..., 0])
    assert np.array_equal(result[..., :3], stream(path, *size, RGB16))


@pytest.mark.parametrize("size", [(40, 31), (150, 100), (40, 100)])
def test_16_bits_stay_16_when_resized(tmp_path, size):
    """A resize in 8 bits would leave bands in smooth gradients."""
    ramp = np.linspace(20_000, 20_900, 50)[:, None] + np.linspace(0, 9, 75)
    smooth = np.dstack([np.rint(ramp)] * 3).astype(np.uint16)
    path = tmp_path / "a.png"
    vips(smooth, "rgb16").write_to_file(str(path))
    deep, shallow = stream(path, *size, RGB16).astype(int), stream(path, *size, RGB8).astype(int)
    assert np.abs(deep - 257 * shallow).max() < 257  # the same image
    assert len(np.unique(deep)) > 100 > len(np.unique(shallow))
    x, y = ((np.arange(side) + 0.5) * old / side - 0.5 for side, old in zip(size, (75, 50), strict=True))
    expected = 20_000 + (900 / 49 * y)[:, None] + 9 / 74 * x
    assert np.abs(deep - expected[..., None])[6:-6, 6:-6].max() <= 1.01  # libvips' own 16-bit arithmetic is off by 30


def test_alpha_of_other_kinds_of_files(tmp_path):
    """Grey images, palettes with a transparent entry and wide-gamut images have alpha too."""
    grey = (np.arange(50 * 40).reshape(40, 50) % 256).astype(np.uint8)
    alpha = grey[::-1]
    vips(np.dstack([grey, alpha]), "b-w").pngsave(str(tmp_path / "grey.png"))
    vips(np.dstack([grey, grey, grey, np.where(alpha > 99, 255, 0).astype(np.uint8)]), "srgb").pngsave(
        str(tmp_path / "palette.png"), palette=True
    )
    wide = vips(np.dstack([grey, grey[:, ::-1], alpha, alpha]), "srgb").copy()
    wide.set_type(pyvips.GValue.blob_type, "icc-profile-data", pyvips.Operation.call("profile_load", "p3"))
    wide.pngsave(str(tmp_path / "wide.png"))
    wide.webpsave(str(tmp_path / "wide.webp"), lossless=True, exact=True)
    for name in ("grey.png", "palette.png", "wide.png", "wide.webp"):
        assert read_header(tmp_path / name).kind == RGBA8, name
        expected = pyvips.Image.new_from_file(str(tmp_path / name)).numpy()[..., -1]
        assert np.array_equal(stream(tmp_path / name, 50, 40, RGBA8)[..., 3], expected), name
    upright = vips(np.dstack([grey, grey, grey, alpha]), "srgb").copy()
    upright.set_type(pyvips.GValue.gint_type, "orientation", 6)
    upright.tiffsave(str(tmp_path / "turned.tif"))
    assert np.array_equal(stream(tmp_path / "turned.tif", 40, 50, RGBA8)[..., 3], np.rot90(alpha, -1))


# --- writing ---


@pytest.mark.parametrize(
    ("name", "compression", "bits", "content", "expected"),
    [
        ("a.tif", "deflate", "auto", RGB8, RGB8),
        ("a.tif", "deflate", "auto", RGBA16, RGBA16),
        ("a.tif", "deflate", 8, RGBA16, RGBA8),
        ("a.tif", "deflate", 16, RGB8, RGB16),
        ("a.tif", "jpeg", "auto", RGBA16, RGB8),
        ("a.PNG", "jpeg", "auto", RGBA16, RGBA16),  # the compression is a TIFF's
        ("a.jpg", "deflate", "auto", RGBA16, RGB8),
        ("a.dz", "deflate", "auto", RGBA16, RGBA8),
        ("a.zarr", "deflate", "auto", RGBA16, RGBA16),
    ],
)
def test_what_an_output_has(name, compression, bits, content, expected):
    """Bits and alpha of an output must be decided before the run."""
    assert picture_kind(Path("/x") / name, bits, compression, content) == expected


@pytest.mark.parametrize("kind", [RGBA8, RGBA16], ids=str)
@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_alpha_is_written_as_it_is(tmp_path, kind, name):
    """The alpha channel must be marked as unassociated (not premultiplied)."""
    pixels = read_picture(write_picture(tmp_path / "source.png", 700, 600, kind=kind))
    write_image(ImageSpec(tmp_path / name, 700, 600, kind), lambda y0, y1: pixels[y0:y1])
    back = pyvips.Image.new_from_file(str(tmp_path / name))
    assert np.array_equal(back.numpy(), pixels)
    assert back.hasalpha() and back.interpretation == ("srgb" if kind.bits == 8 else "rgb16")
    assert back.get("icc-profile-data") == pyvips.Operation.call("profile_load", "srgb")
    if name == "a.tif":
        half = pyvips.Image.new_from_file(str(tmp_path / name), page=1)
        assert (half.width, half.height, half.bands, half.hasalpha()) == (350, 300, 4, True)


def test_a_deepzoom_with_alpha_has_png_tiles(tmp_path):
    """A DeepZoom of JPEG tiles would show black for transparent parts."""
    pixels = read_picture(write_picture(tmp_path / "source.png", 300, 200, kind=RGBA8))
    write_image(ImageSpec(tmp_path / "a.dz", 300, 200, RGBA8), lambda y0, y1: pixels[y0:y1])
    assert 'Format="png"' in (tmp_path / "a.dz" / "a.dzi").read_text()
    tile = read_picture(tmp_path / "a.dz" / "a_files" / "9" / "0_0.png")
    assert np.array_equal(tile, pixels[: tile.shape[0], : tile.shape[1]])


# --- from file to file ---


@pytest.mark.parametrize("state", ["float", "compact"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_content_that_needs_no_change_comes_out_bit_by_bit(tmp_path, kind, state):
    """Without style, a 16-bit content and its alpha must be exported unchanged."""
    keys = {"loss": {"style_weight": 0.0}, "store": {"state_dtype": state, "chunk_px": 32}}
    config = write_run(tmp_path, (150, 110), (60, 50), kind, output="out.tif", initial_size=150, **keys)
    pipeline.run(pipeline.load_config(config))
    content, picture = (read_picture(tmp_path / name) for name in ("content.png", "out.tif"))
    assert picture.dtype == content.dtype and picture.shape == content.shape
    if kind.alpha:
        assert np.array_equal(picture[..., 3], content[..., 3])
        assert np.abs(over_white(picture) - over_white(content)).max() < 1.51  # rounded over white, and without it
    else:
        assert np.array_equal(picture, content)


@pytest.mark.parametrize("name", ["out.tif", "out.png", "out.dz", "out.zarr", "out.jpg"])
def test_the_command_line_passes_alpha_on(tmp_path, call, name):
    """Alpha is preserved if the format supports it; otherwise all colours are visible."""
    config = write_run(tmp_path, (150, 110), (60, 50), RGBA16, output=name, initial_size=80)
    plan = json.loads(call("plan", "-c", config, "--json").out)
    outcome = call("run", "-c", config)
    assert outcome.code == 0, outcome.err
    content, has_alpha = read_picture(tmp_path / "content.png"), name != "out.jpg"
    assert plan["picture"] == {"bits": 16 if name in ("out.tif", "out.png", "out.zarr") else 8, "alpha": has_alpha}
    if name == "out.zarr":
        result = np.moveaxis(zarr.open_group(tmp_path / name, mode="r")["0"][...], 0, 2)
    else:
        path = tmp_path / name / "out_files" / "8" / "0_0.png" if name == "out.dz" else tmp_path / name
        image = pyvips.Image.new_from_file(str(path))
        assert image.get("icc-profile-data")
        result = image.numpy()
    assert result.shape == (110, 150, 4 if has_alpha else 3)
    if name == "out.jpg":
        return
    alpha = content[..., 3]
    assert np.array_equal(result[..., 3], alpha if result.dtype == np.uint16 else np.rint(alpha / 257))


def test_a_wide_gamut_cut_out_of_16_bits_keeps_its_colours_and_its_alpha(tmp_path, call):
    """The input's profile is applied, and the output is tagged as sRGB."""
    config = write_run(tmp_path, (150, 110), (60, 50), RGBA16, loss={"style_weight": 0.0}, output="out.png")
    image = pyvips.Image.new_from_file(str(tmp_path / "content.png"), access="random").copy_memory()
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile(P3_XYZ, None))
    pixels = image.numpy()
    expected = np.rint(in_srgb(pixels[..., :3] / 65535, P3_XYZ, None) * 65535)
    image.write_to_file(str(tmp_path / "wide.tif"))
    assert call("run", "-c", config, "--set", f"content={tmp_path}/wide.tif", "--set", "initial_size=150").code == 0
    result = read_picture(tmp_path / "out.png").astype(int)
    assert np.array_equal(result[..., 3], pixels[..., 3])
    opaque = result[..., 3] == 65535
    assert opaque.sum() > 1000 and np.abs(result[..., :3] - expected)[opaque].max() < 200
    written = pyvips.Image.new_from_file(str(tmp_path / "out.png")).get("icc-profile-data")
    assert written == pyvips.Operation.call("profile_load", "srgb")


def test_an_exported_stage_has_alpha_of_its_own_size(tmp_path, call):
    """An export of an unfinished stage must have the content's alpha too."""
    config = write_run(tmp_path, (150, 110), (60, 50), RGBA16, output="out.tif", initial_size=80)
    assert call("run", "-c", config).code == 0
    small, shallow, flat = (tmp_path / name for name in ("small.png", "shallow.png", "flat.jpg"))
    assert call("export", "--run", tmp_path / "run", "-o", small, "--stage", 1).code == 0
    assert np.array_equal(read_picture(small)[..., 3], stream(tmp_path / "content.png", 80, 59, RGBA16)[..., 3])
    assert call("export", "-c", config, "-o", shallow, "--bits", 8).code == 0
    assert np.array_equal(read_picture(shallow), np.rint(read_picture(tmp_path / "out.tif") / 257).astype(np.uint8))
    assert call("export", "--run", tmp_path / "run", "-o", flat).code == 0
    assert read_picture(flat).shape == (110, 150, 3)
    assert call("export", "--run", tmp_path / "run", "-o", tmp_path / "a.jpg", "--bits", 16).code == 3


def test_a_run_from_before_exports_what_it_had(tmp_path, call):
    """A manifest without bits and alpha must still be read."""
    config = write_run(tmp_path, output="out.tif")
    assert call("run", "-c", config).code == 0
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    path.write_bytes(_manifest_text({key: manifest[key] for key in manifest if key not in ("content", "crc")}))
    assert call("export", "--run", tmp_path / "run", "-o", tmp_path / "again.tif").code == 0
    assert (tmp_path / "again.tif").read_bytes() == (tmp_path / "out.tif").read_bytes()


def test_another_bits_of_the_picture_is_exported_again_and_the_same_is_not(tmp_path, call):
    """Replacing `auto` by its value must not change a finished run."""
    config = write_run(tmp_path, content_kind=RGB16, output="out.tif")
    assert call("run", "-c", config).code == 0
    for bits, again in (("16", False), ("8", True), ("auto", True)):
        outcome = call("run", "-c", config, "--set", f"export.bits={bits}", "--force")
        assert outcome.code == 0 and ("is already there" not in outcome.err) == again, (bits, outcome.err)


# --- the store ---


def test_the_store_keeps_them_and_the_plan_counts_them(tmp_path):
    """The planned disk space must include 16 bits and alpha, and not change for 8-bit contents."""
    plain = 0
    for kind, content_bytes in ((RGB8, 3), (RGB16, 6), (RGBA8, 4), (RGBA16, 8)):
        folder = tmp_path / str(kind)
        config = pipeline.load_config(write_run(folder, (150, 110), (40, 40), kind, initial_size=80, output="out.tif"))
        plan, largest, forms = pipeline.plan(config), 0, {}

        def watch(_event: object, folder: Path = folder, forms: dict[str, str] = forms) -> None:
            nonlocal largest
            chunks = [path for path in (folder / "run").glob("store.zarr/stage_*/*/c/*/*/*") if "gram" not in str(path)]
            largest = max(largest, sum(path.stat().st_size for path in chunks if path.exists()))
            for name in ("content", "alpha"):
                if (path := folder / "run" / "store.zarr" / "stage_0" / name / "zarr.json").exists():
                    forms[name] = json.loads(path.read_text())["data_type"]

        pipeline.run(config, sink=watch)
        dtype = "uint16" if kind.bits == 16 else "uint8"
        assert forms == {"content": dtype, **({"alpha": dtype} if kind.alpha else {})}
        assert 0.9 * plan.disk_bytes <= largest <= plan.disk_bytes
        stored_px = 20 * 32 * 32
        plain = plain or plan.stages[1].store_bytes - 3 * stored_px
        assert plan.stages[1].store_bytes == plain + content_bytes * stored_px
        assert plan.stages[1].kept_bytes == stored_px * (12 + (kind.bits // 8 if kind.alpha else 0))
        assert plan.output_bytes == 150 * 110 * kind.pixel_bytes * 4 // 3
        kept = {path.name for path in (folder / "run" / "store.zarr" / "stage_1").iterdir() if path.is_dir()}
        assert kept == {"canvas_0", *(["alpha"] if kind.alpha else [])}
        assert pipeline.verify(folder / "run").clean


def test_damaged_alpha_of_a_finished_stage_is_not_exported_and_is_made_again(tmp_path):
    """One bad sector would change the edge of the image without a word."""
    config = pipeline.load_config(write_run(tmp_path, (150, 110), (60, 50), RGBA8, initial_size=80, output="out.tif"))
    pipeline.run(config)
    paths = [tmp_path / "run" / "store.zarr" / f"stage_{stage}" / "alpha/c/1/0/0" for stage in (0, 1)]
    whole = paths[1].read_bytes()
    for path in paths:
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(store.ChunkError, match="alpha"):
        pipeline.export(tmp_path / "run", tmp_path / "again.tif")
    pipeline.export(tmp_path / "run", tmp_path / "again.jpg")  # JPEG has no alpha
    report = pipeline.verify(tmp_path / "run", repair=True)
    assert report.clean and ["stage 1 starts again" in step for step in report.steps] == [True]
    pipeline.run(config)
    assert paths[1].read_bytes() == whole


def test_colours_of_16_bits_are_counted_as_they_are(tmp_path):
    """Otherwise `color: content` would match the style to values 257 times too large."""
    store.create_array(tmp_path, "content", (70, 45, 3), 16, "fixed16", "none")
    array = store.open_array(tmp_path, "content")
    codes = np.random.default_rng(0).integers(0, 65536, (70, 45, 3)).astype(np.uint16)
    array.write_window(Rect(0, 70, 0, 45), codes)
    with ThreadExecutor(1) as executor:
        result = color_tasks.statistics(array, executor)
    pixels = codes.reshape(-1, 3) / 257
    assert np.abs(result.mean - pixels.mean(0)).max() < 1e-4
    assert np.abs(result.covariance - np.cov(pixels.T, bias=True)).max() < 1e-2


@pytest.mark.parametrize("color", ["content", "luminance"])
def test_a_deep_cut_out_in_its_own_colours(tmp_path, color):
    """Luminance mode with 16 bits and alpha: the colours are read from the store, in 16 bits."""
    write_run(tmp_path, (150, 110), (60, 50), RGBA16)
    config = write_config(tmp_path, output="out.png", color=color, initial_size=150, optimizer={"max_iterations": 2})
    pipeline.run(pipeline.load_config(config))
    content, picture = read_picture(tmp_path / "content.png"), read_picture(tmp_path / "out.png")
    assert np.array_equal(picture[..., 3], content[..., 3])
    assert np.abs(over_white(picture).mean((0, 1)) - over_white(content).mean((0, 1))).max() < 25 * 257
