"""The files of the page, which are part of the package. Nothing is fetched from anywhere else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import PurePath

_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Vendored:
    """A file of another project: where it comes from, and its SHA-256."""

    file: str
    package: str
    license: str
    sha256: str


VENDORED = (
    Vendored(
        "openseadragon.min.js",
        "openseadragon@6.1.1",
        "BSD-3-Clause",
        "14d587cd3ee7c4861f1a41077ce642029364a21029956ba635bd8fb1202cf9ad",
    ),
    Vendored("uplot.min.js", "uplot@1.6.32", "MIT", "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"),
    Vendored(
        "uplot.min.css", "uplot@1.6.32", "MIT", "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04"
    ),
)
LICENSES = ("openseadragon.LICENSE.txt", "uplot.LICENSE.txt")


@cache
def page_files() -> dict[str, bytes]:
    """Every file that the page is made of, by name."""
    folder = resources.files("pipeline.viewer") / "assets"
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if PurePath(entry.name).suffix in _TYPES}


def content_type(name: str) -> str:
    """The type of a file of the page, for its HTTP header."""
    return f"{_TYPES[PurePath(name).suffix]}; charset=utf-8"


@cache
def page_version() -> str:
    """Changes with every change of a file of the page."""
    digest = hashlib.sha256()
    for name, data in sorted(page_files().items()):
        digest.update(name.encode() + b"\0" + data)
    return digest.hexdigest()[:12]
