"""Input images: streaming decode and streaming resize.

libvips decodes and resizes strip by strip in a thread of its own, and the caller receives bands of rows, so the image
is never in memory as a whole. `ImageHeader.decode_bytes` is the memory for the few formats that need more.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyvips

from pipeline.core.cancel import NEVER, CancelToken
from pipeline.core.errors import InputError
from pipeline.core.image_formats import RGB8, PixelKind
from pipeline.images.color import SRGB, Colors, ColorSource, converted
from pipeline.images.header import describe, needs_turning, open_file, open_image, orientation
from pipeline.images.upright import upright
from pipeline.images.vips_streams import BandPump, FileSource, Rows, reason

# Every libvips thread has its own strips: enlarging to 40,000 px takes 1.7 GB with 16 threads and 0.45 GB with 4, and
# the same time.
_MAX_THREADS = 4


def vips_version() -> str:
    """The version of libvips."""
    return ".".join(str(pyvips.version(part)) for part in range(3))


@contextmanager
def vips_settings() -> Iterator[None]:
    """Inside, libvips keeps no more in memory than the plan assumes."""
    cached, threads = pyvips.cache_get_max(), pyvips.concurrency_get()
    pyvips.cache_set_max(0)  # the cache would keep decoders, and their bands, after their last use
    pyvips.concurrency_set(min(threads, _MAX_THREADS))
    try:
        yield
    finally:
        pyvips.concurrency_set(threads)
        pyvips.cache_set_max(cached)


def stream_rgb(
    path: Path,
    width_px: int,
    height_px: int,
    band_px: int,
    cancel: CancelToken = NEVER,
    kind: PixelKind = RGB8,
    colors: Colors = SRGB,
    scratch: Path | None = None,
) -> Generator[tuple[int, Rows]]:
    """Decode an image, convert it to `colors` and resize it; yield its rows in bands of a fixed height.

    Yields ``(y0, rows)`` from the top, rows of shape (band_px, width_px, channels), uint8 or uint16; the last band may
    be lower. At most three bands are in memory at once. The kernel is Lanczos-3 downward and centred bicubic upward,
    axis by axis. Transparent parts are composited on white; with `kind.alpha`, for images that have alpha, it is the
    fourth channel, resized separately. `scratch`: the folder in which a large image is turned upright.

    Raises InputError, in the call for a bad header and while iterating for bad pixels; StorageError if the disk fails;
    Stopped soon after `cancel` is set.
    """
    if min(width_px, height_px, band_px) < 1:
        raise ValueError(f"size and band must be at least 1 px, not {width_px}×{height_px} in bands of {band_px}")
    file = open_file(path)
    image = open_image(file, "sequential")
    source = describe(file, image).colors
    convert = partial(_converted, path=path, size=(width_px, height_px), kind=kind, source=source, colors=colors)
    if needs_turning(image):
        return _turned_bands(file, image, convert, band_px, scratch, cancel)
    return BandPump(file, convert(image.autorot()), band_px).bands(cancel)


def _turned_bands(
    file: FileSource, image: Any, convert: Callable[[Any], Any], band_px: int, scratch: Path | None, cancel: CancelToken
) -> Generator[tuple[int, Rows]]:
    """The bands of an image whose upright rows are not in the order of the file."""
    with upright(file, image, orientation(image), scratch, cancel) as turned:
        read = FileSource(file.path)  # for the messages: nothing more is read from it
        yield from BandPump(read, convert(turned), band_px).bands(cancel)


def _converted(
    image: Any, *, path: Path, size: tuple[int, int], kind: PixelKind, source: ColorSource, colors: Colors
) -> Any:
    """The upright image in `colors`, resized to (width, height), as pixels of `kind`. Raises InputError."""
    width_px, height_px = size
    try:
        image = converted(image, source, colors, kind.alpha)
        bits = 16 if image.format == "ushort" else 8
        if kind.bits == 16 and (image.width, image.height) != size:
            image = image.cast("float")  # libvips sums 16-bit pixels with 12-bit weights: off by up to 28 of 65535
        image = _to_bits(_resize(image, width_px, height_px), bits, kind.bits)
    except pyvips.Error as error:
        raise InputError(
            f"{path}: cannot be converted to {colors.space}: {reason(error)}. Convert it to RGB first."
        ) from error
    assert (image.width, image.height, image.bands) == (width_px, height_px, kind.channels)
    return image


def _resize(image: Any, width_px: int, height_px: int) -> Any:
    """Lanczos-3 on the axes that shrink, then bicubic on those that grow; both are centred."""
    shrunk_width_px, shrunk_height_px = min(width_px, image.width), min(height_px, image.height)
    if (shrunk_width_px, shrunk_height_px) != (image.width, image.height):
        scale, vscale = shrunk_width_px / image.width, shrunk_height_px / image.height
        image = image.resize(scale, vscale=vscale, kernel="lanczos3")
    if (width_px, height_px) == (image.width, image.height):
        return image
    # Not Image.resize, which shifts an enlargement by half an output pixel before libvips 8.19. In double, because
    # libvips' other bicubics round the phase to 1/64 px, which is up to 4 levels at an edge.
    return image.cast("double").affine(
        (width_px / image.width, 0, 0, height_px / image.height),
        interpolate=pyvips.Interpolate.new("bicubic"),
        oarea=[0, 0, width_px, height_px],
        idx=0.5 * (1 - image.width / width_px),
        idy=0.5 * (1 - image.height / height_px),
        extend="copy",
        premultiplied=True,  # else the fourth band would be multiplied into the colours
    )


def _to_bits(image: Any, source_bits: int, bits: int) -> Any:
    """8 or 16 bits a channel, clipped and rounded; libvips' own shift of 16 bits by 8 darkens by half a level."""
    if image.format == ("uchar" if bits == 8 else "ushort"):
        return image
    factor = (2**bits - 1) / (2**source_bits - 1)
    return image.linear(factor, 0.5, uchar=True) if bits == 8 else image.linear(factor, 0.5).cast("ushort")
