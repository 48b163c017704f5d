"""Reading, resizing and writing images with libvips, against whole-image references."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
import textwrap
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips

from pipeline.commands.preview.cut import cut_file
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError, InputError, SpaceError, Stopped
from pipeline.core.tiling import Rect
from pipeline.images.header import read_header
from pipeline.images.output_check import check_output
from pipeline.images.reader import stream_rgb
from pipeline.images.resize import resize_window, smoothed, source_window
from pipeline.images.writer import ImageSpec, write_image
from tests.support.pictures import measured_mb, picture, write


def vips(pixels: np.ndarray, interpretation: str = "srgb") -> Any:
    return pyvips.Image.new_from_array(np.ascontiguousarray(pixels), interpretation=interpretation)


def with_field(image: Any, name: str, value: Any) -> Any:
    image = image.copy()
    kind = pyvips.GValue.blob_type if isinstance(value, bytes) else pyvips.GValue.gint_type
    image.set_type(kind, name, value)
    return image


def stream(path: Path, width_px: int, height_px: int, band_px: int = 64) -> np.ndarray:
    """The whole result of stream_rgb, its bands checked on the way."""
    bands, expected_y0 = [], 0
    for y0, rows in stream_rgb(path, width_px, height_px, band_px):
        assert y0 == expected_y0
        assert rows.dtype == np.uint8
        assert rows.shape == (min(band_px, height_px - y0), width_px, 3)
        expected_y0 += rows.shape[0]
        bands.append(rows)
    assert expected_y0 == height_px
    return np.concatenate(bands)


def whole(path: Path) -> np.ndarray:
    header = read_header(path)
    return stream(path, header.width_px, header.height_px)


def levels(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def reference_resize(pixels: np.ndarray, width_px: int, height_px: int) -> np.ndarray:
    """Whole-image libvips: Lanczos-3 where an axis shrinks, then bicubic in double where one grows."""
    image = vips(pixels)
    down_width_px, down_height_px = min(width_px, image.width), min(height_px, image.height)
    image = image.resize(down_width_px / image.width, vscale=down_height_px / image.height, kernel="lanczos3")
    idx, idy = 0.5 * (1 - image.width / width_px), 0.5 * (1 - image.height / height_px)
    scale = (width_px / image.width, 0, 0, height_px / image.height)
    bicubic = pyvips.Interpolate.new("bicubic")
    area = [0, 0, width_px, height_px]
    image = image.cast("double").affine(scale, interpolate=bicubic, oarea=area, idx=idx, idy=idy, extend="copy")
    return np.clip(np.rint(image.numpy()), 0, 255).astype(np.uint8)


# Ingest: resize ------------------------------------------------------------------------------------------------------

SIZES = [(211, 157), (106, 78), (40, 31), (7, 5), (500, 333), (212, 158), (423, 60), (90, 301), (211, 300), (1, 1)]


@pytest.mark.parametrize(("width_px", "height_px"), SIZES)
@pytest.mark.parametrize("band_px", [1, 16, 1000])
def test_streaming_resize_is_the_whole_image_resize(
    tmp_path: Path, width_px: int, height_px: int, band_px: int
) -> None:
    """Otherwise the content and style of a stage have seams between bands, or are shifted against the canvas."""
    pixels = picture(157, 211)
    path = tmp_path / "a.png"
    vips(pixels).pngsave(str(path))
    result = stream(path, width_px, height_px, band_px)
    assert levels(result, reference_resize(pixels, width_px, height_px)) <= 1


@pytest.mark.parametrize(("width_px", "height_px"), [(80, 61), (403, 371), (90, 371)])
def test_resize_keeps_the_centre(tmp_path: Path, width_px: int, height_px: int) -> None:
    """Otherwise every stage shifts the image by a part of a pixel: a mirrored image must give the mirrored result."""
    pixels = picture(157, 211)
    vips(pixels).pngsave(str(tmp_path / "a.png"))
    vips(pixels[::-1, ::-1]).pngsave(str(tmp_path / "b.png"))
    mirrored = stream(tmp_path / "b.png", width_px, height_px)[::-1, ::-1]
    assert levels(stream(tmp_path / "a.png", width_px, height_px), mirrored) <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 64), (63, 1), (64, 64)])
def test_one_px_image(tmp_path: Path, size: tuple[int, int]) -> None:
    """A user who gives a 1-px image gets its colour everywhere, not a crash."""
    path = tmp_path / "one.png"
    vips(np.array([[[10, 200, 30]]], np.uint8)).pngsave(str(path))
    assert np.array_equal(stream(path, *size), np.broadcast_to([10, 200, 30], (size[1], size[0], 3)))


def test_stream_refuses_impossible_sizes(tmp_path: Path) -> None:
    """A bug in a caller must not become an image of no pixels."""
    with pytest.raises(ValueError, match="at least 1 px"):
        stream_rgb(tmp_path / "a.png", 0, 10, 10)


# The canvas of one stage into the next -------------------------------------------------------------------------------

GROWTHS = [((37, 53), (74, 106)), ((37, 53), (91, 200)), ((37, 53), (38, 53)), ((37, 53), (37, 53)), ((1, 1), (5, 3))]


@pytest.mark.parametrize(("source", "target"), GROWTHS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_resize_window_in_chunks_is_the_whole_image_affine(
    source: tuple[int, int], target: tuple[int, int], dtype: type
) -> None:
    """Otherwise the canvas of the next stage has a grid of seams, and depends on the chunk size."""
    pixels = (picture(*source) * 1.37 - 40).astype(dtype)  # beyond 0..255: nothing may be clipped
    whole_target = resize_window(pixels, (0, source[0], 0, source[1]), source, target, (0, target[0], 0, target[1]))
    for chunk_px in (16, 23):
        result = np.empty((*target, 3), dtype)
        for y0 in range(0, target[0], chunk_px):
            for x0 in range(0, target[1], chunk_px):
                part = (y0, min(y0 + chunk_px, target[0]), x0, min(x0 + chunk_px, target[1]))
                w = source_window(part, source, target)
                window = pixels[w[0] : w[1], w[2] : w[3]]
                result[part[0] : part[1], part[2] : part[3]] = resize_window(window, w, source, target, part)
        assert result.dtype == dtype
        assert np.array_equal(result, whole_target)  # bit by bit
    idx, idy = 0.5 * (1 - source[1] / target[1]), 0.5 * (1 - source[0] / target[0])
    affine = vips(pixels.astype(np.float64)).affine(
        (target[1] / source[1], 0, 0, target[0] / source[0]),
        interpolate=pyvips.Interpolate.new("bicubic"),
        oarea=[0, 0, target[1], target[0]],
        idx=idx,
        idy=idy,
        extend="copy",
    )
    assert np.allclose(whole_target, affine.numpy(), atol=1e-3 if dtype is np.float32 else 1e-8)


@pytest.mark.parametrize(("source", "target"), [*GROWTHS[:3], GROWTHS[-1], ((83, 61), (101, 74))])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_canvas_smoothed_by_windows_is_the_whole_canvas_smoothed(
    source: tuple[int, int], target: tuple[int, int], dtype: type
) -> None:
    """A window that lacks its neighbours would leave a seam at every chunk."""
    pixels = (picture(*source) * 1.37 - 40).astype(dtype)
    height, width = source
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge").astype(np.float64)
    weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
    direct = sum(weights[y, x] * padded[y : y + height, x : x + width] for y in range(3) for x in range(3))
    whole = smoothed(pixels)
    assert whole.dtype == dtype and np.allclose(whole, direct, atol=1e-4 if dtype is np.float32 else 1e-12)
    enlarged = resize_window(whole, (0, height, 0, width), source, target, (0, target[0], 0, target[1]))
    for y0, x0 in itertools.product(range(0, target[0], 16), range(0, target[1], 16)):
        rect = (y0, min(y0 + 16, target[0]), x0, min(x0 + 16, target[1]))
        w = source_window(rect, source, target)
        window = resize_window(smoothed(pixels[w[0] : w[1], w[2] : w[3]]), w, source, target, rect)
        assert np.array_equal(window, enlarged[rect[0] : rect[1], rect[2] : rect[3]])  # bit by bit


def test_source_window_stays_small() -> None:
    """Otherwise enlarging a 15,000-px canvas reads far more than it needs, chunk by chunk."""
    y0, y1, x0, x1 = source_window((512, 1024, 0, 512), (15000, 15000), (30000, 30000))
    assert (y0, x0) == (255 - 4, 0)
    assert y1 - y0 <= 256 + 10
    assert x1 <= 256 + 6


# Ingest: formats -----------------------------------------------------------------------------------------------------

Saver = Callable[[Any, str], None]
LOSSLESS: dict[str, Saver] = {
    "a.png": lambda image, name: image.pngsave(name),
    "interlaced.png": lambda image, name: image.pngsave(name, interlace=True),
    "strips.tif": lambda image, name: image.tiffsave(name, compression="lzw"),
    "tiles.tif": lambda image, name: image.tiffsave(name, tile=True, tile_width=128, tile_height=128, pyramid=True),
    "a.webp": lambda image, name: image.webpsave(name, lossless=True),
    "brackets[page=3].tiff": lambda image, name: image.tiffsave(name),
    "name of another kind.jpg": lambda image, name: Path(name).write_bytes(image.pngsave_buffer()),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_come_in_exactly(tmp_path: Path, name: str) -> None:
    """Otherwise the input is changed before the first iteration."""
    pixels = picture(157, 211)
    path = tmp_path / name
    LOSSLESS[name](vips(pixels), str(path))
    header = read_header(path)
    assert (header.width_px, header.height_px, header.bands, header.bits) == (211, 157, 3, 8)
    assert header.interlaced == name.startswith("interlaced")
    assert np.array_equal(whole(path), pixels)


@pytest.mark.parametrize("interlace", [False, True])
def test_jpeg_baseline_and_progressive(tmp_path: Path, interlace: bool) -> None:
    """A progressive JPEG must be recognised, or the plan promises memory that its decoder exceeds."""
    pixels = picture(157, 211)
    path = tmp_path / "a.jpg"
    vips(pixels).jpegsave(str(path), Q=95, interlace=interlace)
    header = read_header(path)
    assert header.interlaced == interlace
    assert (header.decode_bytes > 211 * 157 * 3) == interlace
    assert levels(whole(path), pyvips.Image.new_from_file(str(path)).numpy()) == 0


def test_decode_bytes_count_what_is_not_streamed(tmp_path: Path) -> None:
    """Otherwise the plan promises a memory bound that WebP, GIF, AVIF or a rotated photo breaks."""
    image = vips(picture(157, 211))
    image.webpsave(str(tmp_path / "a.webp"))
    image.gifsave(str(tmp_path / "a.gif"))
    image.pngsave(str(tmp_path / "a.png"))
    with_field(image, "orientation", 6).jpegsave(str(tmp_path / "turned.jpg"))
    assert read_header(tmp_path / "a.png").decode_bytes == 0
    for name in ("a.webp", "a.gif", "turned.jpg"):
        assert read_header(tmp_path / name).decode_bytes >= 211 * 157 * 3


def test_sixteen_bits_are_rounded(tmp_path: Path) -> None:
    """Otherwise a 16-bit scan is read half a level too dark."""
    pixels = np.arange(0, 65536, 7, dtype=np.uint16)[: 96 * 97].reshape(96, 97)
    rgb = np.dstack([pixels, pixels[::-1], pixels])
    for name in ("a.png", "a.tif"):
        vips(rgb, "rgb16").write_to_file(str(tmp_path / name))
        assert read_header(tmp_path / name).bits == 16
        assert np.array_equal(whole(tmp_path / name), np.floor(rgb / 257 + 0.5).astype(np.uint8))
    vips(pixels, "grey16").write_to_file(str(tmp_path / "grey.png"))
    assert levels(whole(tmp_path / "grey.png"), np.dstack([np.floor(pixels / 257 + 0.5)] * 3)) == 0
    path = tmp_path / "a.png"
    for size in ((60, 50), (150, 140)):
        eight_bit = reference_resize(np.floor(rgb / 257 + 0.5).astype(np.uint8), *size)
        assert np.abs(stream(path, *size).astype(int) - eight_bit).mean() < 1


def test_grey_and_alpha(tmp_path: Path) -> None:
    """Otherwise a grey image fails, or the hidden colour of transparent pixels bleeds into the content."""
    grey = picture(40, 50)[..., 0]
    vips(grey, "b-w").pngsave(str(tmp_path / "grey.png"))
    assert np.array_equal(whole(tmp_path / "grey.png"), np.dstack([grey] * 3))

    alpha = np.zeros((40, 50), np.uint8)
    alpha[:, 10:30], alpha[:, 30:] = 128, 255
    share = alpha / 255
    vips(np.dstack([grey, alpha]), "b-w").pngsave(str(tmp_path / "ga.png"))
    assert levels(whole(tmp_path / "ga.png"), np.dstack([grey * share + 255 * (1 - share)] * 3)) <= 1

    red = np.zeros((40, 50, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    for name in ("rgba.png", "rgba.tif", "rgba.webp"):
        options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
        vips(np.dstack([red, alpha])).write_to_file(str(tmp_path / name), **options)
        assert levels(whole(tmp_path / name), red * share[..., None] + 255 * (1 - share[..., None])) <= 1
    small = stream(tmp_path / "rgba.png", 25, 20)
    assert small[:, :4].min() == 255  # far from the edge the hidden red is white


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    """Otherwise a CMYK image is read inverted, or not at all."""
    cmyk = np.zeros((32, 96, 4), np.uint8)
    cmyk[:, 32:64, 3], cmyk[:, 64:, 1:3] = 255, 255
    for name in ("a.jpg", "a.tif"):
        vips(cmyk, "cmyk").write_to_file(str(tmp_path / name))
        rgb = whole(tmp_path / name)
        assert rgb.shape == (32, 96, 3)
        assert rgb[16, 16].min() > 250  # paper
        assert rgb[16, 48].max() < 70  # black ink
        assert rgb[16, 80, 0] > 180 and rgb[16, 80, 1:].max() < 100  # magenta and yellow make red


def test_embedded_profile_is_applied(tmp_path: Path) -> None:
    """Otherwise a Display-P3 photo is read with dull colours."""
    pixels = np.clip(picture(64, 64) * np.array([1.0, 0.6, 0.5]), 0, 255).astype(np.uint8)
    wide = vips(pixels).icc_transform("p3", input_profile="srgb")
    wide.pngsave(str(tmp_path / "p3.png"))
    assert levels(wide.numpy(), pixels) > 8
    assert levels(whole(tmp_path / "p3.png"), pixels) <= 3
    deep = vips(pixels.astype(np.uint16) * 257, "rgb16").icc_transform("p3", input_profile="srgb", depth=16)
    deep.pngsave(str(tmp_path / "deep.png"))
    assert levels(whole(tmp_path / "deep.png"), pixels) <= 3


def test_unusable_profile_is_passed_over(tmp_path: Path) -> None:
    """A damaged profile is no reason to refuse an image that every browser shows."""
    pixels = picture(30, 40)
    with_field(vips(pixels), "icc-profile-data", b"not a profile at all" * 10).tiffsave(str(tmp_path / "a.tif"))
    assert np.array_equal(whole(tmp_path / "a.tif"), pixels)


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    """Otherwise a phone's photo lies on its side."""
    pixels = picture(700, 430)  # higher than any strip: rows in another order need random access
    expected = UPRIGHT[orientation](pixels)
    with_field(vips(pixels), "orientation", orientation).tiffsave(str(tmp_path / "a.tif"), compression="lzw")
    header = read_header(tmp_path / "a.tif")
    assert (header.height_px, header.width_px) == expected.shape[:2]
    assert np.array_equal(whole(tmp_path / "a.tif"), expected)
    with_field(vips(pixels), "orientation", orientation).jpegsave(str(tmp_path / "a.jpg"), Q=98)
    plain = pyvips.Image.new_from_file(str(tmp_path / "a.jpg")).numpy()
    assert np.array_equal(whole(tmp_path / "a.jpg"), UPRIGHT[orientation](plain))


