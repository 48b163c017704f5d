"""The files of the page, which are part of the package. Nothing is fetched from anywhere else."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from pathlib import PurePath

_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


# Of other projects; tests/unit/viewer/test_viewer.py has their versions and hashes.
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
