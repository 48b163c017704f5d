"""The metadata of an output image: what the content says about itself, and how the image was made."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from pipeline.core.cancel import CancelToken
from pipeline.core.errors import InputError, StorageError
from pipeline.core.events import Note, Sink
from pipeline.core.image_formats import MetadataKept
from pipeline.images import ImageMetadata, read_metadata
from pipeline.network import sha256_of
from pipeline.rundir.records import Manifest

# A resume cannot change these keys, but they do not change the image.
_INDIFFERENT = ("store.codec",)


def output_metadata(
    manifest: Manifest, content: Path | None, kept: MetadataKept, cancel: CancelToken, sink: Sink
) -> ImageMetadata | None:
    """The metadata for an image of a run, None for `none`. It does not depend on the time or on the stage.

    `content`: where its file is now. Of a file that is gone or has changed nothing is kept, which is reported. Raises
    Stopped soon after `cancel` is set.
    """
    if kept == "none":
        return None
    found = ImageMetadata({})
    if content is not None and _is_unchanged(content, manifest.inputs["content"], cancel):
        found = read_metadata(content, kept == "keep-gps")
    elif content is not None:
        sink(Note(f"{content} is not there any more, or has changed: the image is without its copyright and captions"))
    return found.with_provenance(f"pipeline {version('pipeline')}", _provenance(manifest))


def _is_unchanged(path: Path, sha256: str, cancel: CancelToken) -> bool:
    try:
        return sha256_of(path, cancel) == sha256
    except (OSError, InputError, StorageError):
        return False


def _provenance(manifest: Manifest) -> dict[str, str]:
    """Facts that identify the run: with the same inputs and this digest, another run gives the same image."""
    decisive = {key: value for key, value in manifest.result_fields.items() if key not in _INDIFFERENT}
    identity = {"config": decisive, "inputs": manifest.inputs}
    config = manifest.config.model_dump()
    network = config.get("network")
    return {
        "Version": version("pipeline"),
        "ConfigDigest": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        "Seed": str(config.get("seed", 0)),
        "Network": str(network.get("name")) if isinstance(network, dict) else "",
        "NetworkDigest": manifest.inputs.get("network.weights", ""),
    }
