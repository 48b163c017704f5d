"""The files of the page, which are part of the package. Nothing is fetched from anywhere else."""

from __future__ import annotations

import hashlib
import html
import json
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


def page_with(state_text: str) -> bytes:
    """The page with a state in it, and with the newest stage as one tile, which the browser shows before any script."""
    stages = [one for one in json.loads(state_text)["pictures"] if one["kind"] == "stage"]
    first = ""
    if stages:
        newest = stages[-1]
        level = min((max(newest["height"], newest["width"]) - 1).bit_length(), newest["tile_px"].bit_length() - 1)
        address = html.escape(f"{newest['tiles']}{level}/0_0.{newest['format']}", quote=True)
        first = f'<img id="first" src="{address}" alt="" elementtiming="first">'
    # as JSON may: no text of a run ends the element
    data = f'<script type="application/json" id="state">{state_text.replace("<", chr(92) + "u003c")}</script>'
    page = page_files()["index.html"].decode()
    if first:  # so that the picture stays where it is when the script fills in the stages
        page = page.replace('<footer id="stages" hidden>', '<footer id="stages">', 1)
    return page.replace("<!-- first -->", first, 1).replace("<!-- state -->", data, 1).encode()
