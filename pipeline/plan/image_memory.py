"""Host memory of libvips while it reads, resizes and writes images: upper bounds fitted to measurements.

Fitted with 4 libvips threads, the most that the program uses, over images up to 30,001 px wide (docs/log.md).
"""

from __future__ import annotations

from pipeline.core.image_formats import PixelKind, compressed_bytes
from pipeline.core.tiling import Size
from pipeline.images import SRGB, ImageHeader

MIB = 2**20
# libvips writes a smaller level of a TIFF into a temporary file if it is larger than this; other levels stay in memory
# until the largest is written. libvips reads the limit once per process, so it cannot be set reliably.
LEVEL_BYTES = 100 * MIB
# The constant term of both fits.
_LIBVIPS_BYTES = 40 * MIB


def ingest_bytes(image: ImageHeader, width_px: int, chunk_px: int, kind: PixelKind, in_float: bool = False) -> int:
    """Peak bytes of decoding an image, resizing it to `width_px` columns, and storing it as pixels of `kind`.

    `in_float`: its colours are converted in float, whatever they are, and have 16 bits then.
    """
    bits = 16 if in_float or image.colors.needs_float(SRGB, image.bits) else image.bits
    # 9 kB per source column and 8 bits, and 4 kB per target column when enlarging.
    rows = 9_000 * image.width_px * bits // 8 + (4_000 * width_px if width_px > image.width_px else 0)
    if kind.bits == 16 and width_px != image.width_px:
        rows = rows * 3 // 2  # 16 bits are resized in float
    return _LIBVIPS_BYTES + image.decode_bytes + rows * kind.channels // 3 + 3 * chunk_px * width_px * kind.pixel_bytes


def export_bytes(
    size: Size, kind: PixelKind, *, tiff: bool, pyramid: bool, compression: str = "deflate", edges: bool = False
) -> int:
    """Peak bytes of writing an output image: bands of rows, the encoder, and a pyramid's levels in memory.

    `edges`: the rows are made of rows of the canvas, of which another band is in memory.
    """
    height_px, width_px = size
    band = min(64 * MIB, 512 * width_px * kind.pixel_bytes)
    rows = (4_000 if tiff else 8_000) * width_px * kind.pixel_bytes // 3
    levels = _levels_in_memory(height_px * width_px * kind.pixel_bytes) if tiff and pyramid else 0
    return _LIBVIPS_BYTES + (4 if edges else 3) * band + rows + compressed_bytes(levels, compression)


def levels_on_disk_bytes(size: Size, kind: PixelKind, compression: str) -> int:
    """Disk that the temporary files of a TIFF's smaller levels take: a third of the image, 0 if they fit in memory."""
    size_bytes = size[0] * size[1] * kind.pixel_bytes
    return compressed_bytes(size_bytes // 3, compression) if size_bytes > 4 * LEVEL_BYTES else 0


def _levels_in_memory(image_bytes: int) -> int:
    """Bytes of the levels of a TIFF that stay in memory; each level is a quarter of the one before it."""
    level = image_bytes / 4
    while level > 1.05 * LEVEL_BYTES:  # 1.05: the sides of a level are rounded, so it may be a little smaller
        level /= 4
    return int(level * 4 / 3 * 1.02)
