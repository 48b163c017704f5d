"""The resolution of inputs and outputs, read by other libraries: a print shop takes the size on paper from it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.core.image_formats import PixelKind
from pipeline.images import read_header
from pipeline.images.writer import ImageSpec, write_image
from pipeline.store.ome_zarr import write_ome_zarr
from tests.support.pictures import rows_of, write

PICTURE = Image.fromarray(np.zeros((20, 30, 3), np.uint8))


def exif(dpi: float, unit: int = 2) -> Image.Exif:
    values = Image.Exif()
    values[282] = values[283] = dpi
    values[296] = unit
    return values


@pytest.mark.parametrize(
    ("name", "options", "dpi"),
    [
        ("a.png", {"dpi": (300, 300)}, 300),
        ("a.png", {"dpi": (72, 72)}, 72),
        ("a.png", {}, None),
        ("a.png", {"exif": exif(240)}, 240),
        ("a.jpg", {"dpi": (300, 300)}, 300),
        ("a.jpg", {}, None),
        ("a.jpg", {"exif": exif(240)}, 240),
        ("a.webp", {"exif": exif(240)}, 240),
        ("a.webp", {"exif": exif(100, unit=3)}, 254),
        ("a.webp", {}, None),
        ("a.gif", {}, None),
        ("a.tif", {"dpi": (300, 300)}, 300),
        ("a.tif", {}, None),
        ("a.tif", {"dpi": (25.4, 25.4)}, None),  # the picture of a program that uses libvips and knew none
    ],
)
def test_the_stated_resolution_is_read(tmp_path, name, options, dpi):
    """A guess of the library (25.4 or 72 dpi) taken for the file's own would make the print metres wide."""
    PICTURE.save(tmp_path / name, **options)
    assert read_header(tmp_path / name).dpi == dpi


@pytest.mark.parametrize(("unit", "dpi"), [("INCH", 118), ("CENTIMETER", 299.72), ("NONE", None)])
def test_the_unit_of_a_tiff_is_read(tmp_path, unit, dpi):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.asarray(PICTURE), photometric="rgb", resolution=(118, 118), resolutionunit=unit)
    assert read_header(path).dpi == dpi


@pytest.mark.parametrize("dpi", [0.001, 1e7])
def test_an_impossible_resolution_is_none(tmp_path, dpi):
    PICTURE.save(tmp_path / "a.tif", dpi=(dpi, dpi))
    assert read_header(tmp_path / "a.tif").dpi is None


KINDS = [PixelKind(8), PixelKind(16), PixelKind(8, alpha=True), PixelKind(16, alpha=True)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dpi", [300, 122.4])
def test_a_tiff_says_it_in_inches(tmp_path, kind, dpi):
    pixels = noise(kind)
    write(tmp_path / "a.tif", pixels, dpi=dpi)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        page = file.pages[0]
        assert page.tags["ResolutionUnit"].value.name == "INCH"
        for name in ("XResolution", "YResolution"):
            numerator, denominator = page.tags[name].value
            assert numerator / denominator == pytest.approx(dpi, rel=1e-6)
        np.testing.assert_array_equal(page.asarray(), pixels)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_png_says_it_in_metres(tmp_path, kind):
    write(tmp_path / "a.png", noise(kind), dpi=300)
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
        assert image.size == (61, 37)


def test_a_jpeg_says_it_in_jfif(tmp_path):
    """JFIF has whole numbers; programs that lay out pages read no other place of a JPEG without EXIF."""
    pixels = noise(PixelKind(8))
    write(tmp_path / "a.jpg", pixels, dpi=149.7, quality=100)
    with Image.open(tmp_path / "a.jpg") as image:
        assert (image.info["jfif_density"], image.info["jfif_unit"]) == ((150, 150), 1)
        assert image.info["icc_profile"]
        assert np.abs(np.asarray(image).astype(int) - pixels).mean() < 20  # noise, with subsampled colours


def test_a_jpeg_on_a_full_disk_is_a_storage_error(small_disk):
    pixels = np.random.default_rng(0).integers(0, 256, (4000, 4000, 3), np.uint8)
    spec = ImageSpec(small_disk / "a.jpg", 4000, 4000, dpi=300, quality=100)
    with pytest.raises(Exception, match="No space left on device"):
        write_image(spec, rows_of(pixels))
    assert not list(small_disk.iterdir())


def test_an_ome_zarr_has_axes_in_millimetres(tmp_path):
    path, pixels = tmp_path / "a.zarr", noise(PixelKind(8))
    write_ome_zarr(path, pixels.shape[:2], PixelKind(8), rows_of(pixels), dpi=254, chunk_px=32)
    image = json.loads((path / "zarr.json").read_text())["attributes"]["ome"]["multiscales"][0]
    assert [axis.get("unit") for axis in image["axes"]] == [None, "millimeter", "millimeter"]
    scales = [level["coordinateTransformations"][0]["scale"] for level in image["datasets"]]
    np.testing.assert_allclose(scales, [[1, 0.1, 0.1], [1, 0.2, 0.2]])


def noise(kind: PixelKind) -> np.ndarray:
    dtype = np.uint8 if kind.bits == 8 else np.uint16
    return np.random.default_rng(0).integers(0, 2**kind.bits, (37, 61, kind.channels), dtype)
