"""Colour arithmetic in plain numpy, apart from the program's own, and files with colours that libvips cannot write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyvips

D50 = np.array([0.9642, 1.0, 0.8249])
# Linear RGB to XYZ relative to D50, columns red, green, blue: the published matrices.
SRGB_XYZ = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
ADOBE_XYZ = np.array(
    [[0.6097559, 0.2052401, 0.1492240], [0.3111242, 0.6256560, 0.0632197], [0.0194811, 0.0608902, 0.7448387]]
)
P3_XYZ = np.array(
    [[0.5151187, 0.2919778, 0.1571035], [0.2411892, 0.6922441, 0.0665668], [-0.0010505, 0.0418791, 0.7840713]]
)
PROPHOTO_XYZ = np.array([[0.7976749, 0.1351917, 0.0313534], [0.2880402, 0.7118741, 0.0000857], [0.0, 0.0, 0.8249000]])
WIDE = {"adobe": (ADOBE_XYZ, 563 / 256), "prophoto": (PROPHOTO_XYZ, 461 / 256), "p3": (P3_XYZ, None)}


def decoded(values: np.ndarray, gamma: float | None) -> np.ndarray:
    """Linear light of numbers 0..1; None: sRGB's curve."""
    if gamma is not None:
        return values**gamma
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encoded(light: np.ndarray) -> np.ndarray:
    """Numbers 0..1 with sRGB's curve, clipped."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def in_srgb(values: np.ndarray, matrix: np.ndarray, gamma: float | None) -> np.ndarray:
    """Numbers 0..1 of sRGB, of numbers 0..1 of another space."""
    return encoded(decoded(values, gamma) @ (np.linalg.inv(SRGB_XYZ) @ matrix).T)


def lab(values: np.ndarray, matrix: np.ndarray, gamma: float | None) -> np.ndarray:
    ratio = decoded(values, gamma) @ matrix.T / D50
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def profile(matrix: np.ndarray, gamma: float | None, space: bytes = b"RGB ") -> bytes:
    """A profile of version 2 that is a matrix and a curve, or for b"GRAY" one curve; None: sRGB's, as a table."""
    if gamma is None:
        table = np.round(decoded(np.linspace(0, 1, 4096), None) * 65535).astype(">u2").tobytes()
        curve = b"curv" + bytes(4) + struct.pack(">I", 4096) + table
    else:
        curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = [(b"wtpt", _xyz(D50))]
    if space == b"GRAY":
        tags += [(b"kTRC", curve)]
    else:
        tags += [(tag, _xyz(matrix[:, i])) for i, tag in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))]
        tags += [(tag, curve) for tag in (b"rTRC", b"gTRC", b"bTRC")]
    start, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags:
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"test", 0x02400000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + _xyz(D50)[8:]
    return head.ljust(128, b"\0") + table + data


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def write_tagged(path: Path, pixels: np.ndarray, icc: bytes | None) -> None:
    interpretation = {1: ("b-w", "grey16"), 4: ("cmyk", "cmyk")}.get(pixels.shape[2], ("srgb", "rgb16"))
    image = pyvips.Image.new_from_array(pixels, interpretation=interpretation[pixels.itemsize - 1]).copy()
    if icc is not None:
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", icc)
    image.write_to_file(str(path))


def write_tiff(path: Path, pixels: np.ndarray, photometric: int, extra: Sequence[int] | None = None) -> None:
    """An uncompressed TIFF of one strip, with any photometric interpretation and any extra samples."""
    height, width, samples = pixels.shape
    data = pixels.astype(f"<u{pixels.itemsize}").tobytes()
    fields: list[tuple[int, int, Sequence[int]]] = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [8 * pixels.itemsize] * samples),
        (259, 3, [1]),
        (262, 3, [photometric]),
        (273, 4, [0]),  # filled in below
        (277, 3, [samples]),
        (278, 4, [height]),
        (279, 4, [len(data)]),
        (284, 3, [1]),
        *([(338, 3, extra)] if extra is not None else []),
    ]
    packed = [(tag, kind, struct.pack(f"<{len(v)}{'H' if kind == 3 else 'I'}", *v)) for tag, kind, v in fields]
    directory_end = 8 + 2 + 12 * len(fields) + 4
    blocks, entries = b"", b""
    pixels_at = directory_end + sum(len(value) for _, _, value in packed if len(value) > 4)
    for (tag, kind, value), (_, _, values) in zip(packed, fields, strict=True):
        stored = struct.pack("<I", pixels_at) if tag == 273 else value
        if len(stored) > 4:
            stored, blocks = struct.pack("<I", directory_end + len(blocks)), blocks + stored
        entries += struct.pack("<HHI", tag, kind, len(values)) + stored.ljust(4, b"\0")
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4) + blocks + data)


def write_png(path: Path, pixels: np.ndarray, **chunks: bytes) -> None:
    """A PNG of 8 bits a channel, grey or RGB, with chunks before the pixels."""
    height, width, samples = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[samples], 0, 0, 0)
    parts = [(b"IHDR", head), *((name.encode(), data) for name, data in chunks.items())]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def chromaticities(*values: float) -> bytes:
    """A cHRM chunk: x and y of white, red, green, blue."""
    return struct.pack(">8I", *(round(value * 100_000) for value in values))


def delta_e(a: np.ndarray, b: np.ndarray) -> Any:
    """The CIE 1976 difference of Lab colours."""
    return np.sqrt(((a - b) ** 2).sum(-1))
