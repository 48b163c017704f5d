"""Kinds of picture files and what each can hold: one table for the config, the plan and the writers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Bits = Literal["auto", 8, 16]
# A million px are 85 m at 300 dpi.
MAX_SIDE_PX = 1_000_000
# Long side of a preview's pictures, unless another is asked for.
PREVIEW_PX = 512


@dataclass(frozen=True)
class PixelKind:
    """What a pixel of a picture is: RGB of 8 or 16 bits a channel, with alpha as a fourth channel or without."""

    bits: int = 8
    alpha: bool = False

    @property
    def channels(self) -> int:
        """3 or 4."""
        return 4 if self.alpha else 3

    @property
    def pixel_bytes(self) -> int:
        """Bytes of one pixel, uncompressed."""
        return self.channels * self.bits // 8

    def __str__(self) -> str:
        return f"{self.bits} bits a channel{', with alpha' if self.alpha else ''}"


RGB8 = PixelKind()  # what most pictures are


@dataclass(frozen=True)
class Format:
    """What one kind of output can hold."""

    name: str
    suffixes: tuple[str, ...]
    bits: tuple[int, ...]
    alpha: bool
    max_side_px: int


# 10,000,000 px is libvips' own limit; PNG and TIFF could hold more.
FORMATS = (
    Format("TIFF", (".tif", ".tiff"), (8, 16), True, 10_000_000),
    Format("PNG", (".png",), (8, 16), True, 10_000_000),
    Format("JPEG", (".jpg", ".jpeg"), (8,), False, 65_500),
    Format("DeepZoom", (".dz",), (8,), True, 10_000_000),  # of PNG tiles then
    Format("OME-Zarr", (".zarr",), (8, 16), True, 10_000_000),
)
OUTPUT_SUFFIXES = tuple(suffix for form in FORMATS for suffix in form.suffixes)


def format_of(path: Path) -> Format | None:
    """The format that the suffix of `path` names."""
    return next((form for form in FORMATS if path.suffix.lower() in form.suffixes), None)


def is_jpeg_inside(path: Path, compression: str) -> bool:
    """Whether the pixels of a TIFF are kept as JPEG keeps them: 8 bits, no alpha, not exactly."""
    return compression == "jpeg" and path.suffix.lower() in (".tif", ".tiff")


def picture_kind(path: Path, bits: Bits, compression: str, content: PixelKind) -> PixelKind:
    """The pixels of an output that shows a run of this content: its alpha, and with auto its bits, if they fit in."""
    form = format_of(path)
    lossy = is_jpeg_inside(path, compression)
    if bits == "auto":
        bits = 16 if content.bits == 16 and form is not None and 16 in form.bits and not lossy else 8
    return PixelKind(bits, content.alpha and form is not None and form.alpha and not lossy)
