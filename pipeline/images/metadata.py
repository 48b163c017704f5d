"""Metadata: what a content says about itself besides its pixels, and what an output says.

    XMP, IPTC, EXIF, tags of a TIFF, texts of a PNG ──► ImageMetadata ──► the same in the output, with provenance

Texts are merged by XMP property; where the blocks of a file disagree, XMP counts before IPTC, and IPTC before EXIF.
Nothing that is written depends on the time, so that two exports of one canvas have the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyvips

from pipeline.images.header import open_file, open_image
from pipeline.images.iptc import decoded, iptc_records, photoshop_block, read_iptc
from pipeline.images.tiff_tags import ASCII, UNDEFINED, Tag, exif_block, read_first_directory, read_gps, text_tag
from pipeline.images.xmp import Property, new_property, read_xmp, texts_of, xmp_packet

# The tags of text, in a TIFF and in EXIF, by XMP property; those from 0x9C9B on are of Windows, in UTF-16.
_TEXT_TAGS = {"dc:description": 270, "dc:creator": 315, "dc:rights": 33432}
_WINDOWS_TAGS = {"dc:title": 0x9C9B, "dc:description": 0x9C9C, "dc:creator": 0x9C9D, "dc:subject": 0x9C9E}
_PNG_TEXTS = {"Author": "dc:creator", "Copyright": "dc:rights", "Description": "dc:description", "Title": "dc:title"}
_SOFTWARE, _XMP, _IPTC, _IPTC_FIELD = 305, 700, 33723, "iptc-data"
# Lists of these are written with semicolons where a format has one text only.
_LISTS = ("dc:creator", "dc:subject")
# An APP1 segment of a JPEG holds 65,502 bytes of XMP.
_MAX_PACKET_BYTES = 60_000
_MAX_TEXT_BYTES = 8_000
# Descriptions that programs write for themselves: OME-XML, tifffile's and ImageJ's.
_MACHINE_MADE = ("<?xml", "<OME", "{", "ImageJ=")


@dataclass(frozen=True)
class ImageMetadata:
    """The XMP properties of an image by name, the tags of its GPS directory, and the program that made it."""

    properties: Mapping[str, Property]
    gps: tuple[Tag, ...] = ()
    software: str = ""

    def texts(self) -> dict[str, tuple[str, ...]]:
        """The texts of all properties that have any, by name."""
        return {name: texts for name, node in self.properties.items() if (texts := texts_of(node))}

    def as_attributes(self) -> dict[str, Any]:
        """The texts as attributes of a Zarr group, which has no place of its own for them."""
        return {"xmp": {name: list(texts) for name, texts in self.texts().items()}}

    def with_provenance(self, software: str, provenance: Mapping[str, str]) -> ImageMetadata:
        """With the program, and these facts about the run as properties of our own."""
        facts = {"xmp:CreatorTool": software} | {f"pipeline:{name}": value for name, value in provenance.items()}
        added = {name: new_property(name, [value]) for name, value in facts.items()}
        return ImageMetadata({**self.properties, **added}, self.gps, software)


def read_metadata(path: Path, gps: bool) -> ImageMetadata:
    """The metadata of an image that an output keeps; `gps`: also where it was taken.

    Unreadable blocks count as missing. Raises InputError, StorageError as open_image does.
    """
    file = open_file(path)
    image = open_image(file, "sequential")
    properties = read_xmp(_blob(image, "xmp-data"), gps)
    exif = _blob(image, "exif-data").removeprefix(b"Exif\0\0")  # a PNG has none
    sources: list[Mapping[str, Sequence[str]]] = [read_iptc(_blob(image, _IPTC_FIELD))]
    places: tuple[Tag, ...] = ()
    for read_at in (lambda offset, count: exif[offset : offset + count], file.read_at):  # a TIFF has the tags itself
        try:
            tags = read_first_directory(read_at)
            places = places or (read_gps(read_at, tags) if gps else ())
        except ValueError:
            continue
        sources.append(dict(_texts_of_tags(tags)))
    sources.append(dict(_texts_of_png(image)))
    for values in sources:
        for name, texts in values.items():
            if name not in properties and any(text.strip() for text in texts):
                properties[name] = new_property(name, [text.strip() for text in texts if text.strip()])
    return ImageMetadata(_within(properties), places)


def _blob(image: Any, field: str) -> bytes:
    return bytes(image.get(field)) if image.get_typeof(field) == pyvips.GValue.blob_type else b""


def _texts_of_tags(tags: Mapping[int, Tag]) -> Iterator[tuple[str, Sequence[str]]]:
    for name, number in _WINDOWS_TAGS.items():
        if number in tags:
            text = tags[number].data.decode("utf-16-le", "replace").strip("\0 ")
            yield name, text.split(";") if name in _LISTS else [text]
    for name, number in _TEXT_TAGS.items():
        if number in tags and tags[number].kind in (ASCII, UNDEFINED):
            text = decoded(tags[number].data.rstrip(b"\0").replace(b"\0", b"; "))  # a copyright may have two parts
            if not (name == "dc:description" and text.lstrip().startswith(_MACHINE_MADE)):
                yield name, text.split("; ") if name == "dc:creator" else [text]


def _texts_of_png(image: Any) -> Iterator[tuple[str, Sequence[str]]]:
    for field in image.get_fields():
        if field.startswith("png-comment-") and (name := _PNG_TEXTS.get(field.split("-", 3)[3])):
            yield name, [str(image.get(field))]


def _within(properties: Mapping[str, Property]) -> dict[str, Property]:
    """The properties that are short enough for every format: the longest are left out first."""
    sizes = {name: len(xmp_packet([node])) for name, node in properties.items()}
    kept = dict(properties)
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if len(xmp_packet(kept.values())) <= _MAX_PACKET_BYTES:
            break
        texts = texts_of(kept[name])
        if name in _TEXT_TAGS and texts:  # who made it and who owns it is cut, never lost
            kept[name] = new_property(name, [texts[0][: _MAX_TEXT_BYTES // 4]])
        else:
            del kept[name]
    return kept


def tags_of(metadata: ImageMetadata) -> list[Tag]:
    """The tags of a TIFF or of EXIF that say who made the image, and with what."""
    texts = metadata.texts()
    values = {number: "; ".join(texts[name]) for name, number in _TEXT_TAGS.items() if name in texts}
    cut = {number: text.encode()[:_MAX_TEXT_BYTES].decode(errors="ignore") for number, text in values.items()}
    if metadata.software:
        cut[_SOFTWARE] = metadata.software
    return [text_tag(number, text) for number, text in sorted(cut.items())]


def tiff_tags(metadata: ImageMetadata) -> list[Tag]:
    """The same for a TIFF, with XMP and IPTC, which have tags of their own there."""
    packet, records = xmp_packet(metadata.properties.values()), iptc_records(metadata.texts(), metadata.software)
    return [*tags_of(metadata), Tag(_XMP, 1, packet), Tag(_IPTC, UNDEFINED, records)]


def attach(image: Any, metadata: ImageMetadata) -> None:
    """Set the metadata on a libvips image, for its savers of JPEG and PNG."""
    _set_blob(image, "xmp-data", xmp_packet(metadata.properties.values()))
    _set_blob(image, _IPTC_FIELD, photoshop_block(iptc_records(metadata.texts(), metadata.software)))
    attach_exif(image, metadata)


def attach_exif(image: Any, metadata: ImageMetadata) -> None:
    """Set EXIF on a libvips image.

    libvips' savers make EXIF from fields of an image, as text in ASCII, unless a field is as it was read from a block:
    so a JPEG of one pixel is read that has the block.
    """
    block = exif_block(tags_of(metadata), metadata.gps)
    jpeg = bytes(pyvips.Image.black(1, 1).jpegsave_buffer(keep="none"))
    segment = b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block
    carrier = pyvips.Image.jpegload_buffer(jpeg[:2] + segment + jpeg[2:])
    for field in carrier.get_fields():
        if field.startswith("exif-") and "Resolution" not in field:  # the image's own
            image.set_type(carrier.get_typeof(field), field, carrier.get(field))


def _set_blob(image: Any, field: str, data: bytes) -> None:
    image.set_type(pyvips.GValue.blob_type, field, data)
