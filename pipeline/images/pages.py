"""Files of several pages: whether three of them are the planes of one colour image, and what is said of the others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from pipeline.core.errors import InputError

# What a file says that its pages are channels of one image: OME-XML, and ImageJ's text.
_OME = re.compile(r"<Pixels\b[^>]*>")
_IMAGEJ = re.compile(r"^ImageJ=.*\bimages=3\b.*\bchannels=3\b", re.DOTALL)
COLORS = 3
# A page whose sides are at most this share of the first one's is a level of a pyramid, or a thumbnail.
_LEVEL = 0.75


def pages_of(image: Any) -> int:
    """The number of pages of an opened file."""
    return int(image.get("n-pages")) if image.get_typeof("n-pages") else 1


def has_planes_as_pages(image: Any) -> bool:
    """Whether the first three pages of an opened TIFF are its red, green and blue, by its own description."""
    if pages_of(image) < COLORS or image.bands != 1 or not image.get_typeof("image-description"):
        return False
    text = str(image.get("image-description"))
    if pixels := _OME.search(text):
        sizes = dict(re.findall(r'\bSize([CZT])="(\d+)"', pixels[0]))
        return sizes == {"C": str(COLORS), "Z": "1", "T": "1"}
    if text.startswith("{"):  # tifffile's description of an array
        try:
            shape = json.loads(text).get("shape")
        except (ValueError, AttributeError, RecursionError):
            return False
        return bool(shape == [COLORS, image.height, image.width])
    return _IMAGEJ.search(text) is not None


def joined_planes(image: Any, open_page: Callable[[int], Any]) -> Any:
    """The colour image of a file whose first three pages are its planes. Raises ValueError if they differ in size."""
    planes = [image, *(open_page(page) for page in range(1, COLORS))]
    if len({(plane.width, plane.height, plane.bands, plane.format) for plane in planes}) != 1:
        raise ValueError("its pages are described as red, green and blue, and have different sizes")
    colour = "rgb16" if image.format == "ushort" else "srgb"
    return image.bandjoin(planes[1:]).copy(interpretation=colour)


def is_joined(image: Any) -> bool:
    """Whether an opened image was joined from planes that are pages."""
    return image.bands == COLORS and has_planes_as_pages(image.extract_band(0))


def note_of(image: Any, open_page: Callable[[int], Any]) -> str:
    """What is read of a file of several pages, in words; empty for one page, and for the levels of a pyramid."""
    pages = pages_of(image)
    if pages < 2:
        return ""
    if is_joined(image):
        return f"its {pages} pages are read as red, green and blue"
    try:
        second = open_page(1)
    except InputError:  # of damage there, nothing is read
        second = image
    if max(second.width / image.width, second.height / image.height) <= _LEVEL:
        return ""
    return f"has {pages} pages, of which the first alone is read; save the page that you want as a file of its own"
