"""How an exported TIFF is stored: tiles with smaller levels or strips, and 32-bit (classic) or 64-bit offsets.

Layout programs and RIPs read classic TIFF with strips, the baseline of the TIFF 6.0 specification, and often nothing
else. A classic TIFF cannot exceed 4 GiB, and how far the pixels compress is known only when they are written. So the
offsets are chosen from an upper bound of the size: a file that could exceed 4 GiB is a BigTIFF.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.core.tiling import Size

_TILE_PX = 256
_STRIP_ROWS = 16  # of 30,000 RGB pixels, 1.4 MB; readers keep a strip or two in memory
_CLASSIC_BYTES = 2**32
# The largest ratio of compressed to uncompressed size. LZW: a code of 12 bits for a byte. JPEG: a code of 16 bits and
# 10 more for a coefficient, which stands for a byte, and padding. Noise at quality 100 has 1.4 and 1.6.
_GROWTH = {"none": 1.0, "deflate": 1.01, "zstd": 1.01, "lzw": 1.55, "jpeg": 4.0}
_BLOCK_BYTES = 256  # of a strip or a tile: its offset, its size, and what its compression adds to few pixels
_DIRECTORY_BYTES = 8 * 2**20  # of a page, with its colour profile and metadata


@dataclass(frozen=True)
class TiffLayout:
    """`strips`: instead of tiles; without smaller levels. `subifds`: levels are SubIFDs of the page, not pages."""

    strips: bool = False
    subifds: bool = False


TILES = TiffLayout()


def tiff_options(size: Size, pixel_bytes: int, compression: str, pyramid: bool, layout: TiffLayout) -> dict[str, Any]:
    """The options of libvips' tiffsave for an image of `size` (height, width) and bytes of a pixel."""
    assert not (layout.strips and pyramid), "a TIFF of strips has no levels"
    big = largest_bytes(size, pixel_bytes, compression, pyramid, layout) >= _CLASSIC_BYTES
    options: dict[str, Any] = {"compression": compression, "bigtiff": big}
    if layout.strips:
        return {**options, "tile_height": _STRIP_ROWS}
    tiles = {"tile": True, "tile_width": _TILE_PX, "tile_height": _TILE_PX}
    return {**options, **tiles, "pyramid": pyramid, "subifd": pyramid and layout.subifds}


def largest_bytes(size: Size, pixel_bytes: int, compression: str, pyramid: bool, layout: TiffLayout) -> int:
    """Upper bound of the size of the file, for any pixels."""
    block_height, block_width = (_STRIP_ROWS, size[1]) if layout.strips else (_TILE_PX, _TILE_PX)
    total = 0.0
    for height, width in _levels(size) if pyramid else (size,):
        blocks = -(-height // block_height) * -(-width // block_width)
        pixels_bytes = block_height * block_width * pixel_bytes
        total += blocks * (pixels_bytes * _GROWTH[compression] + _BLOCK_BYTES) + _DIRECTORY_BYTES
    return int(total)


def _levels(size: Size) -> Iterator[Size]:
    """The image and its levels down to one that is a single tile."""
    height, width = size
    yield height, width
    while max(height, width) > _TILE_PX:
        height, width = max(height // 2, 1), max(width // 2, 1)
        yield height, width
