"""Encodes the small tiles that a browser shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyvips
from numpy.typing import NDArray

# Without chroma subsampling: at 100 % a stylised picture has fine coloured detail, which subsampling would smear.
_OPTIONS: dict[str, dict[str, Any]] = {
    "jpg": {"Q": 90, "subsample_mode": "off", "keep": "none"},
    "webp": {"Q": 90, "smart_subsample": True, "effort": 2, "keep": "none"},
}
TILE_TYPES = {"jpg": "image/jpeg", "webp": "image/webp"}


def encode_tile(pixels_HWC: NDArray[np.uint8], suffix: str) -> bytes:
    """The pixels, sRGB with or without alpha or one grey channel, as a file of TILE_TYPES in memory."""
    height, width, channels = pixels_HWC.shape
    data = np.ascontiguousarray(pixels_HWC)
    image = pyvips.Image.new_from_memory(data.data, width, height, channels, "uchar")
    image = image.copy(interpretation="srgb" if channels >= 3 else "b-w")
    return bytes(image.write_to_buffer(f".{suffix}", **_OPTIONS[suffix]))
