"""Reading colours: what files say about them, against plain arithmetic."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import pyvips

from pipeline.core.color_spaces import SPACES, smallest_space, space_matrix
from pipeline.core.errors import InputError
from pipeline.core.image_formats import PixelKind
from pipeline.images import icc
from pipeline.images.color import Colors
from pipeline.images.header import read_header
from pipeline.images.reader import stream_rgb
from tests.support import colors as reference

SIZE = (48, 64)


def noise(channels: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (*SIZE, channels), dtype=dtype)


def read(path: Path, bits: int = 8, alpha: bool = False, colors: Colors = Colors()) -> np.ndarray:  # noqa: B008
    header = read_header(path)
    bands = stream_rgb(path, header.width_px, header.height_px, 16, kind=PixelKind(bits, alpha), colors=colors)
    return np.concatenate([rows for _, rows in bands])


def off(result: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in levels of 255; `expected`: 0..1."""
    return float(np.abs(result / np.iinfo(result.dtype).max - expected).max() * 255)


# Profiles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference.WIDE)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_wide_gamut_pictures_become_srgb_exactly(tmp_path: Path, name: str, dtype: type) -> None:
    """16-bit pictures from Lightroom and Photoshop were off by up to 22 of 255 levels, those of 8 bits were not."""
    matrix, gamma = reference.WIDE[name]
    pixels = noise(3, dtype)
    reference.write_tagged(tmp_path / "a.tif", pixels, reference.profile(matrix, gamma))
    expected = reference.in_srgb(pixels / np.iinfo(dtype).max, matrix, gamma)
    result = read(tmp_path / "a.tif", 8 * np.dtype(dtype).itemsize)
    assert off(result, expected) < (0.5 if dtype == np.uint16 else 1.6)


def test_linear_grey_of_16_bits_keeps_its_shadows(tmp_path: Path) -> None:
    """Scans and renders in linear grey were off by 8.7 levels in the shadows."""
    pixels = np.linspace(0, 2000, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(*SIZE, 1)
    grey = reference.profile(reference.SRGB_XYZ, 1.0, b"GRAY")
    reference.write_tagged(tmp_path / "a.tif", pixels, grey)
    expected = np.broadcast_to(reference.encoded(pixels / 65535), (*SIZE, 3))
    assert off(read(tmp_path / "a.tif", 16), expected) < 0.05


def test_cmyk_of_16_bits_is_as_its_8_bit_twin(tmp_path: Path) -> None:
    """A CMYK file from a print shop has the colours that its 8-bit version has."""
    cmyk, pixels = bytes(pyvips.Operation.call("profile_load", "cmyk")), noise(4) // 2
    reference.write_tagged(tmp_path / "a.tif", pixels, cmyk)
    reference.write_tagged(tmp_path / "b.tif", pixels.astype(np.uint16) * 257, cmyk)
    difference = np.abs(read(tmp_path / "b.tif", 16) / 257 - read(tmp_path / "a.tif"))
    assert np.percentile(difference, 99) < 1.6 and difference.max() < 4  # both by a table, in other steps


def test_a_profile_of_other_pixels_is_passed_over(tmp_path: Path) -> None:
    """A grey profile in an RGB file, or a damaged one, is no reason to refuse what every browser shows."""
    pixels = noise(3, np.uint16)
    for data in (reference.profile(reference.SRGB_XYZ, 1.0, b"GRAY"), reference.profile(reference.SRGB_XYZ, 1.8)[:200]):
        reference.write_tagged(tmp_path / "a.tif", pixels, data)
        assert np.array_equal(read(tmp_path / "a.tif", 16), pixels)


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4])
def test_every_curve_function_of_icc_is_read(kind: int) -> None:
    """Profiles of version 4 have any of five functions; a wrong one changes the brightness of the whole picture."""
    g, a, b, c, d, e, f = 2.2, 0.9, 0.1, 0.05, 0.3, 0.02, 0.01
    values = [(g,), (g, a, b), (g, a, b, c), (g, a, b, c, d), (g, a, b, c, d, e, f)][kind]
    tag = (
        b"para" + bytes(4) + struct.pack(">HH", kind, 0) + b"".join(struct.pack(">i", round(v * 65536)) for v in values)
    )
    x = np.linspace(0, 1, 257)
    upper = (a * x + b) ** g
    expected = [x**g, upper, upper + c, np.where(x >= d, upper, c * x), np.where(x >= d, upper + e, c * x + f)][kind]
    table = icc.Profile("", "RGB", "mntr", b"", None, (tag,)).tables(257)[:, 0]
    assert np.abs(table - np.clip(expected, 0, 1)).max() < 1e-4


