"""Reading and writing directories of TIFF tags: those of a TIFF, and the same structure inside EXIF.

A directory is untrusted: counts and sizes are bounded, and offsets only ever read less than they ask for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ReadAt = Callable[[int, int], bytes]  # (offset, count) to at most count bytes

ASCII, UNDEFINED = 2, 7
GPS_POINTER = 34853
_LONG, _LONG8 = 4, 16
# Field type to struct's letters of one value.
_TYPES = {1: "B", ASCII: "B", 3: "H", _LONG: "I", 5: "II", 6: "b", UNDEFINED: "B", 8: "h", 9: "i", 10: "ii"}
_TYPES |= {11: "f", 12: "d", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_INTEGERS = (1, 3, _LONG, _LONG8)
_MAX_ENTRIES = 4096
# Longer values are pixels' offsets or thumbnails, which nothing here reads.
_MAX_VALUE_BYTES = 2**20
# Of a GPS directory: the standard has 32 tags of a few numbers or words, and EXIF in a JPEG ends at 64 KiB.
_MAX_GPS_TAGS, _MAX_GPS_BYTES = 32, 256


@dataclass(frozen=True)
class Tag:
    """One field of a directory; `data`: its values, little-endian."""

    number: int
    kind: int
    data: bytes

    @property
    def count(self) -> int:
        """The number of values."""
        return len(self.data) // struct.calcsize("<" + _TYPES[self.kind])

    @property
    def integers(self) -> tuple[int, ...]:
        """The values; none of a tag of another kind."""
        return struct.unpack(f"<{self.count}{_TYPES[self.kind]}", self.data) if self.kind in _INTEGERS else ()

    def packed(self, order: str) -> bytes:
        """The values in a byte order, "<" or ">"."""
        return _reordered(self.kind, self.data, "<", order)


def text_tag(number: int, text: str) -> Tag:
    """A tag of text, in UTF-8, which all readers of today expect under the name ASCII."""
    return Tag(number, ASCII, text.encode() + b"\0")


@dataclass(frozen=True)
class Form:
    """The sizes and byte order of a file: classic TIFF, or BigTIFF."""

    order: str
    big: bool

    @property
    def offset(self) -> str:
        """Struct's letter of an offset."""
        return self.order + ("Q" if self.big else "I")

    @property
    def count(self) -> str:
        """Struct's letter of the number of entries."""
        return self.order + ("Q" if self.big else "H")

    @property
    def head(self) -> str:
        """Number, kind and count of an entry; the value, or its offset, follows."""
        return self.order + ("HHQ" if self.big else "HHI")

    @property
    def value_bytes(self) -> int:
        """The bytes of a value, or its offset, in an entry."""
        return 8 if self.big else 4

    @property
    def pointer_at(self) -> int:
        """Where the header has the offset of the first directory."""
        return 8 if self.big else 4


_CLASSIC = Form("<", False)


def _form_of(read_at: ReadAt) -> Form:
    head = read_at(0, 4)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 4:
        raise ValueError("no TIFF header")
    return Form(order, struct.unpack(order + "H", head[2:])[0] == 43)


def _first_offset(read_at: ReadAt, form: Form) -> int:
    return _unpack(form.offset, read_at(form.pointer_at, form.value_bytes))


def read_first_directory(read_at: ReadAt) -> dict[int, Tag]:
    """The tags of the first directory, without the values that are too long. Raises ValueError for a damaged one."""
    form = _form_of(read_at)
    return _read_directory(read_at, form, _first_offset(read_at, form))


def read_gps(read_at: ReadAt, first: Mapping[int, Tag]) -> tuple[Tag, ...]:
    """The tags of the GPS directory, if there is one. Raises ValueError for a damaged one."""
    if GPS_POINTER not in first:
        return ()
    pointer = first[GPS_POINTER]
    offset = int.from_bytes(pointer.data[: 8 if pointer.kind > 13 else 4], "little")
    tags = _read_directory(read_at, _form_of(read_at), offset).values()
    return tuple(tag for tag in tags if len(tag.data) <= _MAX_GPS_BYTES)[:_MAX_GPS_TAGS]


def _read_directory(read_at: ReadAt, form: Form, offset: int) -> dict[int, Tag]:
    tags = {}
    for entry in _entries(read_at, form, offset)[0]:
        number, kind, count = struct.unpack(form.head, entry[: -form.value_bytes])
        value, size = entry[-form.value_bytes :], count * struct.calcsize("<" + _TYPES.get(kind, "B"))
        if kind not in _TYPES or not 0 < size <= _MAX_VALUE_BYTES:
            continue
        data = value[:size] if size <= form.value_bytes else read_at(_unpack(form.offset, value), size)
        if len(data) == size:
            tags[number] = Tag(number, kind, _reordered(kind, data, form.order, "<"))
    return tags


