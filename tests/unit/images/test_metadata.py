"""Metadata: who made a picture and who owns it must not be lost, and where it was taken must not be told unasked."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips

from pipeline.core.image_formats import PixelKind
from pipeline.images.metadata import ImageMetadata, read_metadata
from pipeline.images.tiff_tags import add_tags, read_first_directory, text_tag
from pipeline.images.writer import ImageSpec, write_image
from pipeline.images.xmp import new_property, read_xmp

XMP = """<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
 xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"
 xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:exif="http://ns.adobe.com/exif/1.0/"
 photoshop:Headline="Häfen" crs:Exposure2012="+1" tiff:Orientation="6" exif:GPSLatitude="43,28.0N">
 <dc:subject><rdf:Bag><rdf:li>boat</rdf:li><rdf:li>Möwe</rdf:li></rdf:Bag></dc:subject>
 <xmp:Thumbnails>AAAA</xmp:Thumbnails></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>""".encode()


def exif(order: str = ">") -> bytes:
    """EXIF with an artist, a copyright and an orientation, and the GPS directory of 43° 28' N; built by hand."""
    artist, rights = "Åsa\0".encode(), "© Åsa (2024)\0".encode()
    gps_at, values_at = 8 + 2 + 4 * 12 + 4, 8 + 2 + 4 * 12 + 4 + 2 + 2 * 12 + 4
    mark = {"<": b"II", ">": b"MM"}[order]

    def entry(tag: int, kind: int, count: int, value: Any) -> bytes:
        packed = value if isinstance(value, bytes) else struct.pack(order + "I", value)
        return struct.pack(order + "HHI", tag, kind, count) + packed

    first = struct.pack(order + "H", 4)
    first += entry(274, 3, 1, struct.pack(order + "HH", 6, 0)) + entry(315, 2, len(artist), values_at)
    first += entry(33432, 2, len(rights), values_at + len(artist)) + entry(34853, 4, 1, gps_at) + bytes(4)
    places = struct.pack(order + "H", 2) + entry(1, 2, 2, b"N\0\0\0")
    places += entry(2, 5, 3, values_at + len(artist) + len(rights)) + bytes(4)
    latitude = struct.pack(order + "6I", 43, 1, 28, 1, 176, 100)
    return b"Exif\0\0" + mark + struct.pack(order + "HI", 42, 8) + first + places + artist + rights + latitude


def content(path: Path, **fields: bytes) -> Path:
    """A JPEG with these blocks of metadata, byte for byte."""
    jpeg = bytes(pyvips.Image.black(8, 8, bands=3).copy(interpretation="srgb").jpegsave_buffer(keep="none"))
    blocks = {
        "exif": (b"\xff\xe1", b""),
        "xmp": (b"\xff\xe1", b"http://ns.adobe.com/xap/1.0/\0"),
        "iptc": (b"\xff\xed", b""),
    }
    segments = b""
    for name, data in fields.items():
        marker, head = blocks[name]
        segments += marker + struct.pack(">H", len(head + data) + 2) + head + data
    path.write_bytes(jpeg[:2] + segments + jpeg[2:])
    return path


def iptc(**records: bytes) -> bytes:
    """A Photoshop block with records of IPTC: `n25=b"word"`."""
    data = b"".join(b"\x1c\x02" + struct.pack(">BH", int(n[1:]), len(text)) + text for n, text in records.items())
    return b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(data)) + data


@pytest.mark.parametrize("order", "<>")
def test_every_block_of_a_content_is_read(tmp_path: Path, order: str) -> None:
    """Cameras write EXIF, agencies IPTC, and photo editors XMP: a name in any of them is the artist's."""
    blocks = {"exif": exif(order), "xmp": XMP, "iptc": iptc(n25=b"alt", n110="Agentür".encode("cp1252"))}
    texts = read_metadata(content(tmp_path / "a.jpg", **blocks), gps=False).texts()
    assert texts["dc:creator"] == ("Åsa",) and texts["dc:rights"] == ("© Åsa (2024)",)
    assert texts["photoshop:Headline"] == ("Häfen",) and texts["photoshop:Credit"] == ("Agentür",)
    assert texts["dc:subject"] == ("boat", "Möwe")  # of XMP, not IPTC's older list
    assert not any("Exposure" in name or "Orientation" in name or "Thumb" in name for name in texts)


