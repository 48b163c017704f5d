"""Text drawn by libvips, with a font that comes with the package: a machine may have none.

Axes in names: H rows, W columns.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

import numpy as np
import pyvips
from numpy.typing import NDArray

# With the package: a machine without any font would draw boxes.
_FONT, _FONT_FILE = "DejaVu Sans", Path(__file__).parents[1] / "assets" / "DejaVuSans.ttf"
_BREAKS = re.compile(r"[._/,-]")  # where a key or a path may go on in the next line


def text_mask(text: str, text_px: int, width_px: int | None = None) -> NDArray[np.uint8]:
    """How much of each pixel the letters cover, 0..255, (whole lines, columns); broken at `width_px`."""
    line_px = text_px * 4 // 3
    if not text.strip():
        return np.zeros((line_px, 1), np.uint8)
    limits = {} if width_px is None else {"width": width_px, "wrap": "word-char"}
    image = pyvips.Image.text(
        escape(_BREAKS.sub("\\g<0>\u200b", text), quote=False),
        font=f"{_FONT} {text_px * 3 / 4}",
        fontfile=str(_FONT_FILE),
        dpi=96,
        **limits,
    )
    letters_HW = np.asarray(image.numpy())
    # libvips gives the letters alone: their offsets put them back onto the line, so that lines stand level
    y, x = max(image.yoffset, 0), max(image.xoffset, 0)
    lines = -(-(y + letters_HW.shape[0]) // line_px)
    out = np.zeros((lines * line_px, x + letters_HW.shape[1]), np.uint8)
    out[y : y + letters_HW.shape[0], x:] = letters_HW
    return out
