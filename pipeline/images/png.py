"""What libvips does not report of a PNG: its chunks, and its colours without an ICC profile: gamma and primaries."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator

from pipeline.core.color_spaces import SpaceName, primaries_matrix, space_matrix
from pipeline.images.icc import Profile, matrix_profile, parse

_SIGNATURE_BYTES = 8
_MAX_CHUNKS = 1000
_HUNDRED_THOUSAND = 100_000
# Files of sRGB pixels say gamma 1/2.2, because PNG has no number for sRGB's curve, and round the primaries.
_SRGB_GAMMA, _GAMMA_TOLERANCE, _XY_TOLERANCE = 45455, 500, 0.003
_SRGB_CHROMATICITIES = ((0.3127, 0.3290), (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
# Code points of ITU-T H.273: primaries; the curves of sRGB and of linear light. HDR curves have no white level here.
_PRIMARIES: dict[int, SpaceName] = {1: "srgb", 9: "rec2020", 12: "display-p3"}
_GAMMAS = {4: 2.2, 8: 1.0, 13: None}


def profile(read_at: Callable[[int, int], bytes]) -> Profile | None:
    """A profile of the file's cICP, or gAMA and cHRM chunks; None if they mean sRGB, or another chunk counts.

    `read_at`: (offset, count) to at most count bytes.
    """
    found = dict(chunks(read_at))
    if len(code := found.get(b"cICP", b"")) == 4 and code[0] in _PRIMARIES and code[1] in _GAMMAS:
        space, gamma = _PRIMARIES[code[0]], _GAMMAS[code[1]]
        if (space, gamma) == ("srgb", None):
            return None
        return parse(matrix_profile(f"cICP: {space}", space_matrix(space), gamma))
    if b"iCCP" in found or b"sRGB" in found:
        return None
    return _from_gamma(found.get(b"gAMA", b""), found.get(b"cHRM", b""))


def _from_gamma(gamma_chunk: bytes, primaries_chunk: bytes) -> Profile | None:
    stored = int.from_bytes(gamma_chunk, "big") if len(gamma_chunk) == 4 else 0
    is_srgb_curve = not stored or abs(stored - _SRGB_GAMMA) <= _GAMMA_TOLERANCE
    matrix = space_matrix("srgb")
    if len(primaries_chunk) == 32:
        values = [value / _HUNDRED_THOUSAND for value in struct.unpack(">8I", primaries_chunk)]
        white, *primaries = zip(values[::2], values[1::2], strict=True)
        pairs = zip((white, *primaries), _SRGB_CHROMATICITIES, strict=True)
        if any(abs(x - x0) > _XY_TOLERANCE or abs(y - y0) > _XY_TOLERANCE for (x, y), (x0, y0) in pairs):
            with contextlib.suppress(ValueError):  # primaries of no colours: as if they were not there
                matrix = primaries_matrix((*primaries, white))
    if is_srgb_curve and matrix is space_matrix("srgb"):
        return None
    gamma = None if is_srgb_curve else _HUNDRED_THOUSAND / stored
    if gamma is not None and not 0.1 <= gamma <= 10:
        return None
    return parse(matrix_profile("gAMA and cHRM", matrix, gamma))


def chunks(read_at: Callable[[int, int], bytes]) -> Iterator[tuple[bytes, bytes]]:
    """(type, first 32 bytes) of the chunks before the pixels."""
    offset = _SIGNATURE_BYTES
    for _ in range(_MAX_CHUNKS):
        head = read_at(offset, 8)
        if len(head) < 8:
            return
        size, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT":
            return
        yield kind, read_at(offset + 8, min(size, 32))
        offset += 12 + size