def test_a_tiff_and_a_png_are_read_too(tmp_path: Path) -> None:
    """A TIFF has the artist in a tag, and a PNG in a text: neither is EXIF."""
    pyvips.Image.black(8, 8, bands=3).copy(interpretation="srgb").tiffsave(str(tmp_path / "a.tif"))
    add_tags(tmp_path / "a.tif", [text_tag(315, "Åsa; Bo"), text_tag(270, '{"shape": [8, 8]}')], ())
    assert read_metadata(tmp_path / "a.tif", gps=False).texts() == {"dc:creator": ("Åsa", "Bo")}
    image = pyvips.Image.black(8, 8, bands=3).copy(interpretation="srgb")
    image.set_type(pyvips.GValue.gstr_type, "png-comment-0-Copyright", "mine")
    image.pngsave(str(tmp_path / "a.png"))
    assert read_metadata(tmp_path / "a.png", gps=False).texts() == {"dc:rights": ("mine",)}


def test_damaged_and_hostile_blocks_count_as_missing(tmp_path: Path) -> None:
    """A photo with a broken EXIF block is still a photo; a document type could expand to gigabytes."""
    bomb = XMP.replace(b"<x:xmpmeta", b'<!DOCTYPE x [<!ENTITY a "aaaa">]><x:xmpmeta', 1)
    for blocks in ({"exif": exif()[:40]}, {"xmp": XMP[:-60]}, {"xmp": bomb}, {"iptc": iptc(n25=b"x")[:-2] + b"\xff"}):
        assert "dc:creator" not in read_metadata(content(tmp_path / "a.jpg", **blocks), gps=True).texts()
    assert read_xmp(b"<a" + b"<b>" * 100_000, gps=True) == {}


def written(path: Path, metadata: ImageMetadata | None) -> Path:
    rows = np.full((40, 60, 3), 90, np.uint8)
    spec = ImageSpec(path, 60, 40, PixelKind(), metadata=metadata)
    write_image(spec, lambda y0, y1: rows[y0:y1])
    return path


@pytest.mark.parametrize("suffix", [".tif", ".png", ".jpg"])
def test_outputs_keep_it_and_read_back_the_same(tmp_path: Path, suffix: str) -> None:
    """Copyright and artist are what an artist sues with; the provenance says how to make the picture again."""
    source = content(tmp_path / "a.jpg", exif=exif(), xmp=XMP)
    metadata = read_metadata(source, gps=False).with_provenance("pipeline 9", {"Seed": "7"})
    path = written(tmp_path / f"o{suffix}", metadata)
    kept = read_metadata(path, gps=True)
    assert kept.texts() == read_metadata(source, gps=False).texts() and kept.gps == ()
    data = path.read_bytes()
    packet = data if suffix == ".tif" else bytes(pyvips.Image.new_from_file(str(path)).get("xmp-data"))
    assert b"pipeline 9" in data and b"<pipeline:Seed>7</pipeline:Seed>" in packet
    assert data == written(tmp_path / f"again{suffix}", metadata).read_bytes()
    assert np.array_equal(pyvips.Image.new_from_file(str(path)).numpy()[0, 0], [90, 90, 90])
    if suffix == ".tif":
        tags = read_first_directory(lambda offset, count: data[offset : offset + count])
        assert (tags[315].data, tags[33432].data) == ("Åsa\0".encode(), "© Åsa (2024)\0".encode())
    else:  # as libexif, an independent reader, sees it
        assert pyvips.Image.new_from_file(str(path)).get("exif-ifd0-Artist").startswith("Åsa (")


