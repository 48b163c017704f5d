"""Untrusted input images: their cost is known from the header, and only pixels are ever read."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips

from pipeline.config.sections import LimitsConfig
from pipeline.core.errors import InputError
from pipeline.images import tiff as _tiff
from pipeline.images.header import FORMATS, LOADERS, read_header


def noise(height_px: int, width_px: int, bands: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height_px, width_px, bands), dtype=np.uint8)


def vips(pixels: np.ndarray) -> Any:
    return pyvips.Image.new_from_array(pixels, interpretation="srgb")


def refusal(path: Path, **limits: int) -> str:
    with pytest.raises(InputError) as caught:
        read_header(path, LimitsConfig(**limits))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- sizes ---


def test_pixels_are_limited_at_the_pixel(tmp_path: Path) -> None:
    """A header of a hundred bytes can claim a terapixel; one key allows an image that is really that large."""
    path = tmp_path / "a.png"
    vips(noise(30, 40)).pngsave(str(path))
    assert read_header(path, LimitsConfig(max_pixels=1200)).width_px == 40
    said = refusal(path, max_pixels=1199)
    assert "40×30 px" in said and "limits.max_pixels (1,199)" in said


def test_file_size_is_limited_before_the_file_is_read(tmp_path: Path) -> None:
    """A sparse file of a terabyte takes no disk space, and a day to hash."""
    path = tmp_path / "a.jpg"
    vips(noise(30, 40)).jpegsave(str(path))
    size = path.stat().st_size
    assert read_header(path, LimitsConfig(max_file_bytes=size)).height_px == 30
    assert "limits.max_file_bytes" in refusal(path, max_file_bytes=size - 1)
    with path.open("r+b") as file:
        file.truncate(2**40)
    assert f"{2**40:,} bytes" in refusal(path)


def test_defaults_let_the_largest_pictures_in(tmp_path: Path) -> None:
    """Print sizes up to 100,000×100,000 px must be allowed by default."""
    (tmp_path / "a.tif").write_bytes(tiff([b""] * 100_000, 100_000, 100_000, rows=1))
    header = read_header(tmp_path / "a.tif")
    assert (header.width_px, header.height_px) == (100_000, 100_000)
    (tmp_path / "b.tif").write_bytes(tiff([b""] * 100_001, 100_000, 100_001, rows=1))
    assert "limits.max_pixels" in refusal(tmp_path / "b.tif")


WHOLE: dict[str, Callable[[Any, str], None]] = {
    "progressive.jpg": lambda image, name: image.jpegsave(name, interlace=True),
    "interlaced.png": lambda image, name: image.pngsave(name, interlace=True),
    "a.webp": lambda image, name: image.webpsave(name),
    "a.gif": lambda image, name: image.gifsave(name),
    "a.avif": lambda image, name: image.heifsave(name, compression="av1"),
    "strip.tif": lambda image, name: image.tiffsave(name, compression="jpeg", tile_height=image.height),
    "tiles.tif": lambda image, name: image.tiffsave(name, tile=True, tile_width=512, tile_height=512),
}


@pytest.mark.parametrize("name", WHOLE)
def test_decoding_that_cannot_be_streamed_is_limited(tmp_path: Path, name: str) -> None:
    """A progressive JPEG of a few MB takes gigabytes to decode, so the user must allow it first."""
    path = tmp_path / name
    WHOLE[name](vips(noise(256, 300)), str(path))
    needed = read_header(path).decode_bytes
    assert needed >= 256 * 300 * 3 // 2
    assert read_header(path, LimitsConfig(max_decode_bytes=needed)).decode_bytes == needed
    assert "limits.max_decode_bytes" in refusal(path, max_decode_bytes=needed - 1)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.avif"])
def test_files_that_are_read_whole_are_refused_before(tmp_path: Path, name: str) -> None:
    """libvips reads a whole GIF, WebP or HEIF file into memory to get its size, so the file size is checked before."""
    path = tmp_path / name
    WHOLE[name](vips(noise(64, 64)), str(path))
    with path.open("r+b") as file:
        file.truncate(2**33)
    assert "needs 8.00 GiB" in refusal(path)


def test_channels_are_limited(tmp_path: Path) -> None:
    """A TIFF may have ten thousand channels, and a row of it a gigabyte."""
    bands = vips(noise(9, 9)).bandjoin([vips(noise(9, 9))] * 3)
    bands.tiffsave(str(tmp_path / "a.tif"))
    assert "12 channels" in refusal(tmp_path / "a.tif")


def test_sizes_that_glib_cannot_hold_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """libvips continues with an image of one row and GLib prints a warning: the result would be a stripe."""
    path = tmp_path / "a.avif"
    vips(noise(57, 43)).heifsave(str(path), compression="av1")
    data = path.read_bytes()
    size = data.index(b"ispe") + 8
    path.write_bytes(data[:size] + struct.pack(">II", 43, 395_453_227) + data[size + 8 :])
    assert "395453227" in refusal(path)
    assert capfd.readouterr() == ("", "")


# --- strips and tiles of a TIFF ---


def tiff(strips: list[bytes], width: int, height: int, rows: int, photometric: int = 2, planar: int = 1) -> bytes:
    """A little-endian TIFF of three channels of 8 bits, deflated."""
    entries = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [8] * 3),
        (259, 3, [8]),
        (262, 3, [photometric]),
        (273, 4, [0] * len(strips)),
        (277, 3, [3]),
        (278, 4, [rows]),
        (279, 4, [len(strip) for strip in strips]),
        (284, 3, [planar]),
    ]
    letters = {3: "H", 4: "I"}
    packed = [struct.pack(f"<{len(values)}{letters[kind]}", *values) for _, kind, values in entries]
    block_at = 8 + 2 + 12 * len(entries) + 4
    data_at = block_at + sum(len(values_bytes) for values_bytes in packed if len(values_bytes) > 4)
    offsets = [
        data_at + sum(len(strip) for strip in strips[:index]) if strips[0] else 8 for index in range(len(strips))
    ]
    packed[5] = struct.pack(f"<{len(strips)}I", *offsets)
    head, block = struct.pack("<2sHIH", b"II", 42, 8, len(entries)), b""
    for (tag, kind, values), values_bytes in zip(entries, packed, strict=True):
        inline = values_bytes if len(values_bytes) <= 4 else struct.pack("<I", block_at + len(block))
        block += values_bytes if len(values_bytes) > 4 else b""
        head += struct.pack("<HHI", tag, kind, len(values)) + inline.ljust(4, b"\0")
    return head + struct.pack("<I", 0) + block + b"".join(strips)


def planes(pixels: np.ndarray) -> bytes:
    height, width, _ = pixels.shape
    return tiff([zlib.compress(pixels[..., c].tobytes(), 1) for c in range(3)], width, height, height, planar=2)


MEMORY = """
    import sys, threading
    from pathlib import Path
    import psutil
    from pipeline.images.reader import stream_rgb

    process = psutil.Process()
    peak, base, done = 0, process.memory_info().rss, threading.Event()
    def watch():
        global peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)
    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in stream_rgb(Path(sys.argv[1]), 64, 64, 64):
        pass
    done.set()
    watcher.join()
    print(peak - base)
