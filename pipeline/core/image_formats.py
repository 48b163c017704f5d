"""The output formats and their features: one table for the config, the plan and the writers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Bits = Literal["auto", 8, 16]
Compression = Literal["deflate", "lzw", "zstd", "jpeg", "none"]
COMPRESSIONS: tuple[str, ...] = get_args(Compression)
# Every libvips writes these into a TIFF. That of the pip wheels has no zstd, which is accepted where it can be written,
# but never suggested.
TIFF_COMPRESSIONS = ("deflate", "lzw", "jpeg", "none")
# Layout programs read these; what else a TIFF can hold, they often refuse.
PRINT_COMPRESSIONS = ("deflate", "lzw", "none")
Purpose = Literal["viewer", "print"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
Levels = Literal["pages", "subifds"]
LEVELS: tuple[Levels, ...] = get_args(Levels)
# The colours of an output; `content`: of the content's own profile. A file of a profile has one of the suffixes.
ProfileName = Literal["srgb", "adobe-rgb", "display-p3", "content"]
Intent = Literal["relative", "perceptual", "saturation", "absolute"]
PROFILES: tuple[str, ...] = get_args(ProfileName)
PROFILE_SUFFIXES = (".icc", ".icm")
INTENTS: tuple[str, ...] = get_args(Intent)
MetadataKept = Literal["keep", "keep-gps", "none"]
METADATA_KEPT: tuple[str, ...] = get_args(MetadataKept)
# 1,000,000 px are 85 m at 300 dpi.
MAX_SIDE_PX = 1_000_000
# Default long side of the images of a preview.
PREVIEW_PX = 512


@dataclass(frozen=True)
class PixelKind:
    """Pixel format: RGB with 8 or 16 bits per channel, with or without alpha as a fourth channel."""

    bits: int = 8
    alpha: bool = False

    @property
    def channels(self) -> int:
        """3, or 4 with alpha."""
        return 4 if self.alpha else 3

    @property
    def pixel_bytes(self) -> int:
        """Bytes of one pixel, uncompressed."""
        return self.channels * self.bits // 8

    def __str__(self) -> str:
        return f"{self.bits} bits per channel{', with alpha' if self.alpha else ''}"


RGB8 = PixelKind()


@dataclass(frozen=True)
class Format:
    """An output format: its suffixes, bit depths, compressions, and the values that `pyramid` can have.

    `rare_compressions`: those that only some builds of libvips write.
    """

    name: str
    suffixes: tuple[str, ...]
    bits: tuple[int, ...]
    alpha: bool
    max_side_px: int
    compressions: tuple[str, ...]
    pyramid: tuple[bool, ...]
    rare_compressions: tuple[str, ...] = ()


# The limit of libvips; PNG and TIFF could hold more.
MAX_OUTPUT_SIDE_PX = 10_000_000
FORMATS = (
    Format("TIFF", (".tif", ".tiff"), (8, 16), True, MAX_OUTPUT_SIDE_PX, TIFF_COMPRESSIONS, (True, False), ("zstd",)),
    Format("PNG", (".png",), (8, 16), True, MAX_OUTPUT_SIDE_PX, ("deflate",), (False,)),
    Format("JPEG", (".jpg", ".jpeg"), (8,), False, 65_500, ("jpeg",), (False,)),
    Format("DeepZoom", (".dz",), (8,), True, MAX_OUTPUT_SIDE_PX, ("jpeg",), (True,)),  # with alpha its tiles are PNG
    Format("OME-Zarr", (".zarr",), (8, 16), True, MAX_OUTPUT_SIDE_PX, ("zstd",), (True,)),
)
OUTPUT_SUFFIXES = tuple(suffix for output in FORMATS for suffix in output.suffixes)


def format_of(path: Path) -> Format | None:
    """The format for the suffix of `path`, or None."""
    return next((output for output in FORMATS if path.suffix.lower() in output.suffixes), None)


def is_jpeg_inside(path: Path, compression: str) -> bool:
    """Whether the output is a TIFF with JPEG compression: 8 bits, no alpha, lossy."""
    return compression == "jpeg" and path.suffix.lower() in (".tif", ".tiff")


def unsupported_options(path: Path, options: Mapping[str, object], alpha: bool = False) -> Iterator[tuple[str, str]]:
    """(option, reason) of every export option that the format of `path` would silently ignore.

    `options`: those that were given, or differ from their defaults. `alpha`: whether the image has alpha.
    """
    output = format_of(path)
    if output is None:  # the config refuses unknown suffixes
        return
    name, compressions = output.name, output.compressions
    if name == "DeepZoom" and alpha:
        name, compressions = "DeepZoom with alpha", ("deflate",)
    compression = options.get("compression", compressions[0])
    if compression not in (*compressions, *output.rare_compressions):
        others = _suffixes(other for other in FORMATS if compression in other.compressions)
        yield "compression", f"{name} supports only {compressions[0]}, not {compression}; omit it, or choose {others}"
        compression = compressions[0]
    pyramid = options.get("pyramid", output.pyramid[0])
    if pyramid not in output.pyramid:
        others = _suffixes(other for other in FORMATS if pyramid in other.pyramid)
        support = "does not support pyramids" if pyramid else "is always a pyramid"
        yield "pyramid", f"{name} {support}; omit it, or choose {others}"
    yield from _unsupported_layout(output, options)
    if options.get("metadata") == "keep-gps" and name == "OME-Zarr":
        yield "metadata", f"{name} has no place for coordinates; use keep, or choose {_suffixes(FORMATS[:3])}"
    if "quality" in options and compression != "jpeg":
        others = _suffixes(other for other in FORMATS if other.compressions == ("jpeg",))
        variant = f"{name} with compression {compression}" if len(compressions) > 1 else name
        text = f"applies to JPEG only, and {variant} does not use JPEG; omit it, or choose {others}"
        yield "quality", f"{text}, or .tif with compression jpeg"

    if options.get("profile", "srgb") != "srgb" and name == "OME-Zarr":
        yield "profile", "OME-Zarr has no place for a colour profile; omit it, or choose .tif or .png"


def _unsupported_layout(output: Format, options: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(option, reason) for `for`, `levels` and what they exclude."""
    purpose, has_levels = options.get("for"), options.get("pyramid", True) and True in output.pyramid
    if purpose is not None and (purpose == "viewer") not in output.pyramid:
        others = _suffixes(other for other in FORMATS if (purpose == "viewer") in other.pyramid)
        support = "has no smaller levels, which viewers need" if purpose == "viewer" else "is for viewers alone"
        yield "for", f"{output.name} {support}; omit it, or choose {others}"
    if purpose == "print" and output.name == "TIFF":
        has_levels = False
        compression = options.get("compression", "deflate")
        if compression not in PRINT_COMPRESSIONS:
            names = ", ".join(PRINT_COMPRESSIONS)
            yield "compression", f"layout programs may refuse {compression} in a TIFF; for print, choose one of {names}"
        if options.get("pyramid"):
            yield "pyramid", "a TIFF for print has no smaller levels; omit it, or choose for viewer"
    if "levels" in options and (output.name != "TIFF" or not has_levels):
        yield "levels", "applies only to a TIFF with smaller levels; omit it"


