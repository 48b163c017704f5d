"""Turning photos upright: in a scratch file of the run where they are large, never in the system's temporary folder."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import pyvips

from pipeline.core.errors import SpaceError
from pipeline.core.vgg_layers import VGG19_WIDTHS
from pipeline.images import read_header, stream_rgb, upright
from pipeline.plan import Device
from pipeline.plan.plan import make_plan
from tests.support.plans import Header, config_of
from tests.unit.images.test_images import UPRIGHT


def photo(path: Path, orientation: int, *, deep: bool = False) -> np.ndarray:
    pixels = np.random.default_rng(orientation).integers(0, 256, (90, 41, 3), np.uint8)
    if deep:
        pixels = pixels.astype(np.uint16) * 257
    image = pyvips.Image.new_from_array(pixels, interpretation="rgb16" if deep else "srgb").copy()
    image.set_type(pyvips.GValue.gint_type, "orientation", orientation)
    image.tiffsave(str(path))
    return UPRIGHT[orientation](pixels)


@pytest.mark.parametrize("orientation", [3, 4, 5, 6, 7, 8])
def test_a_large_photo_is_turned_in_the_folder_of_the_run(tmp_path: Path, monkeypatch, orientation: int) -> None:
    """A full or missing /tmp ended the run with the words that the photo is damaged."""
    expected = photo(tmp_path / "a.tif", orientation)
    scratch = tmp_path / "scratch [x]"
    scratch.mkdir()
    monkeypatch.setattr(upright, "SCRATCH_BYTES", 0)
    monkeypatch.setattr(upright, "_BAND_ROWS_PX", 16)  # several bands
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    height, width, _ = expected.shape
    bands = [rows for _, rows in stream_rgb(tmp_path / "a.tif", width, height, 32, scratch=scratch)]
    assert np.array_equal(np.concatenate(bands), expected)
    assert list(scratch.iterdir()) == []


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch) -> None:
    """Exit 5, to free space, and not 3, to replace an intact photo. The largest size of a file acts as a full disk."""
    photo(tmp_path / "a.tif", 6)
    monkeypatch.setattr(upright, "SCRATCH_BYTES", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(SpaceError):
            list(stream_rgb(tmp_path / "a.tif", 90, 41, 64, scratch=tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


def test_the_scratch_file_is_planned(tmp_path: Path, monkeypatch) -> None:
    """Else the run stops half-way on a disk that was found large enough."""
    photo(tmp_path / "a.tif", 6, deep=True)
    monkeypatch.setattr("pipeline.images.header.SCRATCH_BYTES", 0)
    header = read_header(tmp_path / "a.tif")
    assert header.scratch_bytes == 90 * 41 * 6
    config = config_of(styles=[{"image": "/s0.png"}])
    disk_bytes = []
    for scratch_bytes in (0, 10**9):
        images = {Path("/c.png"): Header(90, 41, scratch_bytes=scratch_bytes), Path("/s0.png"): Header(70, 90)}
        disk_bytes.append(make_plan(config, images, VGG19_WIDTHS, 0, Device("cpu", "cpu", 0)).disk_bytes)
    assert disk_bytes[1] - disk_bytes[0] == 10**9
