"""The checkpoint of a training: weights, Adam's moments and the step, in one file that is replaced atomically.

A .safetensors file, so that reading it runs no code. A kill leaves the old checkpoint or the new one; bytes that change
later are found by a checksum.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.core.errors import ConfigError, DamagedStateError, storage
from pipeline.core.files import write_whole
from pipeline.core.text import shown
from pipeline.store import checksum

_FORMAT = "pipeline.training.1"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after `step` steps.

    `identity`: what decides the weights (config, inputs), by name. `threads`: CPU threads, which decide the last bits.
    """

    step: int
    threads: int
    identity: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint: temporary file, sync, rename. Raises StorageError."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in sorted(checkpoint.tensors.items())}
    metadata = {
        "format": _FORMAT,
        "step": str(checkpoint.step),
        "threads": str(checkpoint.threads),
        "identity": json.dumps(checkpoint.identity),
        "checksum": f"{_checksum(tensors):08x}",
    }
    with storage(path):
        write_whole(path, save(tensors, metadata))


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a file. Raises DamagedStateError if its bytes have changed, StorageError."""
    try:
        with storage(path), safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        if metadata["format"] != _FORMAT:
            raise ConfigError(
                f"{path}: has the format {shown(metadata['format'])}, not {_FORMAT}, so another version of pipeline "
                "wrote it. Resume with that version, or choose another work_dir."
            )
        if int(metadata["checksum"], 16) != _checksum(tensors):
            raise ValueError("its checksum differs")
        identity = json.loads(metadata["identity"])
        return Checkpoint(int(metadata["step"]), int(metadata["threads"]), identity, tensors)
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise DamagedStateError(
            f"{path}: was changed after it was written ({shown(str(error), 200)}), so the training cannot continue. "
            "Restore it from a copy, or delete the folder to train from the start."
        ) from error


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    found = 0
    for key in sorted(tensors):
        found = checksum(key.encode(), found)
        found = checksum(tensors[key].reshape(-1).view(torch.uint8).numpy(), found)
    return found
