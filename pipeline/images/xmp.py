"""XMP: which properties of an image are kept, and how they are read and written.

A packet is untrusted XML: it is bounded, has no document type (and so no entities), and only known properties survive.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence

MAX_PACKET_BYTES = 2**20
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_META, _XML = "adobe:ns:meta/", "http://www.w3.org/XML/1998/namespace"
_NAMESPACES = {
    "rdf": _RDF,
    "x": _META,
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpRights": "http://ns.adobe.com/xap/1.0/rights/",
    "photoshop": "http://ns.adobe.com/photoshop/1.0/",
    "Iptc4xmpCore": "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/",
    "plus": "http://ns.useplus.org/ldf/xmp/1.0/",
    "lr": "http://ns.adobe.com/lightroom/1.0/",
    "cc": "http://creativecommons.org/ns#",
    "exif": "http://ns.adobe.com/exif/1.0/",
    "pipeline": "urn:pipeline:provenance/1.0/",
}
# Who made it, what it shows and who may use it. Not kept: what describes the file or its camera, its editing history,
# thumbnails, faces, and its place.
_KEPT = {
    "dc": {"creator", "rights", "description", "title", "subject", "publisher", "contributor", "language"},
    "photoshop": {
        *("Headline", "Credit", "Source", "Instructions", "AuthorsPosition", "CaptionWriter", "TransmissionReference"),
        *("City", "State", "Country", "DateCreated"),
    },
    "xmpRights": {"Marked", "Owner", "UsageTerms", "WebStatement", "Certificate"},
    "Iptc4xmpCore": {"CreatorContactInfo", "CountryCode", "Location", "AltTextAccessibility", "ExtDescrAccessibility"},
    "lr": {"hierarchicalSubject"},
    "cc": {"license", "attributionName", "attributionURL", "morePermissions"},
}
_CONTAINERS = {"dc:creator": "Seq", "dc:subject": "Bag"} | dict.fromkeys(
    ("dc:rights", "dc:description", "dc:title"), "Alt"
)

for _prefix, _uri in _NAMESPACES.items():
    ET.register_namespace(_prefix, _uri)

Property = ET.Element


def read_xmp(packet: bytes, gps: bool) -> dict[str, Property]:
    """The properties of a packet that are kept, by name, such as dc:creator; none if it cannot be read.

    `gps`: also the coordinates.
    """
    if len(packet) > MAX_PACKET_BYTES or b"<!DOCTYPE" in packet.replace(b"\0", b""):  # also in UTF-16
        return {}
    try:
        root = ET.fromstring(packet.strip(b"\0 \n\r\t"))
        described = [node for node in root.iter(f"{{{_RDF}}}Description") if node in _top_level(root)]
    except (ET.ParseError, ValueError, RecursionError):
        return {}
    properties: dict[str, Property] = {}
    for node in described:
        for name, value in node.attrib.items():  # a simple property may be an attribute
            if short := _kept_name(name, gps):
                properties[short] = new_property(short, [value])
        for child in node:
            if short := _kept_name(child.tag, gps):
                child.tail = None
                properties[short] = child
    return properties


def _top_level(root: ET.Element) -> list[ET.Element]:
    rdf = root if root.tag == f"{{{_RDF}}}RDF" else root.find(f"{{{_RDF}}}RDF")
    return [] if rdf is None else list(rdf)


def _kept_name(tag: str, gps: bool) -> str | None:
    """The name with its usual prefix, if the property is kept."""
    uri, _, local = tag.removeprefix("{").partition("}")
    prefix = next((prefix for prefix, known in _NAMESPACES.items() if known == uri), "")
    kept = local in _KEPT.get(prefix, ()) or prefix == "plus" or (gps and prefix == "exif" and local.startswith("GPS"))
    return f"{prefix}:{local}" if kept else None


def new_property(name: str, values: Sequence[str]) -> Property:
    """A property of texts, in the container that XMP demands for it."""
    node = ET.Element(_qualified(name))
    if (container := _CONTAINERS.get(name)) is None:
        node.text = _clean(", ".join(values))
        return node
    items = ET.SubElement(node, _qualified(f"rdf:{container}"))
    for value in values:
        item = ET.SubElement(items, _qualified("rdf:li"))
        if container == "Alt":
            item.set(f"{{{_XML}}}lang", "x-default")
        item.text = _clean(value)
    return node


def texts_of(node: Property) -> tuple[str, ...]:
    """The texts of a property: every item of a list, the first of several languages."""
    items = [item.text or "" for item in node.iter(f"{{{_RDF}}}li")]
    if node.find(f"{{{_RDF}}}Alt") is not None:
        items = items[:1]
    return tuple(text for text in (items or [node.text or ""]) if text.strip())


def _qualified(name: str) -> str:
    prefix, _, local = name.partition(":")
    return f"{{{_NAMESPACES[prefix]}}}{local}"


def _clean(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(char for char in text if char in "\t\n\r" or (char >= " " and char not in "\ufffe\uffff"))


def xmp_packet(properties: Iterable[Property]) -> bytes:
    """A packet of these properties."""
    meta = ET.Element(f"{{{_META}}}xmpmeta")
    description = ET.SubElement(ET.SubElement(meta, _qualified("rdf:RDF")), _qualified("rdf:Description"))
    description.set(_qualified("rdf:about"), "")
    description.extend(properties)
    body = ET.tostring(meta, encoding="unicode").encode()
    return b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>' + body + b'<?xpacket end="r"?>'