# Ingest: bad input ---------------------------------------------------------------------------------------------------


def png_header(width_px: int, height_px: int) -> bytes:
    """A PNG that claims a size and ends after the first bytes of pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" * 99)),
    ]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


BAD_FILES = {
    "text.jpg": (b"Dear reader, this is not a picture.\n" * 20, "not an intact image"),
    "empty.png": (b"", "empty"),
    "table.csv": (b"1,2,3\n4,5,6\n", "not an intact image"),
    "a.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>', "not an intact image"),
    "huge.png": (png_header(1_000_000, 1_000_000), "1000000×1000000"),
    "long.png": (png_header(1_000_001, 1), "."),
    "zero.png": (png_header(0, 5), "."),
    "stub.jpg": (b"\xff\xd8\xff\xe0", "not an intact image"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_by_their_header(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Otherwise a user sees a traceback, or a run dies after hours, for a file that was never an image."""
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        for _ in stream_rgb(path, 10, 10, 10):
            pass
    assert capfd.readouterr() == ("", "")


def test_missing_and_directory(tmp_path: Path) -> None:
    """A mistyped path must be named as such."""
    with pytest.raises(InputError, match="no such file"):
        read_header(tmp_path / "none.png")
    with pytest.raises(InputError, match="directory"):
        read_header(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(tmp_path: Path) -> None:
    """A file without read permission must be named as such."""
    path = tmp_path / "a.png"
    vips(picture(5, 5)).pngsave(str(path))
    path.chmod(0)
    with pytest.raises(InputError, match="cannot be read"):
        read_header(path)


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    """Floats have no agreed white: a guess would give a black or a white image."""
    vips(picture(20, 20)).cast("float").copy(interpretation="b-w").extract_band(0).tiffsave(str(tmp_path / "a.tif"))
    with pytest.raises(InputError, match="8 or 16 bits"):
        read_header(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.jpg", "progressive.jpg", "a.png", "a.tif", "tiles.tif", "a.webp"])
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_truncated_file_is_refused(tmp_path: Path, name: str, share: float, capfd: pytest.CaptureFixture[str]) -> None:
    """Otherwise an incomplete download is used with a grey lower half."""
    image = vips(picture(600, 500))
    path = tmp_path / name
    options = {"interlace": True} if name.startswith("prog") else {"tile": True} if name.startswith("tiles") else {}
    image.write_to_file(str(path), **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError) as caught:
        stream(path, 250, 300)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_claimed_size_without_pixels(tmp_path: Path) -> None:
    """A header within the limits without pixels must end in an error message, not in an out-of-memory kill."""
    path = tmp_path / "claim.png"
    path.write_bytes(png_header(100_000, 100_000))
    with pytest.raises(InputError, match=r"claim\.png"):
        for _ in stream_rgb(path, 1000, 1000, 100):
            pass


def decoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode ")]


@pytest.mark.parametrize("bands", [0, 1, 3])
def test_leaving_early_ends_the_thread(tmp_path: Path, bands: int) -> None:
    """Otherwise an interrupted run hangs, or keeps a decoder and its memory."""
    path = tmp_path / "a.png"
    vips(picture(600, 500)).pngsave(str(path))
    iterator = stream_rgb(path, 900, 1100, 10)
    for _ in range(bands):
        next(iterator)
    iterator.close()
    assert not decoders()


def test_no_thread_decodes_for_a_cut_that_was_given_up(tmp_path: Path) -> None:
    """A caller that keeps the error would keep a decoder, its memory and the open file."""
    path = tmp_path / "a.png"
    vips(picture(3000, 300)).pngsave(str(path))

    class Cancelled(CancelToken):
        def raise_if_set(self) -> None:  # first called when the last row of the cut is with the saver
            raise Stopped

    with pytest.raises(Stopped) as caught:
        cut_file(path, (3000, 300), Rect(0, 1000, 0, 300), tmp_path / "cut.png", Cancelled())
    assert caught.value.__traceback__ is not None
    assert not decoders()
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


# Export --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", ["a.tif", "odd [n=2] name.TIFF", "a.png"])
@pytest.mark.parametrize("size", [(1, 1), (700, 1301)])
def test_lossless_export_reads_back(tmp_path: Path, bits: int, name: str, size: tuple[int, int]) -> None:
    """Otherwise the file is not the image that was rendered."""
    pixels = picture(*size, bits=bits)
    path = tmp_path / "made" / "on demand" / name
    write(path, pixels)
    back = pyvips.Image.new_from_source(pyvips.Source.new_from_file(str(path)), "")
    assert np.array_equal(back.numpy(), pixels)
    assert back.get("icc-profile-data") == pyvips.Operation.call("profile_load", "srgb")
    if bits == 8:
        assert np.array_equal(whole(path), pixels)  # our own export comes in again bit by bit
    assert [entry.name for entry in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("compression", ["deflate", "jpeg", "none"])
def test_tiff_is_a_tiled_pyramid(tmp_path: Path, compression: str) -> None:
    """Otherwise viewers load all of an image to show a thumbnail."""
    pixels = picture(1200, 1900)
    path = tmp_path / "a.tif"
    write(path, pixels, compression=compression)
    top = pyvips.Image.new_from_file(str(path))
    assert top.get("tile-width") == 256
    pages = top.get("n-pages")
    assert pages >= 3
    sizes = [pyvips.Image.new_from_file(str(path), page=page) for page in range(pages)]
    assert [(image.width, image.height) for image in sizes[:3]] == [(1900, 1200), (950, 600), (475, 300)]
    half = pixels.reshape(600, 2, 950, 2, 3).mean((1, 3))
    assert np.abs(sizes[1].numpy() - half).mean() < 3


def test_jpeg_export(tmp_path: Path) -> None:
    """Otherwise the JPEG of an image has other colours than the image."""
    smooth = np.clip(vips(picture(500, 700)).gaussblur(3).numpy(), 0, 255).astype(np.uint8)
    write(tmp_path / "a.jpg", smooth, quality=97)
    back = pyvips.Image.new_from_file(str(tmp_path / "a.jpg"))
    assert np.abs(back.numpy().astype(int) - smooth).max() <= 6
    assert back.get("icc-profile-data")
    assert not read_header(tmp_path / "a.jpg").interlaced
    write(tmp_path / "b.jpeg", smooth, quality=30)
    assert (tmp_path / "b.jpeg").stat().st_size < (tmp_path / "a.jpg").stat().st_size / 2


def test_deepzoom_export(tmp_path: Path) -> None:
    """Otherwise a viewer shows holes, or nothing: the top level, put together from its tiles, must be the image."""
    smooth = np.clip(vips(picture(600, 900)).gaussblur(3).numpy(), 0, 255).astype(np.uint8)
    for _ in range(2):  # the second replaces the first
        write(tmp_path / "zoom.dz", smooth)
    assert [entry.name for entry in tmp_path.iterdir()] == ["zoom.dz"]
    assert sorted(entry.name for entry in (tmp_path / "zoom.dz").iterdir()) == ["zoom.dzi", "zoom_files"]
    assert 'Width="900"' in (tmp_path / "zoom.dz/zoom.dzi").read_text()
    top = max((tmp_path / "zoom.dz/zoom_files").iterdir(), key=lambda entry: int(entry.name))
    assert int(top.name) == 10
    result = np.zeros_like(smooth)
    for tile in top.iterdir():
        column, row = map(int, tile.stem.split("_"))
        y0, x0 = max(row * 254 - 1, 0), max(column * 254 - 1, 0)
        pixels = pyvips.Image.new_from_file(str(tile)).numpy()
        result[y0 : y0 + pixels.shape[0], x0 : x0 + pixels.shape[1]] = pixels
    assert levels(result, smooth) <= 12


def test_rows_are_asked_for_in_order_by_the_caller(tmp_path: Path) -> None:
    """Otherwise Ctrl-C waits for the end of an export, and the bar jumps; each row is read from the store once."""
    pixels, asked, shares = picture(1500, 300), [], []

    def read_rows(y0: int, y1: int) -> np.ndarray:
        assert threading.current_thread() is threading.main_thread()
        asked.append((y0, y1))
        return pixels[y0:y1]

    write_image(ImageSpec(tmp_path / "a.png", 300, 1500), read_rows, on_progress=shares.append)
    assert asked == [(0, 512), (512, 1024), (1024, 1500)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert max(shares[:-1]) < 1.0


class CustomError(Exception):
    """An error of the caller's own type."""


@pytest.mark.parametrize("suffix", [".tif", ".png", ".jpg", ".dz"])
@pytest.mark.parametrize("bad_band", [0, 2])
def test_failure_while_reading_leaves_nothing(
    tmp_path: Path, suffix: str, bad_band: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Otherwise a stopped export looks like a finished one, or its cause is lost in a message of libvips."""
    pixels = picture(1500, 300)
    path = tmp_path / f"a{suffix}"

    def read_rows(y0: int, y1: int) -> np.ndarray:
        if y0 >= 512 * bad_band:
            raise CustomError("a chunk is missing")
        return pixels[y0:y1]

    with pytest.raises(CustomError, match="a chunk is missing"):
        write_image(ImageSpec(path, 300, 1500), read_rows)
    assert list(tmp_path.iterdir()) == []

    write(path, pixels)
    before = sorted((entry, entry.stat().st_size) for entry in tmp_path.rglob("*"))
    with pytest.raises(CustomError):
        write_image(ImageSpec(path, 300, 1500), read_rows)
    assert sorted((entry, entry.stat().st_size) for entry in tmp_path.rglob("*")) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("export ")]
    assert capfd.readouterr() == ("", "")


def test_leftovers_of_a_killed_export_are_removed(tmp_path: Path) -> None:
    """Otherwise every kill leaves some gigabytes under a hidden name."""
    code = """
        import os, signal, sys
        from pathlib import Path
        import numpy as np
        from pipeline.images.writer import ImageSpec, write_image
        def read_rows(y0, y1):
            if y0 >= 1024:
                os.kill(os.getpid(), signal.SIGKILL)
            return np.zeros((y1 - y0, 300, 3), np.uint8)
        write_image(ImageSpec(Path(sys.argv[1]), 300, 2000), read_rows)
    """
    path = tmp_path / "a.tif"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], check=False, timeout=60)
    assert done.returncode == -9
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 2  # the image, and the folder of its levels
    write(path, picture(50, 60))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg", "a.dz"])
def test_full_disk(small_disk: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Otherwise a full disk looks like a bug, and half an image stays."""
    with pytest.raises(SpaceError, match=name):
        write(small_disk / name, picture(2000, 1500))
    assert list(small_disk.iterdir()) == []
    assert capfd.readouterr() == ("", "")


# Checks before the run -----------------------------------------------------------------------------------------------

REFUSED = [
    ("a.gif", 100, 8, "deflate", r"\.tif.*\.png.*\.zarr"),
    ("a", 100, 8, "deflate", "suffix"),
    ("a.jpg", 65_501, 8, "deflate", "65,500"),
    ("a.jpg", 100, 16, "deflate", "16 bits"),
    ("a.dz", 100, 16, "deflate", "16 bits"),
    ("a.tif", 100, 12, "deflate", "12 bits"),
    ("a.tif", 100, 16, "jpeg", "deflate"),
    ("a.tif", 100, 8, "lzma", "allowed: deflate, lzw, jpeg, none"),
    ("file/a.tif", 100, 8, "deflate", "not a folder"),
    ("folder.tif", 100, 8, "deflate", "is a folder"),
    ("mine.dz", 100, 8, "deflate", "would be lost"),
]


@pytest.mark.parametrize(("name", "side_px", "bits", "compression", "message"), REFUSED)
def test_output_that_would_fail_is_refused(
    tmp_path: Path, name: str, side_px: int, bits: int, compression: str, message: str
) -> None:
    """Otherwise a run of a day ends in an error that could have been its first line."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.tif").mkdir()
    (tmp_path / "mine.dz").mkdir()
    (tmp_path / "mine.dz" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match=message):
        check_output(tmp_path / name, side_px, 100, bits, compression)
    assert (tmp_path / "mine.dz" / "thesis.txt").exists()


def test_outputs_that_work_are_allowed(tmp_path: Path) -> None:
    """Otherwise the program refuses what it can do."""
    for name in ("a.tif", "b/c/a.TIF", "a.tiff", "a.png", "a.zarr", "a.dz", "a.jpg", "a.jpeg"):
        check_output(tmp_path / name, 30_000, 30_000, 8, "deflate")
    check_output(tmp_path / "a.tif", 100_000, 100_000, 16, "none")
    check_output(tmp_path / "a.jpg", 65_500, 65_500, 8, "deflate")
    assert list(tmp_path.iterdir()) == []


def test_compression_of_this_build(tmp_path: Path) -> None:
    """zstd is in some builds of libvips only: the check must say before the run what the writer would say after."""
    try:
        pyvips.Image.black(8, 8).tiffsave_buffer(compression="zstd")
    except pyvips.Error:
        with pytest.raises(ConfigError, match="cannot write zstd in TIFF; it can: deflate, lzw, jpeg, none"):
            check_output(tmp_path / "a.tif", 10, 10, 8, "zstd")
    else:
        check_output(tmp_path / "a.tif", 10, 10, 8, "zstd")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    """Otherwise the run fails at its end."""
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        check_output(tmp_path / "b" / "a.tif", 10, 10, 8, "deflate")


@pytest.mark.parametrize("name", ["Harbour [2024].dz", "photo[Q=1].dz", "a[b]c.dz"])
def test_brackets_in_the_name_of_a_deepzoom_are_no_options(tmp_path: Path, name: str) -> None:
    """dzsave cut them off: the viewer found no picture, and the run refused to replace its own."""
    folder = tmp_path / "in [x=1]"
    path, pixels = folder / name, picture(40, 60)
    for _ in range(2):
        write_image(ImageSpec(path, 60, 40), lambda y0, y1: pixels[y0:y1])
    assert {entry.name for entry in path.iterdir()} == {f"{path.stem}.dzi", f"{path.stem}_files"}
    assert not list(path.rglob("*properties*"))
    top = pyvips.Image.new_from_file(str(path / f"{path.stem}_files" / "6" / "0_0.jpg"))
    assert abs(float(top.avg()) - float(pixels.mean())) < 1


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_memory_does_not_grow_with_the_picture(tmp_path: Path) -> None:
    """An image of 288 MB must be read and written in a third of that memory."""
    path = tmp_path / "a.jpg"
    assert measured_mb("export", path, "jpeg", 6000, 16000) < 120
    assert measured_mb("export", tmp_path / "a.tif", "jpeg", 6000, 16000) < 140
    assert measured_mb("ingest", path, 6000, 16000, 64) < 100
    assert measured_mb("ingest", path, 3001, 8001, 64) < 140