def _suffixes(formats: Iterable[Format]) -> str:
    return " or ".join(output.suffixes[0] for output in formats)


def ineffective_options(path: Path, options: Mapping[str, object]) -> Iterator[str]:
    """A sentence for every export option that the format accepts and that changes nothing there."""
    output = format_of(path)
    if output is None:
        return
    if options.get("for") == "print" and True not in output.pyramid:
        yield f"export.for: print changes nothing in a {output.name}, which is written in one way"
    if options.get("dpi") is not None and output.name == "DeepZoom":
        yield f"export.dpi: {output.name} has no place for it, so the output does not state it"


def is_too_deep(path: Path, bits: Bits, compression: str) -> bool:
    """Whether the format of an output has fewer bits per channel than these."""
    output = format_of(path)
    return bits == 16 and output is not None and (16 not in output.bits or is_jpeg_inside(path, compression))


def compressed_bytes(size_bytes: int, compression: str) -> int:
    """Upper bound of pixels' size in the file, before metadata: LZW makes noise larger."""
    return size_bytes * 3 // 2 if compression == "lzw" else size_bytes


def picture_kind(path: Path, bits: Bits, compression: str, content: PixelKind) -> PixelKind:
    """The pixel format of an output: the content's alpha, and with bits auto its bit depth, if the format has them."""
    output = format_of(path)
    lossy = is_jpeg_inside(path, compression)
    if bits == "auto":
        bits = 16 if content.bits == 16 and output is not None and 16 in output.bits and not lossy else 8
    return PixelKind(bits, content.alpha and output is not None and output.alpha and not lossy)
