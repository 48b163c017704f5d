"""ICC profiles that consist of curves and a matrix: reading them exactly, and writing them.

libvips converts such profiles of 16 bits over a grid, which is off by up to 22 of 255 levels at clipped edges, and does
not tell a profile's gamut. Profiles of tables (CMYK, most printers) are left to libvips.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import numpy as np
import pyvips
from numpy.typing import NDArray

from pipeline.core.color_spaces import D50, Matrix, SpaceName, space_matrix
from pipeline.core.text import shown

_HEADER = struct.Struct(">I4sI4s4s4s12s4s")
_TAG = struct.Struct(">4sII")
_MAX_TAGS = 1000
_COLORANTS, _CURVES = (b"rXYZ", b"gXYZ", b"bXYZ"), (b"rTRC", b"gTRC", b"bTRC")
# sRGB's curve as parameters of ICC's function 3: ((x·a + b)^g where x ≥ d, else c·x).
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_PARAMETERS = (1, 3, 4, 5, 7)  # of each of ICC's functions


@dataclass(frozen=True)
class Profile:
    """A profile's header. `space`: RGB, CMYK, GRAY, Lab …; `device`: mntr, prtr, scnr …; `data`: the whole profile.

    `matrix`: linear RGB to XYZ, of an RGB profile that consists of curves and a matrix. `curves`: then, and of a grey
    profile that is one curve, the tags of each channel's curve.
    """

    name: str
    space: str
    device: str
    data: bytes
    matrix: Matrix | None = None
    curves: tuple[bytes, ...] = ()
    writable: bool = True  # has what a conversion to this profile needs

    def tables(self, levels: int) -> NDArray[np.float64]:
        """Linear light of `levels` even steps 0..1, (levels, channels). Raises ValueError for a damaged curve."""
        steps = np.linspace(0, 1, levels)
        return np.stack([_curve(tag, steps) for tag in self.curves], axis=1)


def parse(data: bytes) -> Profile:
    """Read a profile. Raises ValueError if it is damaged."""
    try:
        _, _, _, device, space, connection, _, signature = _HEADER.unpack_from(data)
        (count,) = struct.unpack_from(">I", data, 128)
        if signature != b"acsp" or count > _MAX_TAGS:
            raise ValueError("no ICC profile")
        entries = [_TAG.unpack_from(data, 132 + 12 * index) for index in range(count)]
        tags = {name: data[start : start + size] for name, start, size in entries}
        matrix = curves = None
        if space == b"RGB " and connection == b"XYZ " and {*_COLORANTS, *_CURVES} <= tags.keys():
            matrix = np.stack([np.array(struct.unpack_from(">8x3i", tags[tag])) / 65536 for tag in _COLORANTS], axis=1)
            curves = tuple(tags[tag] for tag in _CURVES)
        elif space == b"GRAY" and connection == b"XYZ " and b"kTRC" in tags:
            curves = (tags[b"kTRC"],)
        writable = curves is not None or bool({b"B2A0", b"B2D0"} & tags.keys())
        if b"A2B0" in tags or (matrix is not None and abs(np.linalg.det(matrix)) < 1e-6):
            matrix = curves = None  # the tables are the better description, and they come first by the standard
        profile = Profile(
            _description(tags.get(b"desc", b"")), _text(space), _text(device), data, matrix, curves or (), writable
        )
        if profile.curves:
            profile.tables(2)
    except struct.error as error:
        raise ValueError("a truncated ICC profile") from error
    return profile


def _text(name: bytes) -> str:
    return name.decode("latin-1").strip()


def _description(tag: bytes) -> str:
    if tag[:4] == b"desc":
        (size,) = struct.unpack_from(">I", tag, 8)
        text = tag[12 : 12 + size].split(b"\0")[0].decode("latin-1")
    elif tag[:4] == b"mluc":
        size, start = struct.unpack_from(">II", tag, 20)
        text = tag[start : start + size].decode("utf-16-be", "replace")
    else:
        text = ""
    return shown(text.strip(), 60) or "a profile without a name"


def _curve(tag: bytes, steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """A curve at steps 0..1, clipped to 0..1."""
    if tag[:4] == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        if count == 0:
            return steps
        points = np.frombuffer(tag, ">u2", count=count, offset=12) if len(tag) >= 12 + 2 * count else None
        if points is None:
            raise ValueError("a truncated curve")
        if count == 1:
            return np.asarray(steps ** (int(points[0]) / 256))
        return np.interp(steps, np.linspace(0, 1, count), points / 65535)
    if tag[:4] != b"para":
        raise ValueError("a curve of an unknown type")
    (kind,) = struct.unpack_from(">8xH", tag)
    if kind >= len(_PARAMETERS):
        raise ValueError("a curve of an unknown function")
    values = [value / 65536 for value in struct.unpack_from(f">12x{_PARAMETERS[kind]}i", tag)]
    g, a, b, c, d, e, f = values + [1.0, 0.0, 0.0, 0.0, 0.0, 0.0][len(values) - 1 :]
    if kind in (1, 2):  # the same function, written with an offset c below −b/a too
        if a == 0:
            raise ValueError("a curve that divides by 0")
        c, d, e, f = 0.0, -b / a, c, c
    power = np.maximum(a * steps + b, 0) ** g + e
    return np.asarray(np.clip(power if kind == 0 else np.where(steps >= d, power, c * steps + f), 0, 1))


def encode(profile: Profile, linear: NDArray[np.float32]) -> NDArray[np.float32]:
    """Numbers 0..1 of linear light 0..1, (…, 3), by the profile's curves: exact to half a level of 16 bits."""
    tables = _inverse_tables(profile.curves)
    places = np.sqrt(linear) * (len(tables) - 2)
    below = places.astype(np.int32)
    places -= below
    out = np.empty_like(places)
    for channel in range(out.shape[-1]):
        table, index = tables[:, channel], below[..., channel]
        start = table[index]
        out[..., channel] = start + (table[index + 1] - start) * places[..., channel]
    return out