def _entries(read_at: ReadAt, form: Form, offset: int) -> tuple[list[bytes], bytes]:
    """The raw entries of a directory, and the offset of the next one, as they are in the file."""
    count_bytes, entry_bytes = struct.calcsize(form.count), struct.calcsize(form.head) + form.value_bytes
    count = _unpack(form.count, read_at(offset, count_bytes))
    if count > _MAX_ENTRIES:
        raise ValueError(f"the directory has {count} entries")
    data = read_at(offset + count_bytes, count * entry_bytes + form.value_bytes)
    if len(data) < count * entry_bytes:
        raise ValueError("the directory is truncated")
    entries = [data[start : start + entry_bytes] for start in range(0, count * entry_bytes, entry_bytes)]
    return entries, data[count * entry_bytes :]


def _unpack(form: str, data: bytes) -> int:
    try:
        return int(struct.unpack(form, data)[0])
    except struct.error as error:
        raise ValueError("the directory is truncated") from error


def _reordered(kind: int, data: bytes, before: str, after: str) -> bytes:
    letters = _TYPES[kind]
    if before == after or struct.calcsize("<" + letters) == 1:
        return data
    letters *= len(data) // struct.calcsize("<" + letters)
    return struct.pack(after + letters, *struct.unpack(before + letters, data))


def exif_block(tags: Sequence[Tag], gps: Sequence[Tag]) -> bytes:
    """EXIF with these tags, as an APP1 segment of a JPEG begins."""
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + _directory(_CLASSIC, 8, [], tags, gps, bytes(4))


def add_tags(path: Path, tags: Sequence[Tag], gps: Sequence[Tag]) -> None:
    """Add tags to the first directory of a complete TIFF, in place of those that it has of the same numbers.

    libvips writes few. The old directory stays in the file, unused: a new one is appended, and the header refers to it.
    """
    with path.open("rb+") as file:

        def read_at(offset: int, count: int) -> bytes:
            file.seek(offset)
            return file.read(count)

        form = _form_of(read_at)
        entries, following = _entries(read_at, form, _first_offset(read_at, form))
        end = -(-file.seek(0, 2) // 16) * 16
        file.seek(end)
        file.write(_directory(form, end, entries, tags, gps, following))
        file.seek(form.pointer_at)
        file.write(struct.pack(form.offset, end))


def _directory(
    form: Form, start: int, entries: Sequence[bytes], tags: Sequence[Tag], gps: Sequence[Tag], following: bytes
) -> bytes:
    """A directory at the offset `start`: `entries` as they are in the file, `tags`, and the GPS directory of `gps`.

    `following`: the offset of the next directory. The values come after it.
    """
    added = {tag.number: tag for tag in tags}
    if gps:
        added[GPS_POINTER] = Tag(GPS_POINTER, _LONG, bytes(4))  # the offset follows below
    kept = {struct.unpack(form.order + "H", entry[:2])[0]: entry for entry in entries}
    numbers = sorted(kept.keys() | added.keys())
    entry_bytes = struct.calcsize(form.head) + form.value_bytes
    values_at = start + struct.calcsize(form.count) + len(numbers) * entry_bytes + form.value_bytes
    lines: list[bytes] = []
    values = b""
    for number in numbers:
        if (tag := added.get(number)) is None:
            lines.append(kept[number])
            continue
        if number == GPS_POINTER:
            at = values_at + len(values)
            # as 64 bits only where they are needed: many readers know 32 alone
            tag = Tag(number, _LONG8 if at >> 32 else _LONG, at.to_bytes(8 if at >> 32 else 4, "little"))
            inner = _directory(form, at, [], gps, (), bytes(form.value_bytes))
            values += inner + bytes(-len(inner) % 2)
        packed = tag.packed(form.order)
        if len(packed) > form.value_bytes:
            offset, values = values_at + len(values), values + packed + bytes(-len(packed) % 2)
            packed = struct.pack(form.offset, offset)
        lines.append(struct.pack(form.head, number, tag.kind, tag.count) + packed.ljust(form.value_bytes, b"\0"))
    return struct.pack(form.count, len(numbers)) + b"".join(lines) + following + values