@pytest.mark.parametrize("suffix", [".tif", ".png", ".jpg"])
def test_a_place_is_told_only_on_request(tmp_path: Path, suffix: str) -> None:
    """The place of a photo is often the artist's home."""
    source = content(tmp_path / "a.jpg", exif=exif(), xmp=XMP)
    told = read_metadata(written(tmp_path / f"gps{suffix}", read_metadata(source, gps=True)), gps=True)
    assert [tag.number for tag in told.gps] == [1, 2]
    assert struct.unpack("<6I", told.gps[1].data) == (43, 1, 28, 1, 176, 100)
    assert told.texts()["exif:GPSLatitude"] == ("43,28.0N",)
    silent = written(tmp_path / f"keep{suffix}", read_metadata(source, gps=False)).read_bytes()
    assert b"GPS" not in silent and struct.pack("<6I", 43, 1, 28, 1, 176, 100) not in silent


@pytest.mark.parametrize("suffix", [".tif", ".png", ".jpg"])
def test_none_writes_nothing(tmp_path: Path, suffix: str) -> None:
    """Whoever asks for no metadata does not want the program's name either."""
    data = written(tmp_path / f"o{suffix}", None).read_bytes()
    assert not any(word in data for word in (b"pipeline", b"xmpmeta", b"Exif", b"eXIf"))


def test_a_long_text_fits_and_does_not_push_out_the_artist(tmp_path: Path) -> None:
    """A segment of a JPEG ends at 64 KiB: a novel as caption would make the export fail at the end of a run."""
    texts = {"dc:description": ["wort " * 100_000], "dc:creator": ["Åsa"], "photoshop:Headline": ["h" * 90_000]}
    source = tmp_path / "a.png"
    image = pyvips.Image.black(8, 8, bands=3).copy(interpretation="srgb")
    image.set_type(pyvips.GValue.gstr_type, "png-comment-0-Author", "Åsa")
    image.set_type(pyvips.GValue.gstr_type, "png-comment-1-Description", texts["dc:description"][0])
    image.pngsave(str(source))
    kept = read_metadata(written(tmp_path / "o.jpg", read_metadata(source, gps=False)), gps=False).texts()
    assert kept["dc:creator"] == ("Åsa",) and kept["dc:description"][0].startswith("wort wort")


@pytest.mark.parametrize("big", [False, True])
def test_tags_are_added_and_all_pages_stay(tmp_path: Path, big: bool) -> None:
    """The tags are patched into a finished file: its pixels and smaller levels must be where they were."""
    path = tmp_path / "a.tif"
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    image = pyvips.Image.new_from_array(pixels, interpretation="srgb")
    image.tiffsave(str(path), bigtiff=big, pyramid=True, tile=True, tile_width=64, tile_height=64)
    before = [pyvips.Image.new_from_file(str(path), page=page).numpy() for page in range(3)]
    add_tags(path, [text_tag(305, "x" * 1000), text_tag(315, "ab")], ())
    add_tags(path, [text_tag(315, "cd")], ())
    data = path.read_bytes()
    tags = read_first_directory(lambda offset, count: data[offset : offset + count])
    assert (tags[315].data, len(tags[305].data)) == (b"cd\0", 1001)
    for page, pixels in enumerate(before):
        assert np.array_equal(pyvips.Image.new_from_file(str(path), page=page).numpy(), pixels)


def test_control_characters_of_a_name_do_not_break_the_packet() -> None:
    """XML cannot hold them, and no reader would open the rest."""
    from pipeline.images.xmp import texts_of, xmp_packet

    node = new_property("dc:creator", ["A\x00\x07 & <B>"])
    assert texts_of(read_xmp(xmp_packet([node]), gps=False)["dc:creator"]) == ("A & <B>",)
