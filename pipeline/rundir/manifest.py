"""The manifest: what a run began with. Written once, with a checksum; the journal's first record holds a copy."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config import undotted
from pipeline.core.color_spaces import SpaceName
from pipeline.core.errors import DamagedStateError, storage
from pipeline.core.files import read_regular, write_whole
from pipeline.core.image_formats import PixelKind
from pipeline.core.text import shown
from pipeline.rundir.position import Position
from pipeline.rundir.records import (
    FORMAT,
    MAX_MANIFEST_BYTES,
    Begun,
    Manifest,
    OtherVersionError,
    Record,
    StageSizes,
    parse_json,
    parse_manifest,
)
from pipeline.store import checksum


class OtherFormatError(DamagedStateError):
    """An intact manifest of a version of pipeline with another format of run directories."""


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest to a temporary file, sync and rename it. Raises StorageError."""
    with storage(path):  # renamed when complete: without a valid manifest, the folder is not recognised as a run's
        write_whole(path, _manifest_text(manifest.model_dump(mode="json")))


def _manifest_text(manifest: Mapping[str, Any]) -> bytes:
    crc = checksum(json.dumps(manifest).encode())
    return json.dumps({**manifest, "crc": f"{crc:08x}"}, indent=2).encode()


def read_manifest(path: Path) -> Manifest:
    """Read the manifest. Raises DamagedStateError if it is unreadable or was changed, OtherFormatError."""
    try:
        with storage(path):
            data = read_regular(path, MAX_MANIFEST_BYTES) if path.exists() else b""
        fields: dict[str, Any] = parse_json(data)
        written_in = fields["format"]
        # the checksum first, because the format may be what was changed; old formats had none
        if (fields.pop("crc", None) is not None or written_in == FORMAT) and _manifest_text(fields) != data:
            raise ValueError("it was changed after it was written")
        if written_in == FORMAT:
            return parse_manifest(fields)
    except OtherVersionError as error:
        raise OtherFormatError(
            f"{path}: is of {error}, which a later version of pipeline has written. Nothing is damaged: resume with "
            "that version."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStateError(
            f"{path}: cannot be read as a run's manifest ({shown(str(error), 200)}). `pipeline verify --repair` can "
            "restore it from the journal."
        ) from error
    raise OtherFormatError(
        f"{path}: written in format {shown(str(written_in))}, but this version of pipeline reads format {FORMAT}. "
        "Finish the run with the version that began it, or delete the run directory."
    )


def stages_of(manifest: Manifest, position: Position) -> list[StageSizes]:
    """The stages of a run: those that it began with, and those that were added since."""
    last = manifest.stages[-1]
    return [*manifest.stages, *(last.model_copy(update={"max_iterations": number}) for number in position.added)]


def max_iterations(manifest: Manifest, stage: StageSizes) -> int:
    """The most iterations that a stage has."""
    # older manifests have only the config's value, which is that of stages without settings of their own
    if stage.max_iterations is None:
        return manifest.config.optimizer.max_iterations if manifest.config.optimizer is not None else 0
    return stage.max_iterations


def content_kind(manifest: Manifest) -> PixelKind:
    """Bit depth and alpha of the run's content."""
    return PixelKind(manifest.content.bits, manifest.content.alpha)


def manifest_inputs(manifest: Manifest) -> Iterator[tuple[str, Path]]:
    """(dotted key, path) of every input file, where it was when the run began."""
    config = manifest.config.model_dump()
    for key in manifest.inputs:
        value: Any = config
        with contextlib.suppress(LookupError, TypeError):  # a stranger's manifest may name what its config lacks
            for part in undotted(key):
                keyed = isinstance(value, Mapping) or (isinstance(value, list) and isinstance(part, int))
                value = value[part] if keyed else None
        if isinstance(value, str):
            yield key, Path(value)


def canvas_space(manifest: Manifest) -> SpaceName:
    """The colour space of the run's canvas."""
    return "srgb" if manifest.config.working_space == "auto" else manifest.config.working_space


def begun_manifest(records: Iterable[Record]) -> Manifest | None:
    """The journal's copy of the manifest, or None."""
    copies = [record.manifest for record in records if isinstance(record, Begun)]
    return copies[-1] if copies else None


def trusted_manifest(path: Path, records: Iterable[Record]) -> Manifest:
    """Read the manifest. Raises DamagedStateError if it is damaged or differs from the journal's copy."""
    manifest = read_manifest(path)
    if manifest != begun_manifest(records):
        raise DamagedStateError(
            f"{path}: is intact, but not the manifest that the journal beside it began with: it belongs to another "
            "run, and to resume would mix two. `pipeline verify --repair` restores it from the journal."
        )
    return manifest
