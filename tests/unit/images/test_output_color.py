"""Writing colours: profiles of the output, and the conversion to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips

from pipeline.core.color_spaces import space_matrix
from pipeline.core.errors import ConfigError
from pipeline.core.image_formats import PixelKind
from pipeline.images import icc
from pipeline.images.output_color import OutputColors, check_colors, output_profile, wanted_space
from pipeline.images.writer import ImageSpec, write_image
from tests.support import colors as reference
from tests.support.pictures import rows_of

CMYK = bytes(pyvips.Operation.call("profile_load", "cmyk"))


def picture(channels: int = 3) -> np.ndarray:
    """A canvas, 0..255."""
    return np.random.default_rng(0).uniform(0, 255, (40, 60, channels)).astype(np.float32)


def written(path: Path, canvas: np.ndarray, colors: OutputColors, kind: PixelKind = PixelKind(8)) -> Any:  # noqa: B008
    bits = colors.rows_kind(kind).bits
    pixels = np.concatenate([colors.convert(canvas[..., :3]), canvas[..., 3:]], axis=2)
    rows = np.rint(pixels * ((2**bits - 1) / 255)).astype(np.uint8 if bits == 8 else np.uint16)
    write_image(ImageSpec(path, 60, 40, kind, colors=colors), rows_of(rows))
    return pyvips.Image.new_from_file(str(path))


@pytest.mark.parametrize("name", ["adobe-rgb", "display-p3"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("space", ["srgb", "adobe-rgb"])
def test_the_output_has_the_colours_of_the_canvas(tmp_path: Path, name: Any, bits: int, space: Any) -> None:
    """A print shop that asks for Adobe RGB gets the same picture in it, and not other colours under its name."""
    canvas, colors = picture(), OutputColors(output_profile(name, None), space)
    image = written(tmp_path / "a.png", canvas, colors, PixelKind(bits))
    assert image.get("icc-profile-data") == output_profile(name, None).data
    matrix, gamma = {"adobe-rgb": (reference.ADOBE_XYZ, 563 / 256), "display-p3": (reference.P3_XYZ, None)}[name]
    seen = reference.lab(image.numpy() / (2**bits - 1), matrix, gamma)
    wanted = reference.lab(canvas / 255, space_matrix(space), None)
    inside = space == "srgb" or name == "adobe-rgb"
    assert not inside or np.percentile(reference.delta_e(seen, wanted), 95) < (1.2 if bits == 8 else 0.4)


def test_cmyk_is_written_through_its_profile(tmp_path: Path) -> None:
    """A print shop that asks for CMYK gets its own inks: the file looks as the canvas does, where inks can."""
    canvas = np.empty((40, 60, 3), np.float32)
    canvas[:] = [[150, 120, 100]]
    canvas[20:] = 255
    for bits in (8, 16):
        image = written(tmp_path / f"{bits}.tif", canvas, OutputColors(icc.parse(CMYK)), PixelKind(bits))
        assert (image.interpretation, image.bands) == ("cmyk", 4) and image.get("icc-profile-data") == CMYK
        assert image.numpy()[30, 30].max() <= 2 ** (bits - 8)  # paper
        seen = image.icc_transform("srgb", embedded=True, intent="relative", black_point_compensation=True).numpy()
        assert np.abs(seen[10, 10] / (1 if seen.dtype == np.uint8 else 257) - [150, 120, 100]).max() < 14


def test_an_rgb_printer_of_tables_keeps_the_alpha(tmp_path: Path) -> None:
    """Only CMYK is written without alpha. A table profile is made of the profile of a matrix, without its matrix."""
    colors = OutputColors(icc.parse(icc.builtin_profile("adobe-rgb").data))
    by_tables = OutputColors(icc.Profile("a printer", "RGB", "prtr", colors.profile.data))
    canvas = picture(4)
    for bits in (8, 16):
        kind = PixelKind(bits, alpha=True)
        exact, tables = (written(tmp_path / "a.png", canvas, how, kind).numpy() for how in (colors, by_tables))
        assert np.array_equal(exact[..., 3], tables[..., 3])
        assert np.abs(exact.astype(int) - tables).max() <= (1 if bits == 8 else 100)


def test_profiles_that_cannot_be_used_are_refused_in_a_sentence(tmp_path: Path) -> None:
    """A day of rendering must not end at a profile that is missing, of a scanner, or for another format."""
    grey = reference.profile(reference.SRGB_XYZ, 1.0, b"GRAY")
    cases = {"text.icc": b"no profile", "grey.icc": grey, "link.icc": CMYK[:12] + b"link" + CMYK[16:]}
    scanner = CMYK.replace(b"B2A0", b"xxx0")
    for name, data in {**cases, "scanner.icc": scanner}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=name):
            output_profile(tmp_path / name, None)
    with pytest.raises(ConfigError, match="no such file"):
        output_profile(tmp_path / "gone.icc", None)
    for suffix in (".png", ".jpg", ".dz"):
        with pytest.raises(ConfigError, match=r"Use \.tif"):
            check_colors(tmp_path / f"a{suffix}", OutputColors(icc.parse(CMYK)), "deflate")


def test_the_canvas_is_as_wide_as_its_output_asks(tmp_path: Path) -> None:
    """Where the space is too small colours are clipped, where it is too large the network sees pale ones."""
    spaces = {name: wanted_space(icc.parse(reference.profile(*of))) for name, of in reference.WIDE.items()}
    assert spaces == {"adobe": "adobe-rgb", "prophoto": "prophoto", "p3": "display-p3"}
    assert wanted_space(icc.parse(CMYK)) == "adobe-rgb" and wanted_space(icc.builtin_profile("srgb")) == "srgb"


def test_the_content_s_profile_is_found(tmp_path: Path) -> None:
    """`profile: content` without a profile, or with one of grey, is sRGB."""
    pixels = np.full((40, 60, 3), 100, np.uint8)
    wide = reference.profile(*reference.WIDE["prophoto"])
    reference.write_tagged(tmp_path / "wide.tif", pixels, wide)
    reference.write_tagged(tmp_path / "plain.tif", pixels, None)
    grey = reference.profile(reference.SRGB_XYZ, 2.2, b"GRAY")
    reference.write_tagged(tmp_path / "grey.tif", pixels[..., :1], grey)
    found = [output_profile("content", tmp_path / f"{name}.tif").data for name in ("wide", "plain", "grey")]
    assert found == [wide, icc.builtin_profile("srgb").data, icc.builtin_profile("srgb").data]
