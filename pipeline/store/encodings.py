"""The 16-bit encodings of the compact state: fixed point for the canvas, bfloat16 for all else.

    fixed16     0..255 in steps of 1/257: code = 257·value, so that all 8-bit and 16-bit levels are exact
    bfloat16    the upper half of a float32: its range, 8 bits of precision

Both are stored as uint16, because Zarr has neither. Values that change by less than one step per iteration are rounded
stochastically, up with a probability equal to the fraction that is cut off: rounded to nearest, the second moment v and
a canvas under small steps would freeze. The random bytes depend on (seed, stage, iteration, chunk) alone, so a task
that runs twice, or again after a crash, writes the same bits.
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
# Largest |x − decoded(encoded(x))|/|x| of bfloat16, rounded to nearest: half a unit of the last of 8 bits.
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
        """`value` rounded to the nearest value that can be stored."""
        return float(self.decoded(self.encoded(np.array([value], np.float32)))[0])


class RoundingBytes:
    """The random bytes of one chunk in one iteration, in the order of its values.

    Philox is a counter-based generator: (seed, stage, iteration) are its key and the chunk is the start of its counter,
    so no two chunks or iterations share bytes, and no state is kept between them.
    """

    def __init__(self, seed: int, stage: int, iteration: int, chunk: tuple[int, int]) -> None:
        cy, cx = chunk
        self._bits = np.random.Philox(key=[seed, stage << 32 | iteration], counter=[0, cy, cx, 0])

    def take(self, shape: tuple[int, ...]) -> Random:
        """The next bytes, as many as `shape` holds: a multiple of 8."""
        count = int(np.prod(shape))
        assert count % 8 == 0, shape
        # little-endian on every machine, so that a run can be resumed on another one
        words: NDArray[Any] = self._bits.random_raw(count // 8)
        return words.astype("<u8", copy=False).view(np.uint8).reshape(shape)


def _decode_bfloat16(codes: Codes, out: Floats) -> None:
    bits = out.view(np.uint32)
    np.copyto(bits, codes)
    np.left_shift(bits, 16, out=bits)


def _encode_bfloat16(values: Floats, out: Codes) -> None:
    """Round to nearest, ties to even; values beyond the largest bfloat16 become infinite; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = np.right_shift(bits, 16)
    np.bitwise_and(rounded, 1, out=rounded)
    np.add(rounded, 0x7FFF, out=rounded)
    np.add(rounded, bits, out=rounded)
    _keep_upper_half(values, rounded, out)


def _encode_bfloat16_stochastic(values: Floats, random: Random, out: Codes, scratch: NDArray[np.uint32]) -> None:
    """Exact bfloat16 values are unchanged; the probability of rounding up is right to 1/512."""
    np.copyto(scratch, random)
    np.left_shift(scratch, 8, out=scratch)
    np.add(scratch, 128, out=scratch)  # the expected value of the lower byte, which is not drawn
    np.add(scratch, values.view(np.uint32), out=scratch)
    _keep_upper_half(values, scratch, out)


def _keep_upper_half(values: Floats, rounded: NDArray[np.uint32], out: Codes) -> None:
    np.right_shift(rounded, 16, out=rounded)
    np.copyto(out, rounded, casting="unsafe")
    if np.isnan(values.max(initial=-np.inf)):  # the carry can turn a NaN into a number
        out[np.isnan(values)] = _QUIET_NAN


def _decode_fixed16(codes: Codes, out: Floats) -> None:
    np.divide(codes, _STEPS, out=out)


def _encode_fixed16(values: Floats, out: Codes) -> None:
    _refuse_outside(values)
    scaled = np.multiply(values, _STEPS)
    np.rint(scaled, out=scaled)
    np.copyto(out, scaled, casting="unsafe")


def _encode_fixed16_stochastic(values: Floats, random: Random, out: Codes, scratch: NDArray[np.uint32]) -> None:
    """Computed in integers of 1/256 code: a sum in float32 could round past the largest code."""
    _refuse_outside(values)
    scaled = scratch.view(np.float32)
    np.multiply(values, _STEPS * 256, out=scaled)
    fine = scratch.view(np.int32)
    np.rint(scaled, out=fine, casting="unsafe")  # in place: int32 and float32 share the memory
    np.add(fine, random, out=fine)
    np.right_shift(fine, 8, out=fine)
    np.copyto(out, fine, casting="unsafe")


def _refuse_outside(values: Floats) -> None:
    # Fixed point has neither infinity nor NaN: they would be stored as some colour.
    if values.size and not (values.min() >= 0 and values.max() <= 255):
        raise DamagedStateError(
            f"a canvas has values from {values.min():g} to {values.max():g}, but the compact state holds 0..255: a "
            "computation failed, and the image would be wrong. The last committed iteration is intact: run the same "
            "command again to resume. If this happens again, test the machine's memory."
        )


BFLOAT16 = Encoding("bfloat16", _decode_bfloat16, _encode_bfloat16, _encode_bfloat16_stochastic)
FIXED16 = Encoding("fixed16", _decode_fixed16, _encode_fixed16, _encode_fixed16_stochastic)
ENCODINGS: Mapping[str, Encoding] = {encoding.name: encoding for encoding in (BFLOAT16, FIXED16)}
