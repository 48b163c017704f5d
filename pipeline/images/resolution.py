"""The resolution that an image file states, in dpi. libvips fills in 25.4 or 72 dpi for a file that states none."""

from __future__ import annotations

import itertools
import struct
from fractions import Fraction
from typing import Any

from pipeline.core.lengths import MM_PER_INCH, sensible_dpi
from pipeline.images.png import chunks
from pipeline.images.vips_streams import FileSource

_PER_METRE = 1
# A PNG has a dozen kinds of chunks before its pixels; a file with more of them is not searched to its end.
_MAX_CHUNKS = 100


def stated_dpi(file: FileSource, image: Any, loader: str) -> float | None:
    """The horizontal resolution of an opened image file; None if it states none, or an impossible one."""
    dpi = sensible_dpi(_found_dpi(file, image, loader))
    return None if dpi == MM_PER_INCH else dpi  # 1 px per mm is what libvips writes for an image without a resolution


def _found_dpi(file: FileSource, image: Any, loader: str) -> float | None:
    if image.get_typeof("resolution-unit"):  # of TIFF, JFIF or EXIF
        # libvips reads the unit of EXIF in WebP and HEIF, but not the number
        is_set = loader not in ("webpload", "heifload")
        return float(image.xres) * MM_PER_INCH if is_set else _exif_dpi(image)
    return _png_dpi(file) if loader == "pngload" else None


def _exif_dpi(image: Any) -> float | None:
    name = "exif-ifd0-XResolution"
    try:
        number = float(Fraction(image.get(name).split()[0]))  # "300/1 (300, Rational, 1 components, 8 bytes)"
    except (ValueError, IndexError, ZeroDivisionError, OverflowError):
        return None
    return number * MM_PER_INCH / 10 if image.get("resolution-unit") == "cm" else number


def _png_dpi(file: FileSource) -> float | None:
    """The resolution of the chunk pHYs, if it is one per metre."""
    for kind, data in itertools.islice(chunks(file.read_at), _MAX_CHUNKS):
        if kind == b"pHYs" and len(data) == 9:
            per_metre, _, unit = struct.unpack(">IIB", data)
            return _whole_dpi(per_metre) if unit == _PER_METRE else None
    return None


def _whole_dpi(per_metre: int) -> float:
    """The whole dpi that is written as so many px per metre, if there is one: 2835 for 72, which would be 72.009."""
    dpi = per_metre * MM_PER_INCH / 1000
    return float(round(dpi)) if round(round(dpi) * 1000 / MM_PER_INCH) == per_metre else dpi
