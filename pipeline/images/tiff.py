"""The memory that decoding a TIFF takes, from its first directory, because libvips does not report it.

A TIFF consists of tiles or strips of any size: a strip may be the whole image.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

ReadAt = Callable[[int, int], bytes]  # (offset, count) to at most count bytes

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _SAMPLES, _STRIP_ROWS, _PLANAR = 256, 257, 258, 262, 277, 278, 284
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
_DEFAULTS = {_BITS: 1, _PHOTOMETRIC: 2, _SAMPLES: 1, _STRIP_ROWS: 2**32 - 1, _PLANAR: 1}
_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # field type to struct's letter
_MAX_ENTRIES = 4096
_SEPARATE = 2
_YCBCR = 6
# libvips reads taller strips line by line, except for separate planes and YCbCr
_TALL_STRIP_ROWS = 128


def decode_bytes(read_at: ReadAt) -> int:
    """Bytes that decoding the first page keeps beyond a few rows. Raises ValueError for a damaged directory.

    Measured: 2.3 strips, or 3 rows of tiles (docs/log.md).
    """
    tags = _first_directory(read_at)
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


def _first_directory(read_at: ReadAt) -> dict[int, int]:
    """The first value of every integer tag, with defaults for some that are missing."""
    head = read_at(0, 16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
    big = head[2:4] in (b"+\0", b"\0+")
    if not order or len(head) < 16:
        raise ValueError("no TIFF header")
    skip, pointer, count_letter, entry = ("8x", "Q", "Q", "HHQ8s") if big else ("4x", "I", "H", "HHI4s")
    (offset,) = _unpack(order + skip + pointer, head)
    count_bytes, entry_bytes = struct.calcsize(order + count_letter), struct.calcsize(order + entry)
    (count,) = _unpack(order + count_letter, read_at(offset, count_bytes))
    if count > _MAX_ENTRIES:
        raise ValueError(f"the directory has {count} entries")
    data = read_at(offset + count_bytes, count * entry_bytes)
    tags = dict(_DEFAULTS)
    for start in range(0, count * entry_bytes, entry_bytes):
        tag, kind, values, inline = _unpack(order + entry, data[start : start + entry_bytes])
        if kind in _INTEGERS and values:
            letter = order + _INTEGERS[kind]
            fits = values * struct.calcsize(letter) <= len(inline)
            tags[tag] = _unpack(letter, inline if fits else read_at(_unpack(order + pointer, inline)[0], 8))[0]
    return tags


def _unpack(form: str, data: bytes) -> tuple[Any, ...]:
    try:
        return struct.unpack_from(form, data)
    except struct.error as error:
        raise ValueError("the directory is truncated") from error
