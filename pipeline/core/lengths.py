"""Lengths on paper, as people write them: 6mm, 200 cm, 1.5m, 10 in. Resolutions are in dpi, px per inch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Self

from pipeline.core.text import shown

MM_PER_INCH = 25.4
MM_PER_UNIT = {"mm": 1.0, "cm": 10.0, "m": 1000.0, "in": MM_PER_INCH}
# A kilometre. It bounds what a typing error can ask for; the limits of pictures in px are lower at any usual dpi.
MAX_MM = 1e6
MIN_DPI, MAX_DPI = 1.0, 100_000.0
# The resolution of a picture about which nothing is known: what print shops ask for.
DEFAULT_DPI = 300.0
# Sizes of paper for proof sheets, (width, height) in mm
PAPERS_MM = {"a4": (210.0, 297.0), "a3": (297.0, 420.0), "letter": (215.9, 279.4)}
# Below, letters of 2.4 mm are illegible; above, a sheet of A3 takes more than 0.3 GB.
MIN_PROOF_DPI, MAX_PROOF_DPI = 72.0, 720.0
# More parts of an image would be smaller than 9 cm on A4.
MAX_PARTS = 6
PROOF_SUFFIXES = (".pdf", ".tif", ".tiff")
EXPECTED = "a length such as 6mm, 20 cm, 1.5m or 10in"

_OTHER_NAMES = {"inch": "in", "inches": "in", '"': "in", "″": "in", "meter": "m", "metre": "m"}
# The digits are bounded, so that no text takes long to match or becomes infinite.
_LENGTH = re.compile(r"([0-9]{1,9}(?:[.,][0-9]{1,9})?)\s*([^\s0-9.,]{0,20})", re.ASCII)


@dataclass(frozen=True)
class Length:
    """A length in the unit that it was written in, one of MM_PER_UNIT."""

    value: float
    unit: str

    @classmethod
    def parse(cls, written: object) -> Self:
        """The length that a text names. Raises ValueError, which says what is wrong and how to write it."""
        text = written.strip() if isinstance(written, str) else str(written)
        match = _LENGTH.fullmatch(text)
        # A number of YAML has no unit; true and lists are no numbers at all.
        if match is None or isinstance(written, bool) or not isinstance(written, str | int | float):
            raise ValueError(f"expected {EXPECTED}, found {shown(text)!r}")
        number, name = match[1].replace(",", "."), match[2].lower()
        unit = _OTHER_NAMES.get(name, name)
        if not unit:
            raise ValueError(f"{shown(text)} has no unit; write {number}mm, {number}cm, {number}m or {number}in")
        if unit not in MM_PER_UNIT:
            close = difflib.get_close_matches(unit, MM_PER_UNIT, n=1)
            hint = f"; did you mean {number}{close[0]}?" if close else ""
            raise ValueError(f"unknown unit {shown(name)!r}; allowed: {', '.join(MM_PER_UNIT)}{hint}")
        if "," in match[1]:
            raise ValueError(f"{shown(text)} has a comma; write a decimal point: {number}{unit}")
        length = cls(float(number), unit)
        if length.mm > MAX_MM:
            raise ValueError(f"{shown(text)} is longer than {cls(MAX_MM / 1000, 'm')}")
        return length

    @property
    def mm(self) -> float:
        """The length in millimetres."""
        return self.value * MM_PER_UNIT[self.unit]

    def px(self, dpi: float) -> int:
        """The length in whole px at a resolution."""
        return round(self.mm * dpi / MM_PER_INCH)

    def __str__(self) -> str:
        return f"{self.value:.9f}".rstrip("0").rstrip(".") + self.unit  # never 1e-05, which parse() refuses


NO_LENGTH = Length(0, "mm")


def sensible_dpi(dpi: float | None) -> float | None:
    """`dpi` rounded to hundredths, as TIFF's fractions of float32 are not exact; None if it is none or impossible."""
    if dpi is None or not MIN_DPI <= dpi <= MAX_DPI:
        return None
    return round(dpi, 2)


def cm_text(length_px: int, dpi: float) -> str:
    """The centimetres that `length_px` take on paper, to the millimetre."""
    return f"{length_px * MM_PER_INCH / 10 / dpi:.1f}"


def sharp_from_m(dpi: float) -> float:
    """The distance in metres from which an eye sees no px: at 1 m it resolves 180 dpi, half a minute of arc."""
    return 180 / dpi
