"""What a run began with: written once, with a checksum, and kept once more in the journal's first record."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline._yaml import shown
from pipeline.checksums import checksum
from pipeline.durable import sync_folder
from pipeline.errors import DamagedStateError, storage
from pipeline.journal import Record
from pipeline.pictures import PixelKind
from pipeline.places import read_regular
from pipeline.records import MAX_MANIFEST_BYTES, check_manifest, parse_json

FORMAT = 2
MANIFEST_KEYS = {"format", "created", "config", "stages", "threads", "result_fields", "inputs"}


class OtherFormatError(DamagedStateError):
    """A whole manifest, but of a version of pipeline that keeps its runs otherwise."""


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest aside, sync it, and give it its name. Raises StorageError."""
    aside = path.with_name(path.name + ".partial")
    with storage(path):
        with aside.open("wb") as file:
            file.write(_manifest_text(manifest))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)


def _manifest_text(manifest: Mapping[str, Any]) -> bytes:
    crc = checksum(json.dumps(manifest).encode())
    return json.dumps({**manifest, "crc": f"{crc:08x}"}, indent=2).encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest. Raises DamagedStateError if it is unreadable or was changed, OtherFormatError."""
    try:
        with storage(path):
            data = read_regular(path, MAX_MANIFEST_BYTES) if path.exists() else b""
        manifest: dict[str, Any] = parse_json(data)
        found = manifest["format"]
        if found == FORMAT and (missing := MANIFEST_KEYS - manifest.keys()):
            raise KeyError(f"without {', '.join(sorted(missing))}")
        # before the format is believed: that number may be what was changed
        if (manifest.pop("crc", None) is not None or found == FORMAT) and _manifest_text(manifest) != data:
            raise ValueError("it was changed after it was written")
        if found == FORMAT:
            check_manifest(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStateError(
            f"{path}: cannot be read as a run's manifest ({shown(str(error), 200)}). `pipeline verify --repair` can "
            "restore it from the journal."
        ) from error
    if found != FORMAT:
        raise OtherFormatError(
            f"{path}: written in format {shown(str(found))}, but this version of pipeline reads format {FORMAT}. "
            "Finish the run with the version that began it, or delete the run directory."
        )
    return manifest


def content_kind(manifest: Mapping[str, Any]) -> PixelKind:
    """What the pixels of the run's content are; a run from before that was kept has 8 bits and no alpha."""
    return PixelKind(**manifest.get("content", {}))


def begun_manifest(records: Iterable[Record]) -> dict[str, Any] | None:
    """The copy of the manifest that a journal's records hold, if they hold one."""
    copies: list[dict[str, Any]] = [record["manifest"] for record in records if record.get("type") == "begun"]
    return copies[-1] if copies else None


def trusted_manifest(path: Path, records: Iterable[Record]) -> dict[str, Any]:
    """The manifest, which the journal must agree with. Raises DamagedStateError if it cannot be trusted."""
    manifest = read_manifest(path)
    if manifest != begun_manifest(records):
        raise DamagedStateError(
            f"{path}: is whole, but not the manifest that the journal beside it began with: it belongs to another run, "
            "and going on would mix two. `pipeline verify --repair` restores it from the journal."
        )
    return manifest
