"""The record of a run: a manifest written once, a journal appended to, the resume point, and the lock.

The journal, not the presence of files, says where a run stands. One line per record, JSON with a CRC-32, fsynced:

    {"crc": "89abcdef", "record": {"type": "iteration", "stage": 1, "iteration": 17, ...}}

A last line that was cut short by a crash was never committed, and is dropped. Any other bad line is damage.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from pipeline.errors import DamagedStateError, LockedError, SpaceError

FORMAT = 1
MANIFEST_KEYS = {"format", "created", "config", "stages", "result_fields", "inputs"}
Record = dict[str, Any]


@dataclass(frozen=True)
class Position:
    """Where a run stands: what is committed, and so what comes next.

    `prepared`: stage `stage` has its arrays. `iteration`: the next one; it reads slot `iteration % 2`.
    `alpha`, `mean_abs_u`, `max_abs_u`: of the stage's last iteration, None before its first.
    `stage_done`: the stage ended. `slots`: where the newest canvas of every stage is. `exported`: pictures made, with
    their export options.
    `claimed`: their names, from before the first byte is written.
    """

    stage: int = 0
    prepared: bool = False
    iteration: int = 0
    alpha: float | None = None
    mean_abs_u: float | None = None
    max_abs_u: float | None = None
    content_energies: Mapping[str, float] = field(default_factory=dict)
    stage_done: bool = False
    slots: Mapping[int, int] = field(default_factory=dict)
    exported: Mapping[str, Any] = field(default_factory=dict)
    claimed: frozenset[str] = frozenset()

    def after(self, record: Record) -> Position:
        """The position once `record` is committed."""
        kind = record["type"]
        if kind == "exporting":
            return replace(self, claimed=self.claimed | {record["output"]})
        if kind == "exported":
            return replace(
                self,
                exported={**self.exported, record["output"]: record.get("options")},
                claimed=self.claimed | {record["output"]},
            )
        if kind == "stage_done":
            return replace(self, stage_done=True)
        if kind == "stage_prepared":
            return Position(
                stage=record["stage"],
                prepared=True,
                content_energies=record["content_energies"],
                slots={**self.slots, record["stage"]: 0},
                exported=self.exported,
                claimed=self.claimed,
            )
        iteration = record["iteration"] + record["stepped"]
        return replace(
            self,
            iteration=iteration,
            alpha=record["alpha"],
            mean_abs_u=record["mean_abs_u"],
            max_abs_u=record["max_abs_u"],
            slots={**self.slots, self.stage: iteration % 2},
        )


def position_of(records: Iterable[Record]) -> Position:
    """The resume point that a journal's records describe."""
    return reduce(Position.after, records, Position())


class Journal:
    """Append-only, checksummed, durable list of records."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[Record]:
        """All committed records. Raises DamagedStateError for a line that is neither whole nor the torn last one."""
        records, _ = self._parse()
        return records

    def repair_tail(self) -> None:
        """Cut off a last line that a crash left half-written, so that appending starts on a fresh line."""
        _, good_bytes = self._parse()
        if self.path.exists() and self.path.stat().st_size > good_bytes:
            with self.path.open("r+b") as file:
                file.truncate(good_bytes)
                os.fsync(file.fileno())

    def append(self, record: Record) -> None:
        """Commit one record: when this returns, it is on the disk. Raises SpaceError."""
        line = memoryview(_line_of(record))
        created = not self.path.exists()
        try:
            with self.path.open("ab", buffering=0) as file:  # a buffer would be written again by closing the file
                start = file.tell()
                try:
                    while line:
                        line = line[file.write(line) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), start)
                    raise
            if created:
                _sync_folder(self.path.parent)
        except OSError as error:
            raise _no_space(self.path, error) from error

    def _parse(self) -> tuple[list[Record], int]:
        if not self.path.exists():
            return [], 0
        records: list[Record] = []
        good_bytes = 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            record = _record_of(line)
            # a line that is whole but for its last byte was committed: it is its newline that was changed
            if number == len(lines) and not line.endswith(b"\n") and _record_of(line[:-1] + b"\n") is None:
                break
            if record is None:
                raise DamagedStateError(
                    f"{self.path}:{number}: this line was changed after it was written, so the state it describes "
                    "cannot be trusted. Restore the run directory from a copy, or delete it to render again."
                )
            records.append(record)
            good_bytes += len(line)
        return records, good_bytes


def _line_of(record: Record) -> bytes:
    text = json.dumps(record, allow_nan=False)
    return f'{{"crc": "{zlib.crc32(text.encode()):08x}", "record": {text}}}\n'.encode()


def _record_of(line: bytes) -> Record | None:
    """The record of a whole line, or None. Whole is what was written, byte for byte: JSON overlooks a changed space."""
    try:
        record: Record = json.loads(line)["record"]
        return record if _line_of(record) == line else None
    except (ValueError, KeyError, TypeError):
        return None


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest aside, sync it, and give it its name. Raises SpaceError."""
    aside = path.with_name(path.name + ".partial")
    try:
        with aside.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _no_space(path, error) from error


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest. Raises DamagedStateError if it is unreadable or of another format."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
        if found == FORMAT and (missing := MANIFEST_KEYS - manifest.keys()):
            raise KeyError(f"without {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedStateError(
            f"{path}: cannot be read as a run's manifest ({error}). Restore it from a copy, or delete the "
            "run directory."
        ) from error
    if found != FORMAT:
        raise DamagedStateError(
            f"{path}: written in format {found}, but this version of pipeline reads format {FORMAT}. "
            "Finish the run with the version that began it, or delete the run directory."
        )
    return dict(manifest)


class RunLock:
    """Keeps a second run out of a run directory; released by the system however the process ends."""

    def __init__(self, work_dir: Path):
        self._owner = work_dir / "lock.owner"
        self._lock = FileLock(work_dir / "lock", thread_local=False)

    def __enter__(self) -> RunLock:
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            owner = running_owner(self._owner.parent)
            raise LockedError(
                f"{self._owner.parent}: another run is working here"
                + (f" (process {owner})" if owner else "")
                + ". Two would destroy each other's state: wait for it, stop it, or choose another work_dir."
            ) from error
        process = psutil.Process()
        owner_text = json.dumps({"pid": process.pid, "started": process.create_time()})
        try:
            self._owner.write_text(owner_text, encoding="utf-8")
        except OSError as error:
            self.__exit__()
            raise _no_space(self._owner, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._owner.unlink(missing_ok=True)
        self._lock.release()


def running_owner(work_dir: Path) -> int | None:
    """The process id of the run that is working in `work_dir`, or None. Never disturbs it."""
    try:
        owner = json.loads((work_dir / "lock.owner").read_text(encoding="utf-8"))
        process = psutil.Process(owner["pid"])
        alive = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - owner["started"]) < 1
        return int(owner["pid"]) if alive else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_space(path: Path, error: OSError) -> SpaceError:
    return SpaceError(f"{path}: {error.strerror}. Make room (or the disk writable) and give the same command again.")
