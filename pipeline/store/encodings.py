"""The 16-bit encodings of the compact state: a canvas in fixed point, everything else in bfloat16.

    fixed16     0..255 in steps of 1/257: code = 257·value, so that every 8-bit level and 0..65535 are exact
    bfloat16    the upper half of a float32: its range, 8 bits of precision

Both are stored as uint16, because Zarr has neither. What changes by less than one step per iteration must be rounded
stochastically: up with a probability equal to the part that is cut off. Rounded to nearest, the second moment v and a
canvas under small steps would freeze. The random bytes are a function of (seed, stage, iteration, chunk) alone, so a
task that runs twice, or after a crash, writes the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import DamagedStateError

Floats = NDArray[np.float32]
Codes = NDArray[np.uint16]
Random = NDArray[np.uint8]

_STEPS = np.float32(257)  # codes per level: 255 · 257 = 65535
_QUIET_NAN = 0x7FC0
# Largest |x − decoded(encoded(x))|/|x| of bfloat16 to nearest: half a unit of the last of 8 bits.
BFLOAT16_ROUNDING = 2.0**-8


@dataclass(frozen=True)
class Encoding:
    """How float32 values are stored in 16 bits. Arrays may have any shape, the same for all arguments.

    `decode(codes, out)`; `encode(values, out)` to nearest; `encode_stochastic(values, random, out, scratch)` with one
    random byte per value, where `scratch` is uint32 and overwritten.
    """

    name: str
    decode: Callable[[Codes, Floats], None]
    encode: Callable[[Floats, Codes], None]
    encode_stochastic: Callable[[Floats, Random, Codes, NDArray[np.uint32]], None]

    def encoded(self, values: Floats) -> Codes:
        """The codes of `values`, to nearest."""
        codes = np.empty(values.shape, np.uint16)
        self.encode(values, codes)
        return codes

    def decoded(self, codes: Codes) -> Floats:
        """The values of `codes`."""
        values = np.empty(codes.shape, np.float32)
        self.decode(codes, values)
        return values

    def nearest(self, value: float) -> float:
        """`value` as it reads after it was stored."""
        return float(self.decoded(self.encoded(np.array([value], np.float32)))[0])


class RoundingBytes:
    """The random bytes of one chunk in one iteration, taken in the order of its values.

    Philox counts: (seed, stage, iteration) are its key, the chunk is the start of its counter, so no two chunks and no
    two iterations share a byte, and nothing has to be kept between them.
    """

    def __init__(self, seed: int, stage: int, iteration: int, chunk: tuple[int, int]) -> None:
        cy, cx = chunk
        self._bits = np.random.Philox(key=[seed, stage << 32 | iteration], counter=[0, cy, cx, 0])

    def take(self, shape: tuple[int, ...]) -> Random:
        """The next bytes, as many as `shape` holds: a multiple of 8."""
        count = int(np.prod(shape))
        assert count % 8 == 0, shape
        # little-endian wherever it runs, so that a run may go on on another machine
        words: NDArray[Any] = self._bits.random_raw(count // 8)
        return words.astype("<u8", copy=False).view(np.uint8).reshape(shape)


def _decode_bfloat16(codes: Codes, out: Floats) -> None:
    bits = out.view(np.uint32)
    np.copyto(bits, codes)
    np.left_shift(bits, 16, out=bits)


def _encode_bfloat16(values: Floats, out: Codes) -> None:
    """To nearest, ties to even; beyond the largest bfloat16 becomes infinite, as in float32; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = np.right_shift(bits, 16)
    np.bitwise_and(rounded, 1, out=rounded)
    np.add(rounded, 0x7FFF, out=rounded)
    np.add(rounded, bits, out=rounded)
    _keep_upper_half(values, rounded, out)


def _encode_bfloat16_stochastic(values: Floats, random: Random, out: Codes, scratch: NDArray[np.uint32]) -> None:
    """What bfloat16 holds stays as it is; the chance of rounding up is right to 1/512."""
    np.copyto(scratch, random)
    np.left_shift(scratch, 8, out=scratch)
    np.add(scratch, 128, out=scratch)  # the mean of the byte that was not drawn
    np.add(scratch, values.view(np.uint32), out=scratch)
    _keep_upper_half(values, scratch, out)


def _keep_upper_half(values: Floats, rounded: NDArray[np.uint32], out: Codes) -> None:
    np.right_shift(rounded, 16, out=rounded)
    np.copyto(out, rounded, casting="unsafe")
    if np.isnan(values.max(initial=-np.inf)):  # the carry may have made a number of it
        out[np.isnan(values)] = _QUIET_NAN


def _decode_fixed16(codes: Codes, out: Floats) -> None:
    np.divide(codes, _STEPS, out=out)


def _encode_fixed16(values: Floats, out: Codes) -> None:
    _refuse_outside(values)
    scaled = np.multiply(values, _STEPS)
    np.rint(scaled, out=scaled)
    np.copyto(out, scaled, casting="unsafe")


def _encode_fixed16_stochastic(values: Floats, random: Random, out: Codes, scratch: NDArray[np.uint32]) -> None:
    """In integers of 1/256 code, which the largest value fills exactly: a sum in float32 could round past it."""
    _refuse_outside(values)
    scaled = scratch.view(np.float32)
    np.multiply(values, _STEPS * 256, out=scaled)
    fine = scratch.view(np.int32)
    np.rint(scaled, out=fine, casting="unsafe")  # each value onto its own bits
    np.add(fine, random, out=fine)
    np.right_shift(fine, 8, out=fine)
    np.copyto(out, fine, casting="unsafe")


def _refuse_outside(values: Floats) -> None:
    """Fixed point has no infinity and no NaN: they would be stored as some colour."""
    if values.size and not (values.min() >= 0 and values.max() <= 255):
        raise DamagedStateError(
            f"a canvas holds values from {values.min():g} to {values.max():g}, which the compact state (0..255) cannot "
            "keep: something computed wrongly, and the picture would be wrong. What was committed before is whole: "
            "give the same command again. If it happens again, test the machine's memory."
        )


BFLOAT16 = Encoding("bfloat16", _decode_bfloat16, _encode_bfloat16, _encode_bfloat16_stochastic)
FIXED16 = Encoding("fixed16", _decode_fixed16, _encode_fixed16, _encode_fixed16_stochastic)
ENCODINGS: Mapping[str, Encoding] = {encoding.name: encoding for encoding in (BFLOAT16, FIXED16)}
