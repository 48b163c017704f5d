"""The 16-bit encodings: round trips, refused values, and unbiased, repeatable stochastic rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.core.errors import DamagedStateError
from pipeline.store.encodings import BFLOAT16, BFLOAT16_ROUNDING, ENCODINGS, FIXED16, RoundingBytes

ALL_CODES = np.arange(65536, dtype=np.uint16)
any_floats = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32))
colours = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 255, width=32))


def encoded_stochastic(encoding, values, random):
    out = np.empty(values.shape, np.uint16)
    encoding.encode_stochastic(values, random, out, np.empty(values.shape, np.uint32))
    return out


def all_bytes(value):
    """The codes of one value under each of the 256 random bytes."""

    def codes(encoding):
        return encoded_stochastic(encoding, np.full(256, value, np.float32), np.arange(256, dtype=np.uint8))

    return codes


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
@pytest.mark.parametrize("byte", [0, 1, 127, 255])
def test_every_code_comes_back_as_itself(encoding, byte):
    """A state that is read and written again without a change would drift."""
    values = encoding.decoded(ALL_CODES)
    numbers = ~np.isnan(values)
    assert np.array_equal(encoding.encoded(values)[numbers], ALL_CODES[numbers])
    random = np.full(65536, byte, np.uint8)
    assert np.array_equal(encoded_stochastic(encoding, values, random)[numbers], ALL_CODES[numbers])


def test_the_canvas_holds_the_levels_of_8_and_16_bits_exactly():
    """The start at the content, and a 16-bit export, would be off by rounding."""
    levels = np.arange(256, dtype=np.float32)
    assert np.array_equal(FIXED16.decoded(FIXED16.encoded(levels)), levels)
    assert np.array_equal(np.rint(FIXED16.decoded(ALL_CODES) * np.float32(65535 / 255)), ALL_CODES)


def test_zeros_on_disk_are_zeros():
    """A new array is all zero bytes, and the moments start from it."""
    for encoding in ENCODINGS.values():
        assert encoding.decoded(np.zeros(3, np.uint16)).tolist() == [0, 0, 0]


# --- to nearest ------------------------------------------------------------------------------------------------------


@given(any_floats)
def test_bfloat16_is_torchs(values):
    """A non-standard rounding would differ at ties, subnormals, infinities and signs."""
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    result = BFLOAT16.decoded(BFLOAT16.encoded(values))
    assert np.array_equal(result, expected, equal_nan=True)
    assert np.array_equal(np.signbit(result), np.signbit(values)) or np.isnan(values).any()


@given(hnp.arrays(np.float32, 30, elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)))
def test_error_of_bfloat16_is_within_its_constant(values):
    """Whether an image has converged is decided with this bound."""
    result = BFLOAT16.decoded(BFLOAT16.encoded(values))
    assert (np.abs(result.astype(np.float64) - values) <= BFLOAT16_ROUNDING * np.abs(values.astype(np.float64))).all()


@given(colours)
def test_canvas_errs_by_half_a_step(values):
    """A step is 1/257 of a level: a larger error would be seen in a 16-bit export."""
    result = FIXED16.decoded(FIXED16.encoded(values)).astype(np.float64)
    assert np.abs(result - values).max() <= 0.5 / 257 + 1e-5  # 1e-5: float32 itself, near 255


@given(st.floats(0, 3e38), st.sampled_from([BFLOAT16, FIXED16]))
def test_nearest_of_one_value_is_what_an_array_would_hold(value, encoding):
    """The first step's size is set from the largest gradient, which has to be the stored one."""
    if encoding is FIXED16:
        value = value % 255
    values = np.array([value], np.float32)
    assert encoding.nearest(value) == encoding.decoded(encoding.encoded(values))[0]


# --- stochastic ------------------------------------------------------------------------------------------------------


@given(
    st.one_of(st.floats(2.0**-100, 2.0**100, width=32), st.floats(0, 255, width=32)),
    st.sampled_from([BFLOAT16, FIXED16]),
)
def test_stochastic_rounding_is_fair_to_1_in_512(value, encoding):
    """v would freeze or drift, and with it the size of all steps."""
    if encoding is FIXED16:
        value = np.float32(value % 255)
    codes = all_bytes(value)(encoding).astype(np.int64)
    low, high = codes.min(), codes.max()
    assert high - low <= 1
    lower, upper = (encoding.decoded(np.array([code], np.uint16)).astype(np.float64)[0] for code in (low, low + 1))
    mean = lower + (codes - low).mean() * (upper - lower)
    # beside the 1/512: float32 has 1/257 of a step of the canvas left near 255
    slack = 255 * 2.0**-24 if encoding is FIXED16 else 0
    # The lower byte is not drawn: a value just below a code may always be rounded up to it, as 105471 is in bfloat16.
    assert lower - slack - (upper - lower) / 512 <= value <= upper + slack
    assert abs(mean - value) <= (upper - lower) / 512 + 2 * slack


def test_mean_of_many_roundings_is_the_value():
    """The bytes that are drawn must be as fair as the rounding: three sigma of a million draws."""
    for encoding, value in ((BFLOAT16, 1.0 + 1 / 512), (BFLOAT16, 3e-7), (FIXED16, 100.001), (FIXED16, 254.999)):
        values = np.full((1000, 1000), value, np.float32)
        random = RoundingBytes(seed=3, stage=1, iteration=5, chunk=(2, 1)).take(values.shape)
        result = encoding.decoded(encoded_stochastic(encoding, values, random)).astype(np.float64)
        step = np.ptp(result)
        assert abs(result.mean() - values[0, 0]) <= step / 512 + 3 * 0.5 * step / 1000


