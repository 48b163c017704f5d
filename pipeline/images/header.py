"""Opening input images and reading their headers: format, size, and the memory that decoding takes.

Input files are untrusted. The first bytes choose one of a few loaders that only read pixels, file names are never
parsed for options, and limits are checked before a pixel is decoded.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyvips

from pipeline.config import MAX_SIDE_PX, LimitsConfig
from pipeline.core.errors import MISPLACED, InputError, storage_error
from pipeline.core.image_formats import PixelKind
from pipeline.core.text import bytes_text, shown, size_text
from pipeline.images import tiff
from pipeline.images.color import PLAIN_RGB, ColorSource, UnreadableColorsError, color_source, unreadable_lab
from pipeline.images.pages import COLORS, has_planes_as_pages, is_joined, joined_planes, note_of
from pipeline.images.resolution import stated_dpi
from pipeline.images.upright import SCRATCH_BYTES, TURNING_BYTES
from pipeline.images.vips_streams import FileSource, is_unsupported, reason, undecodable

# By format, the signatures (offset, bytes) that a file may begin with. libvips does not choose the loader itself: some
# of its loaders read other files or run programs, and a JPEG with a gain map would go to one that gives other pixels.
# Blocking those loaders would affect the whole process, which may be another program's.
_SIGNATURES: dict[str, tuple[tuple[int, bytes], ...]] = {
    "JPEG": ((0, b"\xff\xd8\xff"),),
    "PNG": ((0, b"\x89PNG\r\n\x1a\n"),),
    "TIFF": ((0, b"II*\0"), (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+")),
    "WebP": ((8, b"WEBP"),),
    "HEIF": ((4, b"ftyp"),),
    "GIF": ((0, b"GIF8"),),
}
# Of HEIF, pyvips' own libvips decodes AVIF, and not the HEIC of phones.
FORMATS = ", ".join({"HEIF": "AVIF"}.get(name, name) for name in _SIGNATURES)
LOADERS = {f"{name.lower()}load" for name in _SIGNATURES}

# Bits per channel, by libvips' pixel format. Other formats have no defined white level, except for CIELAB.
_BITS = {"uchar": 8, "ushort": 16}
_LAB = {"lab": 32, "labs": 16}
MAX_BANDS = 8  # CMYK, and some spot colours

# Formats that are decoded whole: bytes per px at 8 bits, with the decoder's buffers (measured 4.1, 8.1, 16.5).
_WHOLE_BYTES_PER_PX = {"gifload": 5, "webpload": 9, "heifload": 18}

# GLib reports a size that is out of range as a warning on stderr only, and libvips continues with an image of 1 px.
_warnings: list[str] = []
_warnings_lock = threading.Lock()


@pyvips.ffi.callback("GLogFunc")  # type: ignore[untyped-decorator]
def _on_warning(_domain: Any, _level: int, message: Any, _data: Any) -> None:
    _warnings.append(pyvips.ffi.string(message).decode("utf-8", "replace"))


@contextmanager
def _captured_warnings() -> Iterator[list[str]]:
    """Capture GLib's warnings instead of printing them; one block at a time in the process."""
    domain = b"GLib-GObject"
    with _warnings_lock:
        _warnings.clear()
        handler = pyvips.glib_lib.g_log_set_handler(domain, 2**8 - 1, _on_warning, pyvips.ffi.NULL)
        try:
            yield _warnings
        finally:
            pyvips.glib_lib.g_log_remove_handler(domain, handler)


@dataclass(frozen=True)
class ImageHeader:
    """The header of the first page of an image file."""

    path: Path
    width_px: int  # upright: after applying the EXIF orientation
    height_px: int
    bands: int
    bits: int  # per channel
    loader: str  # one of LOADERS
    interlaced: bool
    decode_bytes: int  # host memory of a decoder that cannot work strip by strip; else 0
    kind: PixelKind  # bits and alpha that can be preserved: CIELAB becomes 8-bit RGB
    dpi: float | None  # as the file states it
    colors: ColorSource = PLAIN_RGB
    scratch_bytes: int = 0  # disk that turning it upright takes while it is read
    notes: tuple[str, ...] = ()  # what the user should know of how the file is read


