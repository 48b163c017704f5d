"""CRC-32C, and how the journal keeps many of them: little-endian 32-bit numbers in base64."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import crc32c
import numpy as np
from numpy.typing import NDArray

ChunkSums = dict[tuple[int, int], int]  # (chunk row, chunk column) → checksum


def checksum(data: bytes | NDArray[Any], previous: int = 0) -> int:
    """CRC-32C of a contiguous buffer, going on from `previous`."""
    buffer: Any = data  # numpy types its arrays as buffers from Python 3.12 on only
    return int(crc32c.crc32c(buffer, previous))


def packed(sums: Iterable[int]) -> str:
    """Checksums as text."""
    return base64.b64encode(np.fromiter(sums, "<u4").tobytes()).decode()


@lru_cache(maxsize=64)
def unpacked(text: str) -> NDArray[np.uint32]:
    """The checksums of `packed`, in one row; not to be written to. Raises ValueError for any other text."""
    return np.frombuffer(base64.b64decode(text, validate=True), "<u4")


def grid_of(text: str, shape: Sequence[int]) -> NDArray[np.uint32]:
    """The checksums of `packed` by (chunk row, chunk column)."""
    return unpacked(text).reshape(shape)
