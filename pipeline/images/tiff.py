"""What libvips does not report of a TIFF: the memory that decoding takes, and how its channels are to be read.

Both are in the file's first directory. A TIFF consists of tiles or strips of any size: a strip may be the whole image.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.images.tiff_tags import ReadAt, read_first_directory

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _SAMPLES, _STRIP_ROWS, _PLANAR = 256, 257, 258, 262, 277, 278, 284
_TILE_WIDTH, _TILE_HEIGHT, _EXTRA_SAMPLES = 322, 323, 338
_DEFAULTS = {_BITS: 1, _PHOTOMETRIC: 2, _SAMPLES: 1, _STRIP_ROWS: 2**32 - 1, _PLANAR: 1}
_SEPARATE = 2
_YCBCR = 6
_ASSOCIATED, _UNASSOCIATED = 1, 2
# libvips reads taller strips line by line, except for separate planes and YCbCr
_TALL_STRIP_ROWS = 128


def decode_bytes(read_at: ReadAt) -> int:
    """Bytes that decoding the first page keeps beyond a few rows. Raises ValueError for a damaged directory.

    Measured: 2.3 strips, or 3 rows of tiles (docs/log.md).
    """
    tags = {tag: values[0] for tag, values in _integers(read_at).items()}
    try:
        width, height = tags[_WIDTH], tags[_HEIGHT]
    except KeyError as error:
        raise ValueError(f"the directory has no tag {error}") from None
    pixel_bytes = tags[_SAMPLES] * -(-tags[_BITS] // 8)
    if tile_width := tags.get(_TILE_WIDTH, 0):
        tile_bytes = tile_width * tags.get(_TILE_HEIGHT, height) * pixel_bytes
        # Two rows of tiles are queued, one is being decoded, and one tile is being cropped.
        return (3 * -(-width // tile_width) + 1) * tile_bytes
    rows = min(tags[_STRIP_ROWS], height)
    by_lines = rows > _TALL_STRIP_ROWS and tags[_PLANAR] != _SEPARATE and tags[_PHOTOMETRIC] != _YCBCR
    return 0 if by_lines else 5 * rows * width * pixel_bytes // 2


@dataclass(frozen=True)
class Channels:
    """How the channels are to be read. `photometric`: 1 grey, 2 RGB, 5 CMYK, 8 CIELAB, 9 ICC's L*a*b* …

    `says_extra`: whether the file says what the channels behind the colours are. `alpha`: which of them is the alpha,
    counted from 0.
    """

    photometric: int
    bits: int
    says_extra: bool
    alpha: int | None


def channels(read_at: ReadAt) -> Channels:
    """The channels of the first page. Raises ValueError for a damaged directory."""
    tags = _integers(read_at)
    extra = tags.get(_EXTRA_SAMPLES)
    alpha = next((index for index, kind in enumerate(extra or ()) if kind in (_ASSOCIATED, _UNASSOCIATED)), None)
    return Channels(tags[_PHOTOMETRIC][0], tags[_BITS][0], extra is not None, alpha)


def _integers(read_at: ReadAt) -> dict[int, tuple[int, ...]]:
    """The values of every integer tag of the first directory, with defaults for some that are missing."""
    tags = {number: (value,) for number, value in _DEFAULTS.items()}
    return tags | {number: tag.integers for number, tag in read_first_directory(read_at).items() if tag.integers}
