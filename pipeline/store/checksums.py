"""CRC-32C, and the journal's form of many checksums: little-endian 32-bit numbers in base64."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import crc32c
import numpy as np
from numpy.typing import NDArray

ChunkSums = dict[tuple[int, int], int]  # (chunk row, chunk column) → checksum


def checksum(data: bytes | NDArray[Any], previous: int = 0) -> int:
    """CRC-32C of a contiguous buffer, continued from the checksum `previous`."""
    buffer: Any = data  # numpy declares its arrays as buffers only from Python 3.12 on
    return int(crc32c.crc32c(buffer, previous))


def packed(sums: Iterable[int]) -> str:
    """Checksums as text."""
    return base64.b64encode(np.fromiter(sums, "<u4").tobytes()).decode()


@lru_cache(maxsize=64)
def unpacked(text: str) -> NDArray[np.uint32]:
    """The inverse of `packed`, as a read-only vector. Raises ValueError for any other text."""
    return np.frombuffer(base64.b64decode(text, validate=True), "<u4")


def merged(parts: Iterable[ChunkSums]) -> ChunkSums:
    """The checksums of all chunks of an array, from those of its parts."""
    return {index: value for part in parts for index, value in part.items()}
