"""Kinds of picture files and what each can hold: one table for the config, the plan and the writers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Bits = Literal["auto", 8, 16]
Compression = Literal["deflate", "zstd", "jpeg", "none"]
COMPRESSIONS: tuple[str, ...] = get_args(Compression)
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
    """What one kind of output can hold, and how: its compressions, and whether it has smaller levels (`pyramid`)."""

    name: str
    suffixes: tuple[str, ...]
    bits: tuple[int, ...]
    alpha: bool
    max_side_px: int
    compressions: tuple[str, ...]
    pyramid: tuple[bool, ...]


# 10,000,000 px is libvips' own limit; PNG and TIFF could hold more.
FORMATS = (
    Format("TIFF", (".tif", ".tiff"), (8, 16), True, 10_000_000, COMPRESSIONS, (True, False)),
    Format("PNG", (".png",), (8, 16), True, 10_000_000, ("deflate",), (False,)),
    Format("JPEG", (".jpg", ".jpeg"), (8,), False, 65_500, ("jpeg",), (False,)),
    Format("DeepZoom", (".dz",), (8,), True, 10_000_000, ("jpeg",), (True,)),  # with alpha, of PNG tiles
    Format("OME-Zarr", (".zarr",), (8, 16), True, 10_000_000, ("zstd",), (True,)),
)
OUTPUT_SUFFIXES = tuple(suffix for form in FORMATS for suffix in form.suffixes)


def format_of(path: Path) -> Format | None:
    """The format that the suffix of `path` names."""
    return next((form for form in FORMATS if path.suffix.lower() in form.suffixes), None)


def is_jpeg_inside(path: Path, compression: str) -> bool:
    """Whether the pixels of a TIFF are kept as JPEG keeps them: 8 bits, no alpha, not exactly."""
    return compression == "jpeg" and path.suffix.lower() in (".tif", ".tiff")


def unheeded(path: Path, options: Mapping[str, object], alpha: bool = False) -> Iterator[tuple[str, str]]:
    """(option, why) of every option of an export that the format of `path` would pass over in silence.

    `options`: those that were given, or differ from their defaults. `alpha`: whether the picture has it.
    """
    form = format_of(path)
    if form is None:  # refused elsewhere
        return
    name, compressions = form.name, form.compressions
    if name == "DeepZoom" and alpha:
        name, compressions = "DeepZoom with alpha", ("deflate",)
    compression = options.get("compression", compressions[0])
    if compression not in compressions:
        others = _suffixes(other for other in FORMATS if compression in other.compressions)
        yield "compression", f"{name} has {compressions[0]} alone, not {compression}; leave it out, or choose {others}"
        compression = compressions[0]
    pyramid = options.get("pyramid", form.pyramid[0])
    if pyramid not in form.pyramid:
        others = _suffixes(other for other in FORMATS if pyramid in other.pyramid)
        has = "has no smaller levels" if pyramid else "always has smaller levels"
        yield "pyramid", f"{name} {has}; leave it out, or choose {others}"
    if "quality" in options and compression != "jpeg":
        others = _suffixes(other for other in FORMATS if other.compressions == ("jpeg",))
        inside = f"{name} with compression {compression}" if len(compressions) > 1 else name
        text = f"it is that of JPEG, which {inside} does not hold; leave it out, or choose {others}"
        yield "quality", f"{text}, or .tif with compression jpeg"


def _suffixes(formats: Iterable[Format]) -> str:
    return " or ".join(form.suffixes[0] for form in formats)


def picture_kind(path: Path, bits: Bits, compression: str, content: PixelKind) -> PixelKind:
    """The pixels of an output that shows a run of this content: its alpha, and with auto its bits, if they fit in."""
    form = format_of(path)
    lossy = is_jpeg_inside(path, compression)
    if bits == "auto":
        bits = 16 if content.bits == 16 and form is not None and 16 in form.bits and not lossy else 8
    return PixelKind(bits, content.alpha and form is not None and form.alpha and not lossy)