@functools.lru_cache(maxsize=4)
def _inverse_tables(curves: tuple[bytes, ...]) -> NDArray[np.float32]:
    """The inverse of each curve at even steps of the root of the light, where no curve is steep; one entry more."""
    tables = np.maximum.accumulate(Profile("", "", "", b"", None, curves).tables(2**16), axis=0)  # interp needs it
    steps = np.linspace(0, 1, len(tables))
    inverse = [np.interp(steps**2, channel, steps) for channel in tables.T]
    return np.stack([np.append(channel, channel[-1]) for channel in inverse], axis=1).astype(np.float32)


def matrix_profile(name: str, matrix: Matrix, gamma: float | None = None) -> bytes:
    """An ICC profile of version 4 with these colorants and a gamma; None: sRGB's curve."""
    parameters, kind = (_SRGB_CURVE, 3) if gamma is None else ((gamma,), 0)
    curve = b"para" + bytes(4) + struct.pack(">HH", kind, 0) + _fixed(*parameters)
    tags = {b"desc": _localised(name), b"cprt": _localised("No copyright, use freely"), b"wtpt": _xyz(D50)}
    tags |= {tag: _xyz(matrix[:, index]) for index, tag in enumerate(_COLORANTS)} | dict.fromkeys(_CURVES, curve)
    blocks: dict[bytes, int] = {}  # tags with the same content share it
    data, end = b"", 132 + _TAG.size * len(tags)
    for content in tags.values():
        if content not in blocks:
            blocks[content] = end + len(data)
            data += content.ljust(-(-len(content) // 4) * 4, b"\0")
    table = b"".join(_TAG.pack(tag, blocks[content], len(content)) for tag, content in tags.items())
    created = struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    size = end + len(data)
    head = _HEADER.pack(size, b"\0" * 4, 0x04300000, b"mntr", b"RGB ", b"XYZ ", created, b"acsp")
    head = head.ljust(68, b"\0") + _fixed(*D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(values: NDArray[np.float64]) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(*values)


def _localised(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return b"mluc" + bytes(4) + struct.pack(">II4sII", 1, 12, b"enUS", len(encoded), 28) + encoded


@functools.cache
def builtin_profile(name: str) -> Profile:
    """The profiles that the config names: srgb, display-p3 and adobe-rgb."""
    if name == "adobe-rgb":
        return parse(matrix_profile("Adobe RGB (1998) compatible", space_matrix("adobe-rgb"), 563 / 256))
    data = bytes(pyvips.Operation.call("profile_load", {"srgb": "srgb", "display-p3": "p3"}[name]))
    return parse(data)


@functools.cache
def space_profile(name: SpaceName) -> Profile:
    """The profile of a canvas: the primaries of its space, and sRGB's curve."""
    return (
        builtin_profile("srgb") if name == "srgb" else parse(matrix_profile(f"{name}, sRGB curve", space_matrix(name)))
    )
