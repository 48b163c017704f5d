"""Files of several pages, and files whose codec this build of libvips lacks."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import pyvips

from pipeline.core.errors import InputError
from pipeline.core.image_formats import PixelKind
from pipeline.images import read_header, stream_rgb

OME = '<?xml version="1.0"?><OME><Image><Pixels SizeC="{c}" SizeT="1" SizeX="64" SizeY="48" SizeZ="{z}"/></Image></OME>'


def picture(dtype: type = np.uint8) -> np.ndarray:
    y, x = np.mgrid[0:48, 0:64]
    return (np.stack([x * 4, y * 5, 255 - x * 4], -1) * (257 if dtype == np.uint16 else 1)).astype(dtype)


def pages(path: Path, pixels: np.ndarray, description: str) -> Path:
    """The channels as pages of a TIFF, as OME-TIFF has them."""
    planes = np.concatenate(np.moveaxis(pixels, 2, 0))
    image = pyvips.Image.new_from_array(np.ascontiguousarray(planes)).copy()
    image.set_type(pyvips.GValue.gint_type, "page-height", pixels.shape[0])
    image.set_type(pyvips.GValue.gstr_type, "image-description", description)
    image.tiffsave(str(path))
    return path


@pytest.mark.parametrize(
    "description",
    [OME.format(c=3, z=1), '{"shape": [3, 48, 64]}', "ImageJ=1.11a\nimages=3\nchannels=3\nmode=composite\n"],
    ids=["OME", "tifffile", "ImageJ"],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_red_green_and_blue_pages_are_a_colour_picture(tmp_path: Path, description: str, dtype: type) -> None:
    """A slide of QuPath or bfconvert would be rendered as a grey picture of its red."""
    path = pages(tmp_path / "a.tif", picture(dtype), description)
    header = read_header(path)
    assert header.notes == ("its 3 pages are read as red, green and blue",)
    kind = PixelKind(header.bits)
    ((_, rows),) = stream_rgb(path, 64, 48, 64, kind=kind)
    assert np.array_equal(rows, picture(dtype))


@pytest.mark.parametrize(
    ("channels", "description"), [(3, OME.format(c=1, z=3)), (3, ""), (4, OME.format(c=4, z=1)), (3, '{"shape": [')]
)
def test_of_other_pages_the_first_is_used_and_that_is_said(tmp_path: Path, channels: int, description: str) -> None:
    """A stack of depths is no colour picture, and a page in silence may be the wrong one."""
    pixels = np.dstack([picture(), picture()[..., :1]])[..., :channels]
    header = read_header(pages(tmp_path / "a.tif", pixels, description))
    assert header.bands == 1 and "of which the first alone is read" in header.notes[0]


def test_levels_of_a_pyramid_are_no_pages(tmp_path: Path) -> None:
    """Our own TIFFs would be remarked on."""
    image = pyvips.Image.new_from_array(picture(), interpretation="srgb")
    image.tiffsave(str(tmp_path / "a.tif"), pyramid=True, tile=True, tile_width=16, tile_height=16)
    assert read_header(tmp_path / "a.tif").notes == ()


def with_tag(path: Path, number: int, value: int) -> None:
    """Change a short of the first directory of a little-endian TIFF."""
    data = bytearray(path.read_bytes())
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, entry)[0] == number:
            struct.pack_into("<H", data, entry + 8, value)
    path.write_bytes(data)


@pytest.mark.parametrize("codec", [6, 34712, 34887, 34925, 50000, 50002])
def test_a_codec_that_is_not_built_in_is_named_before_the_run(tmp_path: Path, codec: int) -> None:
    """Old JPEG, JPEG 2000, LERC, LZMA, zstd, JPEG XL: an intact file was called damaged, hours into a run."""
    path = tmp_path / "a.tif"
    pyvips.Image.new_from_array(picture(), interpretation="srgb").tiffsave(str(path))
    with_tag(path, 259, codec)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert "cannot decode" in str(caught.value) and "Save it as" in str(caught.value)
    assert "damaged," not in str(caught.value)


def test_a_jpeg_of_12_bits_is_named_too(tmp_path: Path) -> None:
    """Scanners for film and X-rays write them."""
    path = tmp_path / "a.jpg"
    data = bytearray(pyvips.Image.new_from_array(picture(), interpretation="srgb").jpegsave_buffer(keep="none"))
    data[data.index(b"\xff\xc0") + 4] = 12
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"precision 12.*JPEG of 8 bits"):
        read_header(path)


def test_damage_is_still_called_damage(tmp_path: Path) -> None:
    """The advice to save it in another format would not help."""
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    pyvips.Image.new_from_array(noise, interpretation="srgb").pngsave(str(path))
    path.write_bytes(path.read_bytes()[:-40_000])
    read_header(path)
    with pytest.raises(InputError, match="damaged, truncated"):
        list(stream_rgb(path, 200, 200, 64))
