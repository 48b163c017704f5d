"""The folder of a training: its lock, its checkpoint, its losses and its samples.

lock, lock.owner            another training is refused while this one works
checkpoint.safetensors      the state (checkpoint.py)
losses.jsonl                a line for each step
samples/step-00001000.jpg   sample pictures
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.core.errors import MISPLACED, ConfigError, storage, storage_error
from pipeline.core.files import names_in, sync_file, unwritable, write_whole
from pipeline.feedforward.objective import Losses
from pipeline.rundir.lock import RunLock

_CHECKPOINT, _LOSSES, _SAMPLES = "checkpoint.safetensors", "losses.jsonl", "samples"
_LOCK = ("lock", "lock.owner")
_OURS = {*_LOCK, _SAMPLES, *(name + end for name in (_CHECKPOINT, _LOSSES) for end in ("", ".partial"))}


class TrainFolder:
    """The files of a training in the folder `path`."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoint = path / _CHECKPOINT
        self.losses = path / _LOSSES
        self._file: BinaryIO | None = None

    def sample(self, step: int) -> Path:
        """The file of the sample pictures after a step."""
        return self.path / _SAMPLES / f"step-{step:08}.jpg"

    def write_sample(self, step: int, data: bytes) -> None:
        """Write sample pictures. Raises StorageError."""
        path = self.sample(step)
        with storage(path):
            path.parent.mkdir(exist_ok=True)
            write_whole(path, data)

    def begin_losses(self, step: int) -> None:
        """Drop the losses after `step`: a killed training computes those steps again."""
        with storage(self.losses):
            lines = self.losses.read_bytes().splitlines(keepends=True) if self.losses.exists() else []
            kept = [line for line in lines if line.endswith(b"\n") and 0 < _step_of(line) <= step]
            write_whole(self.losses, b"".join(kept))
            self._file = self.losses.open("ab")

    def append_losses(self, step: int, losses: Losses, seconds: float) -> None:
        """Append the losses of a step. Raises StorageError."""
        assert self._file is not None, "begin_losses comes first"
        values: Mapping[str, float] = {"step": step, **vars(losses), "seconds": round(seconds, 4)}
        with storage(self.losses):
            self._file.write(json.dumps(values).encode() + b"\n")
            self._file.flush()

    def last_losses(self, number: int) -> list[Losses]:
        """The losses of the last steps, at most `number`."""
        self.sync_losses()
        with storage(self.losses):
            lines = self.losses.read_bytes().splitlines()[-number:]
        names = Losses.__dataclass_fields__
        return [Losses(**{name: json.loads(line)[name] for name in names}) for line in lines]

    def sync_losses(self) -> None:
        """Write the losses to the disk, before the checkpoint that covers them."""
        if self._file is not None:
            with storage(self.losses):
                sync_file(self._file)

    def close(self) -> None:
        """Close the losses. A full disk that refuses the last lines has been reported already."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


def _step_of(line: bytes) -> int:
    """The step of a line of losses, 0 of any other line."""
    try:
        found = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return 0
    return found if isinstance(found, int) else 0


@contextmanager
def locked_train_folder(path: Path) -> Iterator[TrainFolder]:
    """Create the folder if it does not exist, and hold its lock.

    A start that fails before the first checkpoint leaves nothing behind. Raises ConfigError if the folder has files
    that are not a training's, LockedError, StorageError.
    """
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in MISPLACED:
            raise storage_error(path, error) from error
        raise ConfigError(f"work_dir {path}: cannot be created ({error.strerror}). Choose another work_dir.") from error
    if (refusal := unwritable(path)) is not None:
        if refusal.errno == errno.EROFS:
            raise storage_error(path, refusal)
        raise ConfigError(f"work_dir {path}: cannot be written to. Change its permissions or choose another.")
    if foreign := sorted(names_in(path) - _OURS):
        raise ConfigError(
            f"work_dir {path}: holds {foreign[0]}, which is no training's. Choose an empty or a new folder."
        )
    folder = TrainFolder(path)
    with RunLock(path):
        try:
            yield folder
        finally:
            folder.close()
            if created and not folder.checkpoint.exists():
                with suppress(OSError):
                    for name in (_LOSSES, *reversed(_LOCK)):
                        (path / name).unlink(missing_ok=True)
                    path.rmdir()