def read_header(path: Path, limits: LimitsConfig | None = None) -> ImageHeader:
    """Size and kind of an image file, without decoding it; `limits` default to the config's defaults.

    Raises InputError if the file is missing, unreadable, not an image of an allowed format, or beyond the limits.
    """
    limits = limits or LimitsConfig()
    file = open_file(path)
    if file.size_bytes > limits.max_file_bytes:
        raise InputError(
            f"{path}: the file has {file.size_bytes:,} bytes, beyond limits.max_file_bytes "
            f"({bytes_text(limits.max_file_bytes)}). Use a smaller file, or raise that limit if you trust this one."
        )
    if _is_read_whole(file):
        _check_decoding(path, file.size_bytes, limits)
    image = open_image(file, "sequential")
    header = describe(file, image)
    if (pixels := header.width_px * header.height_px) > limits.max_pixels:
        raise InputError(
            f"{path}: claims {header.width_px}×{header.height_px} px, which is {pixels:,} and beyond limits.max_pixels "
            f"({limits.max_pixels:,}): either the header is damaged or the image is that large. Raise that limit if "
            "you trust the file."
        )
    _check_decoding(path, header.decode_bytes, limits)
    if not header.interlaced:  # which is decoded whole, and by the same codec as other files of its format
        _check_codec(file, image)
    note = note_of(image, lambda page: _load(FileSource(path), "sequential", page))
    return replace(header, notes=(note,)) if note else header


def _check_codec(file: FileSource, image: Any) -> None:
    """Raise InputError if this build of libvips cannot decode such a file at all: its first pixel shows it.

    Damage of the pixels is found when they are read, here and elsewhere.
    """
    try:
        image.extract_area(0, 0, 1, 1).avg()
    except pyvips.Error as error:
        file.raise_failure()
        if is_unsupported(error):
            raise undecodable(file.path, error) from error


def _is_read_whole(file: FileSource) -> bool:
    """Whether libvips reads the whole file to get the size: GIF, WebP, HEIF."""
    start = file.read_at(0, 12)
    return start[:4] in (b"GIF8", b"RIFF") or start[4:8] == b"ftyp"


def _check_decoding(path: Path, needed_bytes: int, limits: LimitsConfig) -> None:
    if needed_bytes > limits.max_decode_bytes:
        raise InputError(
            f"{path}: cannot be decoded strip by strip, and needs {size_text(needed_bytes)} of memory at once, "
            f"beyond limits.max_decode_bytes ({bytes_text(limits.max_decode_bytes)}). Save it upright and not "
            "interlaced as a JPEG, PNG or TIFF, or raise that limit."
        )