def test_a_small_decay_does_not_freeze():
    """Rounded to nearest, v·0.999 is v again in bfloat16, so v would never forget a large gradient."""
    values = np.full(8000, 1.0, np.float32)
    nearest = values.copy()
    for iteration in range(500):
        bytes_ = RoundingBytes(0, 0, iteration, (0, 0)).take(values.shape)
        values = BFLOAT16.decoded(encoded_stochastic(BFLOAT16, values * np.float32(0.999), bytes_))
        nearest = BFLOAT16.decoded(BFLOAT16.encoded(nearest * np.float32(0.999)))
    assert nearest[0] == 1
    assert values.mean() == pytest.approx(0.999**500, rel=0.01)


def test_a_canvas_under_tiny_steps_moves():
    """Steps under half of 1/257 level, late in a schedule, would be lost one by one."""
    values = np.full(8000, 100, np.float32)
    for iteration in range(300):
        bytes_ = RoundingBytes(0, 0, iteration, (0, 0)).take(values.shape)
        values = FIXED16.decoded(encoded_stochastic(FIXED16, values + np.float32(0.001), bytes_))
    assert values.mean() == pytest.approx(100.3, abs=0.01)


# --- NaN and infinity ------------------------------------------------------------------------------------------------


NANS = np.array([np.nan, -np.nan], np.float32)
ODD_NANS = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)


@pytest.mark.parametrize("byte", [0, 128, 255])
def test_nan_stays_nan(byte):
    """The carry of rounding can turn a NaN into 0 or infinity, which would hide a broken state."""
    values = np.concatenate([NANS, ODD_NANS, np.array([1.5], np.float32)])
    random = np.full(values.shape, byte, np.uint8)
    for codes in (BFLOAT16.encoded(values), encoded_stochastic(BFLOAT16, values, random)):
        result = BFLOAT16.decoded(codes)
        assert np.isnan(result[:-1]).all()
        assert result[-1] == 1.5


@pytest.mark.parametrize("byte", [0, 255])
def test_infinity_stays_infinite(byte):
    """Infinity is the overflow of a number and must not be read back as NaN or as a finite number."""
    values = np.array([np.inf, -np.inf], np.float32)
    random = np.full(2, byte, np.uint8)
    for codes in (BFLOAT16.encoded(values), encoded_stochastic(BFLOAT16, values, random)):
        assert np.array_equal(BFLOAT16.decoded(codes), values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.01, 255.01, 1e9])
@pytest.mark.parametrize("place", [0, -1])
def test_canvas_refuses_what_it_cannot_hold(bad, place):
    """A NaN, or a value beyond the range, would be stored as some colour."""
    values = np.full(100, 7, np.float32)
    values[place] = bad
    with pytest.raises(DamagedStateError, match=r"0\.\.255"):
        FIXED16.encoded(values)
    with pytest.raises(DamagedStateError, match=r"0\.\.255"):
        encoded_stochastic(FIXED16, values, np.zeros(100, np.uint8))


def test_both_ends_of_the_canvas_stay_what_they_are():
    """White would become black if rounding exceeded the largest code."""
    for value in (0.0, 255.0):
        assert set(FIXED16.decoded(all_bytes(value)(FIXED16))) == {value}
    top = all_bytes(np.nextafter(np.float32(255), np.float32(0)))(FIXED16)
    assert set(top.tolist()) <= {65534, 65535}


# --- the random bytes ------------------------------------------------------------------------------------------------

PINNED = [156, 211, 200, 105, 140, 57, 136, 160]
KEY = {"seed": 5, "stage": 2, "iteration": 7, "chunk": (3, 4)}


def test_same_place_same_bytes():
    """Otherwise a task that runs again, or a resumed run, would write a different state."""
    first, again = (RoundingBytes(**KEY).take((64, 48)) for _ in range(2))
    assert np.array_equal(first, again)
    rows = RoundingBytes(**KEY)
    assert np.array_equal(first, np.concatenate([rows.take((16, 48)) for _ in range(4)]))


def test_bytes_are_these_for_good():
    """A later version with other bytes could not resume a run of this one."""
    assert RoundingBytes(**KEY).take((8,)).tolist() == PINNED


@pytest.mark.parametrize(
    "other", [{"seed": 6}, {"stage": 3}, {"iteration": 8}, {"chunk": (4, 3)}, {"chunk": (3, 5)}, {"chunk": (2, 4)}]
)
def test_another_place_has_other_bytes(other):
    """The same rounding in every chunk or iteration would be visible as a pattern in the image."""
    first, second = (RoundingBytes(**{**KEY, **keys}).take((80_000,)).astype(float) for keys in ({}, other))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert (first == second).mean() < 0.01


@given(st.integers(0, 2**63 - 1), st.integers(0, 20), st.integers(0, 10**6), st.integers(0, 10**5))
def test_bytes_exist_for_every_place(seed, stage, iteration, index):
    """The largest seed, or a long run, must not end in an overflow."""
    assert RoundingBytes(seed, stage, iteration, (index, index)).take((16,)).shape == (16,)
