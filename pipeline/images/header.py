"""Opening source pictures, and what their headers say: kind, size, and the memory that decoding them would take.

A picture may come from a stranger. So its first bytes choose one of a few loaders that read pixels and nothing else,
names are never read for options, and everything that a picture may cost is known, and refused, before a pixel is
decoded.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyvips

from pipeline.config.fields import MAX_SIDE_PX
from pipeline.config.sections import LimitsConfig
from pipeline.core.errors import MISPLACED, InputError, storage_error
from pipeline.core.image_formats import PixelKind
from pipeline.core.text import bytes_text, shown
from pipeline.images import tiff
from pipeline.images.vips_streams import FileSource, reason

# By format, what a file begins with, where: (offset, bytes), any of them. libvips is not asked which loader it would
# take: among its own there are some that read other files, or run programs, and a JPEG with a gain map would go to one
# that gives other pixels. Nor are those blocked: that would be for the whole process, which may be somebody else's.
_SIGNATURES: dict[str, tuple[tuple[int, bytes], ...]] = {
    "JPEG": ((0, b"\xff\xd8\xff"),),
    "PNG": ((0, b"\x89PNG\r\n\x1a\n"),),
    "TIFF": ((0, b"II*\0"), (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+")),
    "WebP": ((8, b"WEBP"),),
    "HEIF": ((4, b"ftyp"),),
    "GIF": ((0, b"GIF8"),),
}
FORMATS = ", ".join(_SIGNATURES)
LOADERS = {f"{name.lower()}load" for name in _SIGNATURES}

# Bits of one channel, by libvips' name of the pixel format. Others have no agreed white, unless they are CIELAB.
_BITS = {"uchar": 8, "ushort": 16}
_LAB = {"lab": 32, "labs": 16}
MAX_BANDS = 8  # CMYK, and some spot colours

# Formats that are decoded whole: bytes per px of 8 bits, the decoder's own planes included (measured 4.1, 8.1, 16.5).
_WHOLE_BYTES_PER_PX = {"gifload": 5, "webpload": 9, "heifload": 18}

# GLib refuses a size that is out of range with a complaint on stderr, and libvips goes on with a picture of 1 px.
_complaints: list[str] = []
_complaints_lock = threading.Lock()


@pyvips.ffi.callback("GLogFunc")  # type: ignore[untyped-decorator]
def _complain(_domain: Any, _level: int, message: Any, _data: Any) -> None:
    _complaints.append(pyvips.ffi.string(message).decode("utf-8", "replace"))


@contextmanager
def _heard_complaints() -> Iterator[list[str]]:
    """What GLib complains of while the block runs, instead of printing it. One block at a time, for the process."""
    domain = b"GLib-GObject"
    with _complaints_lock:
        _complaints.clear()
        handler = pyvips.glib_lib.g_log_set_handler(domain, 2**8 - 1, _complain, pyvips.ffi.NULL)
        try:
            yield _complaints
        finally:
            pyvips.glib_lib.g_log_remove_handler(domain, handler)


@dataclass(frozen=True)
class ImageHeader:
    """What the first page of an image file says about itself, before any pixel is decoded."""

    path: Path
    width_px: int  # upright, that is after the EXIF orientation
    height_px: int
    bands: int
    bits: int  # per channel
    loader: str  # one of LOADERS
    interlaced: bool
    decode_bytes: int  # host memory a decoder needs beyond streaming; 0 where it works strip by strip
    kind: PixelKind  # what of its pixels can be kept: CIELAB becomes RGB of 8 bits


def read_header(path: Path, limits: LimitsConfig | None = None) -> ImageHeader:
    """Size and kind of an image file, without decoding it; `limits` default to the config's own.

    Raises InputError where the file is missing, unreadable, not a picture of an allowed format, or beyond the limits.
    """
    limits = limits or LimitsConfig()
    file = open_file(path)
    if file.size_bytes > limits.max_file_bytes:
        raise InputError(
            f"{path}: the file has {file.size_bytes:,} bytes, beyond limits.max_file_bytes "
            f"({bytes_text(limits.max_file_bytes)}). Give a smaller one, or raise that limit if you trust this one."
        )
    if _is_read_whole(file):
        _check_decoding(path, file.size_bytes, limits)
    header = describe(file, open_image(file, "sequential"))
    if (pixels := header.width_px * header.height_px) > limits.max_pixels:
        raise InputError(
            f"{path}: claims {header.width_px}×{header.height_px} px, which is {pixels:,} and beyond limits.max_pixels "
            f"({limits.max_pixels:,}): a damaged header, or a picture that large. Raise that limit if you trust it."
        )
    _check_decoding(path, header.decode_bytes, limits)
    return header


def _is_read_whole(file: FileSource) -> bool:
    """Whether libvips reads all of the file just to tell the picture's size: GIF, WebP, HEIF."""
    start = file.read_at(0, 12)
    return start[:4] in (b"GIF8", b"RIFF") or start[4:8] == b"ftyp"