"""
SIDE_PX = 4000
CUTS: dict[str, Callable[[Path], object]] = {
    "planes": lambda path: path.write_bytes(planes(noise(SIDE_PX, SIDE_PX))),
    "jpeg": lambda path: vips(noise(SIDE_PX, SIDE_PX)).tiffsave(
        str(path), compression="jpeg", tile_height=SIDE_PX, Q=30
    ),
    "tiles": lambda path: vips(noise(SIDE_PX, SIDE_PX)).tiffsave(
        str(path), compression="deflate", tile=True, tile_width=2048, tile_height=2048
    ),
    "narrow": lambda path: vips(noise(SIDE_PX, 64)).tiffsave(
        str(path), compression="deflate", tile=True, tile_width=4096, tile_height=4096
    ),
    "lines": lambda path: vips(noise(SIDE_PX, SIDE_PX // 2)).tiffsave(
        str(path), compression="deflate", tile_height=SIDE_PX
    ),
}


@pytest.mark.parametrize("cut", CUTS)
def test_memory_of_tiffs_is_what_the_header_says(tmp_path: Path, cut: str) -> None:
    """A TIFF of a single strip would exceed the planned memory if its directory were not read."""
    path = tmp_path / "a.tif"
    CUTS[cut](path)
    needed = read_header(path).decode_bytes
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(path)]
    measured = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    assert measured <= needed + 75_000_000, f"{measured / 1e6:.0f} MB, {needed / 1e6:.0f} projected"
    assert needed < 5 * measured  # the estimate must not refuse harmless files


@pytest.mark.parametrize("big", [False, True])
def test_tiff_directory_of_every_kind_is_read(tmp_path: Path, big: bool) -> None:
    """BigTIFF is the very format of images this size."""
    path = tmp_path / "a.tif"
    options = {"tile": True, "tile_width": 128, "tile_height": 64}
    vips(noise(300, 200)).tiffsave(str(path), bigtiff=big, **options)
    data = path.read_bytes()
    assert _tiff.decode_bytes(lambda at, count: data[at : at + count]) == (3 * 2 + 1) * 128 * 64 * 3


def test_damaged_tiff_directories_are_told(tmp_path: Path) -> None:
    """If libtiff accepts a directory that this parser cannot read, the largest memory is assumed."""
    data = tiff([zlib.compress(noise(64, 64).tobytes())], 64, 64, rows=64)
    for cut in range(130):
        with pytest.raises(ValueError):
            _tiff.decode_bytes(lambda at, count, cut=cut: data[:cut][at : at + count])  # type: ignore[misc]
    assert _tiff.decode_bytes(lambda at, count: data[at : at + count]) == 64 * 64 * 3 * 5 // 2
    for start in (b"II*\0", b"MM\0*\0\0\0\x08", b"II+\0", b"MM\0+"):
        data = start.ljust(99, b"\xff")
        with pytest.raises(ValueError):
            _tiff.decode_bytes(lambda at, count, data=data: data[at : at + count])  # type: ignore[misc]


# --- loaders ---


def test_only_loaders_of_pixels_are_there(tmp_path: Path) -> None:
    """An SVG reads other files and the Matlab parser is not fuzzed: such loaders must never be called."""
    image = vips(noise(8, 8))
    image.write_to_file(str(tmp_path / "a.v"))
    (tmp_path / "a.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>')
    (tmp_path / "a.csv").write_text("1,2\n3,4\n")
    (tmp_path / "a.mat").write_bytes(b"MATLAB 5.0 MAT-file".ljust(126) + b"\1IM")
    (tmp_path / "a.fits").write_bytes(b"SIMPLE  =                    T".ljust(2880))
    (tmp_path / "a.hdr").write_bytes(b"#?RADIANCE\n\n-Y 1 +X 1\n\0\0\0\0")
    for name in ("a.v", "a.svg", "a.csv", "a.mat", "a.fits", "a.hdr"):
        assert f"known format ({FORMATS})" in refusal(tmp_path / name)
    # other code in the process can still use all loaders
    assert pyvips.Image.new_from_file(str(tmp_path / "a.v")).width == 8
    assert pyvips.Image.new_from_file(str(tmp_path / "a.csv")).height == 2


def test_a_jpeg_with_a_gain_map_is_a_jpeg(tmp_path: Path) -> None:
    """Phones write such files; libvips' separate loader would give other pixels or refuse them."""
    assert sorted(LOADERS) == ["gifload", "heifload", "jpegload", "pngload", "tiffload", "webpload"]
    vips(noise(16, 16)).jpegsave(str(tmp_path / "a.jpg"))
    data = (tmp_path / "a.jpg").read_bytes()
    gain_map = b"http://ns.adobe.com/hdr-gain-map/1.0/"  # what libvips' separate loader looks for
    app1 = b"\xff\xe1" + struct.pack(">H", 2 + len(gain_map)) + gain_map
    (tmp_path / "a.jpg").write_bytes(data[:2] + app1 + data[2:] + data)
    assert read_header(tmp_path / "a.jpg").loader == "jpegload"


def test_options_in_names_are_part_of_the_name(tmp_path: Path) -> None:
    """A name such as a.png[page=3] must not be parsed as a file name with loader options."""
    vips(noise(16, 16)).pngsave(str(tmp_path / "a.png"))
    with pytest.raises(InputError, match=re.escape("a.png[access=random]: no such file")):
        read_header(tmp_path / "a.png[access=random]")
