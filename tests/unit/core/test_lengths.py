"""Lengths on paper: if they were read wrongly, a print would be ten times too large, or cut at the wrong place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.lengths import MM_PER_UNIT, Length, cm_of


@pytest.mark.parametrize(
    ("text", "mm"),
    [("6mm", 6), ("200 cm", 2000), ("1.5m", 1500), ("10 in", 254), (" 2CM ", 20), ("8 inches", 203.2), ('3"', 76.2)],
)
def test_a_length_is_read_in_its_unit(text: str, mm: float) -> None:
    assert Length.parse(text).mm == pytest.approx(mm)


@pytest.mark.parametrize(
    ("written", "part"),
    [
        ("6,5mm", "write a decimal point: 6.5mm"),
        (6, "6 has no unit; write 6mm"),
        (2.5, "2.5 has no unit"),
        ("60", "60 has no unit; write 60mm, 60cm"),
        ("60 ccm", "did you mean 60cm?"),
        ("60 px", "unknown unit 'px'; allowed: mm, cm, m, in"),
        ("-6mm", "expected a length such as 6mm"),
        ("1e9m", "expected a length"),
        (True, "expected a length"),
        ([], "expected a length"),
        ("2000m", "2000m is longer than 1000m"),
    ],
)
def test_a_wrong_length_says_how_to_write_it(written: object, part: str) -> None:
    with pytest.raises(ValueError) as refused:
        Length.parse(written)
    assert part in str(refused.value)


def test_px_are_whole_and_the_nearest() -> None:
    assert Length.parse("200cm").px(150) == 11811  # 11,811.02
    assert Length.parse("6mm").px(300) == 71  # 70.87
    assert cm_of(11811, 150) == pytest.approx(200, abs=0.001)


@given(st.integers(0, 999_999), st.sampled_from([0, 1, 2, 3]), st.sampled_from(sorted(MM_PER_UNIT)))
def test_the_text_of_a_length_is_read_as_the_same_length(number: int, decimals: int, unit: str) -> None:
    """A config is written to the manifest and read again."""
    length = Length(number / 10 ** (decimals + 3), unit)
    assert Length.parse(str(length)) == length