@pytest.mark.parametrize("space", SPACES)
def test_profiles_that_are_written_say_what_they_are(space: str) -> None:
    """Another program must see the colours that were meant: littlecms reads our profile as the matrix says."""
    assert smallest_space(icc.space_profile(space).matrix) == space
    pixels = noise(3, np.uint8)
    image = pyvips.Image.new_from_array(pixels, interpretation="srgb").copy()
    image.set_type(pyvips.GValue.blob_type, "icc-profile-data", icc.space_profile(space).data)
    seen = image.icc_transform("srgb", embedded=True, intent="relative").numpy()
    assert off(seen, reference.in_srgb(pixels / 255, space_matrix(space), None)) < 1.6


# Channels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("extra", [(0,), (0, 0), (2, 0), (0, 2), (0, 0, 0)])
def test_saved_selections_and_spot_colours_are_passed_over(tmp_path: Path, extra: tuple[int, ...], dtype: type) -> None:
    """Photoshop writes them behind RGB: the picture is the picture, and only a channel that says so is its alpha."""
    pixels = noise(3 + len(extra), dtype)
    reference.write_tiff(tmp_path / "a.tif", pixels, 2, extra)
    header, bits = read_header(tmp_path / "a.tif"), 8 * np.dtype(dtype).itemsize
    assert header.kind.alpha == (2 in extra) and header.colors.ignored == len(extra) - header.kind.alpha
    result = read(tmp_path / "a.tif", bits, header.kind.alpha)
    if not header.kind.alpha:
        assert np.array_equal(result, pixels[..., :3])
        return
    largest = np.iinfo(dtype).max
    alpha = pixels[..., 3 + extra.index(2), np.newaxis] / largest
    assert off(result, np.dstack([pixels[..., :3] / largest * alpha + 1 - alpha, alpha])) < 1.01


def test_rgb_without_a_word_about_its_fourth_channel_has_alpha(tmp_path: Path) -> None:
    """Files of writers that leave the tag out were always read so."""
    reference.write_tiff(tmp_path / "a.tif", noise(4), 2)
    assert read_header(tmp_path / "a.tif").kind.alpha


def test_cmyk_with_spot_colours_is_cmyk(tmp_path: Path) -> None:
    """Packaging files have spots behind CMYK, and were refused with libvips' words about vectors."""
    pixels = noise(6)
    reference.write_tiff(tmp_path / "a.tif", pixels, 5, (0, 0))
    reference.write_tiff(tmp_path / "b.tif", pixels[..., :4], 5)
    assert np.array_equal(read(tmp_path / "a.tif"), read(tmp_path / "b.tif"))


@pytest.mark.parametrize("samples", [3, 4])
def test_three_grey_channels_are_rgb(tmp_path: Path, samples: int) -> None:
    """Python's tools write RGB without saying so; one of its planes as a grey picture would be a silent loss."""
    pixels = noise(samples)
    reference.write_tiff(tmp_path / "a.tif", pixels, 1, (0,) * (samples - 1))
    assert np.array_equal(read(tmp_path / "a.tif"), pixels[..., :3])


# Lab ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
def test_icclab_is_converted(tmp_path: Path, bits: int) -> None:
    """Drum scans in ICC's L*a*b* were shown with their raw numbers as red, green and blue."""
    colors = np.array([[53.7, 0, 0], [100, 0, 0], [0, 0, 0], [60, 40, -30], [50, -30, 20]])
    scale = np.array([255 / 100, 1, 1]) if bits == 8 else np.array([65280 / 100, 256, 256])
    offset = np.array([0, 128, 128]) * (1 if bits == 8 else 256)
    stored = np.rint(colors * scale + offset).astype(np.uint8 if bits == 8 else np.uint16)
    reference.write_tiff(tmp_path / "a.tif", np.tile(stored, (16, 4, 1)), 9)
    lab = (stored - offset) / scale
    f = np.stack(
        [(lab[:, 0] + 16) / 116 + lab[:, 1] / 500, (lab[:, 0] + 16) / 116, (lab[:, 0] + 16) / 116 - lab[:, 2] / 200], 1
    )
    xyz = np.where(f > 6 / 29, f**3, (116 * f - 16) * 27 / 24389) * reference.D50
    expected = reference.encoded(xyz @ np.linalg.inv(reference.SRGB_XYZ).T)
    assert off(read(tmp_path / "a.tif", bits)[0, :5], expected) < 1.01


def test_lab_that_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """An intact file must not be called damaged, and L*a*b* of another kind must not be shown as RGB."""
    for photometric, words in ((8, "CIELAB colours of 8 bits"), (10, "photometric interpretation 10")):
        reference.write_tiff(tmp_path / "a.tif", noise(3), photometric)
        with pytest.raises(InputError, match=words):
            read_header(tmp_path / "a.tif")


# PNG without a profile ------------------------------------------------------------------------------------------------

SRGB_XY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
ADOBE_XY = (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)


def gamma(value: int) -> bytes:
    return struct.pack(">I", value)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_gamma_of_a_png_is_honoured(tmp_path: Path, channels: int) -> None:
    """A render in linear light was shown far too dark: 128 is 188."""
    pixels = noise(channels)
    reference.write_png(tmp_path / "a.png", pixels, gAMA=gamma(100_000))
    expected = np.broadcast_to(reference.encoded(pixels / 255), (*SIZE, 3))
    assert off(read(tmp_path / "a.png"), expected) < 0.51