def open_file(path: Path) -> FileSource:
    """Open an image file. Raises InputError if it is missing, unreadable or not a regular file."""
    try:
        return FileSource(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except OSError as error:
        if error.errno in MISPLACED:
            raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
        raise storage_error(path, error) from error


def open_image(file: FileSource, access: str) -> Any:
    """The file as a lazy libvips image, with every decoding error fatal. Raises InputError if it is not an image."""
    image = _load(file, access)
    if image.get("vips-loader").startswith("tiffload") and has_planes_as_pages(image):
        try:
            image = joined_planes(image, lambda page: _load(FileSource(file.path), access, page))
        except ValueError as error:
            raise _not_an_image(file, str(error)) from error
    return image


def _load(file: FileSource, access: str, page: int = 0) -> Any:
    loader = _loader_of(file)
    file.seek(0, os.SEEK_SET)
    source = pyvips.SourceCustom()
    source.on_read(file.read)
    source.on_seek(file.seek)
    options = {"page": page} if page else {}
    try:
        with _captured_warnings() as warnings:
            image = pyvips.Operation.call(f"{loader}_source", source, access=access, fail_on="error", **options)
            first_warning = warnings[:1]
        image._references.append(source)  # as new_from_source does: libvips calls it while the image exists
    except pyvips.Error as error:
        file.raise_failure()
        if loader == "tiffload" and (why := unreadable_lab(file)):
            raise InputError(f"{file.path}: {why}.") from error
        if is_unsupported(error):
            raise undecodable(file.path, error) from error
        raise _not_an_image(file, reason(error)) from error
    if first_warning:
        raise _not_an_image(file, shown(first_warning[0], 200))
    return image


def _loader_of(file: FileSource) -> str:
    """The libvips loader for the file, by its first bytes. Raises InputError if the format is unknown."""
    file.seek(0, os.SEEK_SET)
    start = file.read(12) or b""
    file.raise_failure()
    for name, signatures in _SIGNATURES.items():
        if any(start[offset : offset + len(bytes_)] == bytes_ for offset, bytes_ in signatures):
            return f"{name.lower()}load"
    raise _not_an_image(file, "its first bytes are of none of these")


def _not_an_image(file: FileSource, why: str) -> InputError:
    return InputError(f"{file.path}: is not an intact image of a known format ({FORMATS}): {why}.")


def describe(file: FileSource, image: Any) -> ImageHeader:
    """The header of an opened image. Raises InputError if the image cannot be used."""
    path, loader = file.path, str(image.get("vips-loader")).removesuffix("_source")
    if loader not in LOADERS:
        raise InputError(f"{path}: is read by {loader}, which is not allowed; use one of {FORMATS}.")
    width_px, height_px = image.width, image.height
    if min(width_px, height_px) < 1:
        raise InputError(f"{path}: has no pixels ({width_px}×{height_px}).")
    if max(width_px, height_px) > MAX_SIDE_PX:
        raise InputError(
            f"{path}: claims {width_px}×{height_px} px, beyond {MAX_SIDE_PX:,} px a side: either the header is damaged "
            "or the image is too large to use."
        )
    if image.bands > MAX_BANDS:
        raise InputError(f"{path}: has {image.bands} channels; convert it to RGB.")
    bits = _BITS.get(image.format) or _LAB.get(image.interpretation)
    if bits is None:
        raise InputError(f"{path}: has pixels of type {image.format}; convert it to 8 or 16 bits a channel.")
    if orientation(image) >= 5:
        width_px, height_px = height_px, width_px
    interlaced = bool(image.get_typeof("interlaced") and image.get("interlaced"))
    decode_bytes = _decode_bytes(file, image, loader, interlaced, image.bands * bits // 8)
    try:
        colors = color_source(file, image)
    except UnreadableColorsError as error:
        raise InputError(f"{path}: {error}.") from error
    kind = PixelKind(16 if image.format == "ushort" else 8, colors.alpha is not None)
    dpi = stated_dpi(file, image, loader)
    header = ImageHeader(
        path, width_px, height_px, image.bands, bits, loader, interlaced, decode_bytes, kind, dpi, colors
    )
    turned = width_px * height_px * image.bands * bits // 8 if needs_turning(image) else 0
    return replace(header, scratch_bytes=turned) if turned > SCRATCH_BYTES else header


def _decode_bytes(file: FileSource, image: Any, loader: str, interlaced: bool, pixel_bytes: int) -> int:
    """Host bytes of a decoder that keeps more than a few rows: measured bytes per px, rounded up."""
    pixels = image.width * image.height
    needed = 0
    if loader == "jpegload" and interlaced:
        # Two bytes per coefficient; libvips reports 4:2:2 as 4:2:0 too, so 2 + 1 + 1 channels are counted.
        subsampled = image.get_typeof("jpeg-chroma-subsample") and image.get("jpeg-chroma-subsample") == "4:2:0"
        needed = pixels * (4 if subsampled and image.bands == 3 else 2 * image.bands)
    elif loader == "pngload" and interlaced:
        needed = pixels * pixel_bytes
    elif loader == "tiffload":
        try:
            needed = tiff.decode_bytes(file.read_at) * (COLORS if is_joined(image) else 1)
        except ValueError:  # libtiff accepts the directory although we cannot read it: assume one single strip
            needed = 3 * pixels * pixel_bytes
    elif loader in _WHOLE_BYTES_PER_PX:
        needed = file.size_bytes + pixels * _WHOLE_BYTES_PER_PX[loader] * (1 if image.format == "uchar" else 2)
    turned = pixels * pixel_bytes if needs_turning(image) else 0
    return needed + (turned if turned <= SCRATCH_BYTES else 0) + min(turned, TURNING_BYTES)


def needs_turning(image: Any) -> bool:
    """Whether turning the image upright reads rows in another order than the file's (orientation 2 mirrors rows)."""
    return orientation(image) >= 3


def orientation(image: Any) -> int:
    """EXIF orientation, 1 to 8; 1 if the file has none."""
    return int(image.get("orientation")) if image.get_typeof("orientation") else 1
