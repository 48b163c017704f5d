"""The IPTC fields (IIM, of 1991) that older programs of agencies and print shops still read, instead of XMP."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

# Number in record 2, by XMP property, and the most bytes that the standard allows.
_FIELDS = {
    "dc:title": (5, 64),
    "dc:subject": (25, 64),
    "dc:creator": (80, 32),
    "photoshop:Headline": (105, 256),
    "photoshop:Credit": (110, 32),
    "photoshop:Source": (115, 32),
    "dc:rights": (116, 128),
    "dc:description": (120, 2000),
}
_BY_NUMBER = {number: name for name, (number, _) in _FIELDS.items()}
_UTF8 = b"\x1c\x01\x5a\x00\x03\x1b%G"  # 1:90, the character set
_PHOTOSHOP, _RESOURCE = b"Photoshop 3.0\0", b"8BIM\x04\x04\0\0"
_PROGRAM = 65


def read_iptc(block: bytes) -> dict[str, tuple[str, ...]]:
    """The values by XMP property, from records, with or without Photoshop's wrapper. Damaged rests are ignored."""
    if (start := block.find(_RESOURCE)) >= 0:
        block = block[start + len(_RESOURCE) + 4 :]
    encoding = "utf-8" if _UTF8 in block[:200] else None
    values: dict[str, tuple[str, ...]] = {}
    at = max(0, block.find(b"\x1c"))
    while block[at : at + 1] == b"\x1c" and len(block) >= at + 5:
        record, number, size = struct.unpack(">BBH", block[at + 1 : at + 5])
        if size > 0x7FFF:  # an extended size, of values that are no text
            break
        if record == 2 and (name := _BY_NUMBER.get(number)):
            values[name] = (*values.get(name, ()), decoded(block[at + 5 : at + 5 + size], encoding))
        at += 5 + size
    return values


def decoded(data: bytes, encoding: str | None = None) -> str:
    """Text whose encoding is not said: UTF-8 if it is valid, else that of Windows."""
    try:
        return data.decode(encoding or "utf-8").strip("\0 ")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace").strip("\0 ")


def iptc_records(values: Mapping[str, Sequence[str]], program: str) -> bytes:
    """The records of these values by XMP property, in UTF-8, each cut to the length that the standard allows."""
    data = _UTF8 + _record(0, b"\0\4") + _record(_PROGRAM, _cut(program, 32))
    for name, (number, max_bytes) in _FIELDS.items():
        for value in values.get(name, ()):
            data += _record(number, _cut(value, max_bytes))
    return data


def photoshop_block(records: bytes) -> bytes:
    """The records in the wrapper that a JPEG has around them."""
    return _PHOTOSHOP + _RESOURCE + struct.pack(">I", len(records)) + records + bytes(len(records) % 2)


def _record(number: int, data: bytes) -> bytes:
    return b"\x1c\x02" + struct.pack(">BH", number, len(data)) + data


def _cut(text: str, max_bytes: int) -> bytes:
    return text.encode()[:max_bytes].decode(errors="ignore").encode()