def test_the_primaries_of_a_png_are_honoured(tmp_path: Path) -> None:
    """Colours of an Adobe RGB picture without a profile were off by up to 142 levels."""
    pixels = noise(3)
    reference.write_png(tmp_path / "a.png", pixels, gAMA=gamma(45455), cHRM=reference.chromaticities(*ADOBE_XY))
    assert off(read(tmp_path / "a.png"), reference.in_srgb(pixels / 255, reference.ADOBE_XYZ, None)) < 0.8


def test_code_points_of_a_png_are_honoured(tmp_path: Path) -> None:
    """Pictures of phones say Display P3 with a cICP chunk, which counts before all others."""
    pixels = noise(3)
    reference.write_png(tmp_path / "a.png", pixels, cICP=bytes([12, 13, 0, 1]), gAMA=gamma(100_000))
    assert off(read(tmp_path / "a.png"), reference.in_srgb(pixels / 255, reference.P3_XYZ, None)) < 0.9


@pytest.mark.parametrize(
    "chunks",
    [
        {"gAMA": gamma(45455)},
        {"gAMA": gamma(45455), "cHRM": reference.chromaticities(*SRGB_XY)},
        {"sRGB": b"\0", "gAMA": gamma(100_000)},
        {"gAMA": gamma(0)},
        {"gAMA": gamma(1)},
        {"gAMA": b"\0"},
        {"cHRM": bytes(32)},
        {"cICP": bytes([9, 16, 0, 1])},
    ],
)
def test_a_png_that_means_srgb_or_nonsense_is_read_as_it_is(tmp_path: Path, chunks: dict[str, bytes]) -> None:
    """Nearly every PNG says gamma 1/2.2: its pixels must stay what they were, bit for bit."""
    pixels = noise(3)
    reference.write_png(tmp_path / "a.png", pixels, **chunks)
    try:
        assert np.array_equal(read(tmp_path / "a.png"), pixels)
    except InputError as error:  # libpng refuses some of them itself
        assert "not an intact image" in str(error)


# Wide canvases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference.WIDE)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_wide_canvas_holds_a_wide_picture(tmp_path: Path, name: str, dtype: type) -> None:
    """Read into the space that its profile needs, no colour of the content is clipped."""
    matrix, gamma = reference.WIDE[name]
    pixels, space = noise(3, dtype), smallest_space(matrix)
    reference.write_tagged(tmp_path / "a.tif", pixels, reference.profile(matrix, gamma))
    result = read(tmp_path / "a.tif", 8 * np.dtype(dtype).itemsize, colors=Colors(space))
    seen = reference.lab(result / np.iinfo(dtype).max, space_matrix(space), None)
    wanted = reference.lab(pixels / np.iinfo(dtype).max, matrix, gamma)
    assert np.percentile(reference.delta_e(seen, wanted), 95) < (0.1 if dtype == np.uint16 else 1.0)


def test_srgb_and_alpha_in_a_wide_canvas(tmp_path: Path) -> None:
    """A style in sRGB beside a wide content keeps its colours, grey its numbers, and alpha is no colour."""
    pixels = noise(4)
    pixels[:8, :, :3] = pixels[:8, :, :1]
    pixels[:16, :, 3] = 255
    pyvips.Image.new_from_array(pixels, interpretation="srgb").write_to_file(str(tmp_path / "a.png"))
    result = read(tmp_path / "a.png", 16, True, Colors("adobe-rgb"))
    assert np.array_equal(result[..., 3], pixels[..., 3].astype(np.uint16) * 257)
    assert off(result[:8, :, :3], pixels[:8, :, :3] / 255) < 0.1
    seen = reference.in_srgb(result[:16, :, :3] / 65535, reference.ADOBE_XYZ, None)
    assert np.abs(seen - pixels[:16, :, :3] / 255).max() * 255 < 0.3


def test_a_proof_asks_for_nothing_that_cannot_be_printed(tmp_path: Path) -> None:
    """Content and styles come back from a printer's profile: greys stay, the brightest green does not."""
    profile = icc.parse(bytes(pyvips.Operation.call("profile_load", "cmyk")))
    pixels = np.array([[[128, 128, 128], [255, 255, 255], [0, 255, 0], [150, 120, 100]]], np.uint8).repeat(32, 0)
    pyvips.Image.new_from_array(pixels, interpretation="srgb").write_to_file(str(tmp_path / "a.png"))
    grey, white, green, skin = read(tmp_path / "a.png", 16, colors=Colors("srgb", profile))[0] / 257
    # libvips' profile darkens greys a little on the way there and back
    assert np.abs(grey - 128).max() < 12 and np.abs(white - 255).max() < 1 and np.abs(skin - [150, 120, 100]).max() < 14
    assert np.ptp(grey) < 3 and green[0] > 50