def _check_decoding(path: Path, needed_bytes: int, limits: LimitsConfig) -> None:
    if needed_bytes > limits.max_decode_bytes:
        raise InputError(
            f"{path}: cannot be decoded piece by piece, and needs {needed_bytes / 2**30:.2f} GiB of memory at once, "
            f"beyond limits.max_decode_bytes ({bytes_text(limits.max_decode_bytes)}). Save it upright and not "
            "interlaced, as a JPEG, PNG or TIFF, or raise that limit."
        )


def open_file(path: Path) -> FileSource:
    """The file, opened. Raises InputError where it is missing, unreadable or no regular file."""
    try:
        return FileSource(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except OSError as error:
        if error.errno in MISPLACED:
            raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
        raise storage_error(path, error) from error


def open_image(file: FileSource, access: str) -> Any:
    """The file as a lazy libvips image; every pixel error in it is fatal. Raises InputError if it is none."""
    loader = _loader_of(file)
    file.seek(0, os.SEEK_SET)
    source = pyvips.SourceCustom()
    source.on_read(file.read)
    source.on_seek(file.seek)
    try:
        with _heard_complaints() as complaints:
            image = pyvips.Operation.call(f"{loader}_source", source, access=access, fail_on="error")
            complained = complaints[:1]
        image._references.append(source)  # as new_from_source does: libvips calls it as long as the image lives
    except pyvips.Error as error:
        file.raise_failure()
        raise _no_image(file, reason(error)) from error
    if complained:
        raise _no_image(file, shown(complained[0], 200))
    return image


def _loader_of(file: FileSource) -> str:
    """Libvips' name of the loader for the file, by its first bytes. Raises InputError if it has none of the formats."""
    file.seek(0, os.SEEK_SET)
    start = file.read(12) or b""
    file.raise_failure()
    for name, signatures in _SIGNATURES.items():
        if any(start[offset : offset + len(bytes_)] == bytes_ for offset, bytes_ in signatures):
            return f"{name.lower()}load"
    raise _no_image(file, "it begins like none of them")


def _no_image(file: FileSource, why: str) -> InputError:
    return InputError(f"{file.path}: is not an intact image of a known format ({FORMATS}): {why}.")


def describe(file: FileSource, image: Any) -> ImageHeader:
    """What an opened image is. Raises InputError if it is of no kind that can be used."""
    path, loader = file.path, str(image.get("vips-loader")).removesuffix("_source")
    if loader not in LOADERS:
        raise InputError(f"{path}: is read by {loader}, which is not allowed; give one of {FORMATS}.")
    width_px, height_px = image.width, image.height
    if min(width_px, height_px) < 1:
        raise InputError(f"{path}: has no pixels ({width_px}×{height_px}).")
    if max(width_px, height_px) > MAX_SIDE_PX:
        raise InputError(
            f"{path}: claims {width_px}×{height_px} px, beyond {MAX_SIDE_PX:,} px a side: a damaged header, or a "
            "picture too large to use."
        )
    if image.bands > MAX_BANDS:
        raise InputError(f"{path}: has {image.bands} channels; convert it to RGB.")
    bits = _BITS.get(image.format) or _LAB.get(image.interpretation)
    if bits is None:
        raise InputError(f"{path}: has pixels of the kind {image.format}; convert it to 8 or 16 bits a channel.")
    if orientation(image) >= 5:
        width_px, height_px = height_px, width_px
    interlaced = bool(image.get_typeof("interlaced") and image.get("interlaced"))
    decode_bytes = _decode_bytes(file, image, loader, interlaced, image.bands * bits // 8)
    kind = PixelKind(16 if image.format == "ushort" else 8, bool(image.hasalpha()))
    return ImageHeader(path, width_px, height_px, image.bands, bits, loader, interlaced, decode_bytes, kind)


def _decode_bytes(file: FileSource, image: Any, loader: str, interlaced: bool, pixel_bytes: int) -> int:
    """Host bytes of a decoder that holds more than a few rows: measured bytes per px, rounded up."""
    pixels = image.width * image.height
    needed = 0
    if loader == "jpegload" and interlaced:
        # Two bytes per coefficient; libvips says 4:2:0 of 4:2:2 too, which has 2 + 1 + 1.
        subsampled = image.get_typeof("jpeg-chroma-subsample") and image.get("jpeg-chroma-subsample") == "4:2:0"
        needed = pixels * (4 if subsampled and image.bands == 3 else 2 * image.bands)
    elif loader == "pngload" and interlaced:
        needed = pixels * pixel_bytes
    elif loader == "tiffload":
        try:
            needed = tiff.decode_bytes(file.read_at)
        except ValueError:  # libtiff found its way where we did not: then for all we know it is one strip
            needed = 3 * pixels * pixel_bytes
    elif loader in _WHOLE_BYTES_PER_PX:
        needed = file.size_bytes + pixels * _WHOLE_BYTES_PER_PX[loader] * (1 if image.format == "uchar" else 2)
    return needed + (pixels * pixel_bytes if needs_random_access(image) else 0)


def needs_random_access(image: Any) -> bool:
    """Whether turning the picture upright reads rows in another order than the file has them (2 mirrors a row)."""
    return orientation(image) >= 3


def orientation(image: Any) -> int:
    """EXIF orientation, 1 to 8; 1 where the file says none."""
    return int(image.get("orientation")) if image.get_typeof("orientation") else 1
