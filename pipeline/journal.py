"""The record of a run: a manifest written once, a journal appended to, the resume point, and the lock.

The journal, not the presence of files, says where a run stands. One line per record, JSON with a CRC-32C, fsynced:

    {"crc": "89abcdef", "record": {"type": "iteration", "stage": 1, "iteration": 17, ...}}

Every line's CRC goes on from that of the line before, so that a line that was taken out is seen too. A last line that
was cut short by a crash was never committed, and is dropped. Any other bad line is damage. The first record holds the
manifest once more. Records of prepared stages and of iterations carry the checksum of every chunk they stand for.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import psutil

from pipeline._yaml import shown
from pipeline.arrays import kept_files
from pipeline.checksums import checksum, unpacked
from pipeline.durable import sync_folder
from pipeline.errors import DamagedStateError, LockedError, SpaceError, storage
from pipeline.places import read_regular
from pipeline.records import MAX_JOURNAL_BYTES, MAX_OWNER_BYTES, check_record, parse_json

# How long a start waits for the worker processes of a run that was killed: the system kills them within a moment.
_LEFT_BEHIND_S = 10.0
Record = dict[str, Any]


@dataclass(frozen=True)
class Position:
    """Where a run stands: what is committed, and so what comes next.

    `prepared`: stage `stage` has its arrays. `iteration`: the next one; it reads slot `iteration % 2`.
    `alpha`, `mean_abs_u`, `max_abs_u`: of the stage's last iteration, None before its first.
    `stage_done`: the stage ended. `slots`: where the newest canvas of every stage is. `exported`: pictures made, with
    their export options.
    `claimed`: their names, from before the first byte is written.
    `checksums`: per stage, of the chunks of its arrays (the newest slot's) and of its metadata files, as checksums.py
    packs them. `tile_px`: the largest tile that the device has room for, None while it is not known to be smaller than
    the plan's.
    """

    stage: int = 0
    prepared: bool = False
    iteration: int = 0
    alpha: float | None = None
    mean_abs_u: float | None = None
    max_abs_u: float | None = None
    content_energies: Mapping[str, float] = field(default_factory=dict)
    areas: Mapping[str, float] = field(default_factory=dict)
    stage_done: bool = False
    slots: Mapping[int, int] = field(default_factory=dict)
    exported: Mapping[str, Any] = field(default_factory=dict)
    claimed: frozenset[str] = frozenset()
    checksums: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    tile_px: int | None = None

    @property
    def newest_slot(self) -> int:
        """The slot of the current stage that holds its newest canvas, m and v."""
        return self.slots[self.stage]

    def after(self, record: Record) -> Position:
        """The position once `record` is committed."""
        kind = record["type"]
        if kind == "canvas_lost":
            return replace(
                self,
                slots=_without(self.slots, record["stage"]),
                checksums=_without(self.checksums, record["stage"]),
            )
        if kind in ("begun", "smaller_tile"):
            return replace(self, tile_px=record.get("tile_px", self.tile_px))
        if kind in ("exporting", "exported"):
            made = {record["output"]: record.get("options")} if kind == "exported" else {}
            return replace(self, exported={**self.exported, **made}, claimed=self.claimed | {record["output"]})
        if kind == "stage_done":
            sums = self.checksums[self.stage]
            left = {name: sums[name] for name in kept_files(self.newest_slot, sums)}
            return replace(self, stage_done=True, checksums={**self.checksums, self.stage: left})
        if kind == "stage_prepared":
            return Position(
                stage=record["stage"],
                prepared=True,
                content_energies=record["content_energies"],
                areas=record.get("areas", {}),
                slots={**self.slots, record["stage"]: 0},
                exported=self.exported,
                claimed=self.claimed,
                checksums={**self.checksums, record["stage"]: record["checksums"]},
                tile_px=self.tile_px,
            )
        iteration = record["iteration"] + record["stepped"]
        return replace(
            self,
            iteration=iteration,
            alpha=record["alpha"],
            mean_abs_u=record["mean_abs_u"],
            max_abs_u=record["max_abs_u"],
            slots={**self.slots, self.stage: iteration % 2},
            checksums={**self.checksums, self.stage: {**self.checksums[self.stage], **record["checksums"]}},
        )


def _without(mapping: Mapping[int, Any], key: int) -> dict[int, Any]:
    return {other: value for other, value in mapping.items() if other != key}


# What stays true however far a repair goes back: whose a picture is, which canvas the disk lost, how large a tile fits.
_KEPT_ALWAYS = ("exporting", "exported", "canvas_lost", "smaller_tile")


def effective(records: Iterable[Record]) -> list[Record]:
    """The records without those that a repair took back; some are never taken back."""
    kept: list[Record] = []
    for record in records:
        index = record.get("records") if record.get("type") == "rolled_back" else None
        if isinstance(index, int) and index >= 0:  # any other is no run's, and is refused with the rest
            taken = kept[index:]
            kept = kept[:index] + [one for one in taken if one.get("type") in _KEPT_ALWAYS]
        else:
            kept.append(record)
    return kept


def position_of(records: Iterable[Record]) -> Position:
    """The resume point that a journal's records describe."""
    return reduce(Position.after, records, Position())


@dataclass(frozen=True)
class JournalState:
    """A journal as it lies on the disk.

    `records`: those that hold, of the whole lines from the start; these are the first `good_bytes` of the file.
    `damaged_line`: the number of the line after them, if it was changed. `torn`: the last line is not whole, because
    a crash cut it short before it was committed.
    """

    records: list[Record]
    good_bytes: int
    damaged_line: int | None
    torn: bool


class Journal:
    """Append-only, checksummed, durable list of records."""

    def __init__(self, path: Path):
        self.path = path
        self._crc: int | None = None

    def read(self) -> list[Record]:
        """All committed records that hold. Raises DamagedStateError for a damaged line."""
        return effective(self._parse().records)

    def inspect(self) -> JournalState:
        """What is there, damaged or not: what a repair can build on."""
        found = self._parse(to_damage=True)
        torn = found.damaged_line is None and self.path.exists() and self.path.stat().st_size > found.good_bytes
        return JournalState(effective(found.records), found.good_bytes, found.damaged_line, torn)

    def size_bytes(self) -> int:
        """Of the file, a last line that is being written included; 0 where there is none yet."""
        with storage(self.path):
            return self.path.stat().st_size if self.path.exists() else 0

    def repair_tail(self) -> None:
        """Cut off a last line that a crash left half-written, so that appending starts on a fresh line."""
        self._cut(self._parse())

    def set_damage_aside(self) -> Path:
        """Keep everything from the first damaged line on in a file of its own, and cut it off; gives that file."""
        found = self._parse(to_damage=True)
        names = (self.path.with_name(f"{self.path.name}.damaged-{number}") for number in itertools.count(1))
        aside = next(path for path in names if not path.exists())
        with storage(aside), aside.open("xb") as file:
            file.write(self.path.read_bytes()[found.good_bytes :])
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.path.parent)
        self._cut(found)
        return aside

    def _cut(self, found: _Lines) -> None:
        with storage(self.path):
            if self.path.exists() and self.path.stat().st_size > found.good_bytes:
                with self.path.open("r+b") as file:
                    file.truncate(found.good_bytes)
                    os.fsync(file.fileno())
        self._crc = found.crc

    def append(self, record: Record) -> None:
        """Commit one record: when this returns, it is on the disk. Raises StorageError."""
        crc = self._parse().crc if self._crc is None else self._crc
        data = _line_of(record, crc)
        line = memoryview(data)
        created = not self.path.exists()
        with storage(self.path):
            with self.path.open("ab", buffering=0) as file:  # a buffer would be written again by closing the file
                start = file.tell()
                try:
                    while line:
                        line = line[file.write(line) :]
                    os.fsync(file.fileno())
                except OSError:
                    with contextlib.suppress(OSError):  # else the next start cuts the line off
                        os.ftruncate(file.fileno(), start)
                    raise
            if created:
                sync_folder(self.path.parent)
        self._crc = _crc_of(data)

    def _bytes(self) -> bytes:
        with storage(self.path):
            try:
                return read_regular(self.path, MAX_JOURNAL_BYTES)
            except FileNotFoundError:
                return b""
            except ValueError as error:
                message = f"{self.path}: {error}, so it is no journal. Restore it from a copy."
                raise DamagedStateError(message) from error

    def _parse(self, to_damage: bool = False) -> _Lines:
        records: list[Record] = []
        good_bytes = crc = 0
        damaged_line = None
        lines = self._bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            record = _record_of(line, crc)
            if record is None and number == len(lines) and _is_torn(line, good_bytes, crc):
                break
            if record is None and to_damage:
                damaged_line = number
                break
            if record is None:
                raise DamagedStateError(
                    f"{self.path}:{number}: this line or the one before it was changed after it was written, so the "
                    "state it describes cannot be trusted. `pipeline verify --repair` goes back to what can be."
                )
            records.append(record)
            good_bytes, crc = good_bytes + len(line), _crc_of(line)
        return _Lines(records, good_bytes, crc, damaged_line)


def standing(journal: Journal) -> tuple[list[Record], Position]:
    """The records of a run, and where it stands.

    Raises DamagedStateError for a damaged line, and for whole ones that no run has written.
    """
    records = journal.read()
    return records, checked_position(records, journal.path)


def checked_position(records: Iterable[Record], path: Path) -> Position:
    """The resume point of the records in the journal `path`. Raises DamagedStateError for those no run has written."""
    try:
        records = list(records)
        for record in records:
            check_record(record)
        position = position_of(records)
        for stage, slot in position.slots.items():
            for name in kept_files(slot, position.checksums[stage]):
                position.checksums[stage][name]  # a LookupError where it is not there
            for text in position.checksums[stage].values():
                unpacked(text)[0]  # a ValueError or LookupError where it is no checksum
        return position
    except (LookupError, TypeError, ValueError) as error:
        raise DamagedStateError(
            f"{path}: its records are not a run's ({shown(str(error), 200)}), so the state they describe "
            "cannot be trusted. Restore the run directory from a copy, or delete it to render again."
        ) from error


@dataclass(frozen=True)
class _Lines:
    """Whole lines from the start of a journal, their bytes, what the next one's CRC goes on from, and the bad one."""

    records: list[Record]
    good_bytes: int
    crc: int
    damaged_line: int | None


_SECTOR_BYTES = 512
_CRC = slice(len('{"crc": "'), len('{"crc": "89abcdef'))


def _line_of(record: Record, previous_crc: int) -> bytes:
    text = json.dumps(record, allow_nan=False)
    return f'{{"crc": "{checksum(text.encode(), previous_crc):08x}", "record": {text}}}\n'.encode()


def _crc_of(line: bytes) -> int:
    return int(line[_CRC], 16)


def _record_of(line: bytes, previous_crc: int) -> Record | None:
    """The record of a whole line, or None. Whole is what was written, byte for byte: JSON overlooks a changed space."""
    try:
        record: Record = parse_json(line)["record"]
        return record if _line_of(record, previous_crc) == line else None
    except (ValueError, KeyError, TypeError):
        return None


def _is_torn(line: bytes, offset: int, previous_crc: int) -> bool:
    """Whether the last line, at this offset of the file, was still being written when the process or the power went.

    It ends early then, or a whole sector of it is zeros: a disk writes sectors in any order. Of a single changed bit
    neither comes: a line that is whole but for its last byte was committed.
    """
    first = -offset % _SECTOR_BYTES
    sectors = [line[:first], *(line[start : start + _SECTOR_BYTES] for start in range(first, len(line), _SECTOR_BYTES))]
    if any(sector and not sector.strip(b"\0") for sector in sectors):
        return True
    return not line.endswith(b"\n") and _record_of(line[:-1] + b"\n", previous_crc) is None


class RunLock:
    """Keeps a second run out of a run directory.

    Released by the system however the process ends, once its worker processes, which inherit `descriptor`, have ended
    too: a file is closed after the last call that writes, so that nothing writes into a directory that can be locked.
    `named`: others have to be told who works here, which takes room on the disk; else they are if there is some.
    """

    descriptor: int

    def __init__(self, work_dir: Path, named: bool = True):
        self._named = named
        self._owner = work_dir / "lock.owner"
        self._path = work_dir / "lock"

    def __enter__(self) -> RunLock:
        with storage(self._path):
            self.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._acquire()
        except BaseException:
            os.close(self.descriptor)
            raise
        process = psutil.Process()
        owner_text = json.dumps({"pid": process.pid, "started": process.create_time()})
        try:
            with storage(self._owner):
                self._owner.write_text(owner_text, encoding="utf-8")
        except OSError as error:
            if self._named or not isinstance(error, SpaceError):
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # it names a process that has ended, which `running_owner` sees
            self._owner.unlink(missing_ok=True)
        os.close(self.descriptor)

    def _acquire(self) -> None:
        """Lock, once what a killed run left has ended. Raises LockedError if a run works here, or that takes long."""
        deadline = time.monotonic() + _LEFT_BEHIND_S
        while True:
            try:
                with storage(self._path):
                    fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                owner = running_owner(self._path.parent)
                if owner is None and time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                who = f"another run is working here (process {owner})"
                left = "the worker processes of a run that was killed have not ended yet"
                raise LockedError(
                    f"{self._path.parent}: {left if owner is None else who}. Two runs would destroy each other's "
                    "state: wait for it, stop it, or choose another work_dir."
                ) from error


def running_owner(work_dir: Path) -> int | None:
    """The process id of the run that is working in `work_dir`, or None. Never disturbs it."""
    try:
        owner = parse_json(read_regular(work_dir / "lock.owner", MAX_OWNER_BYTES))
        process = psutil.Process(owner["pid"])
        alive = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - owner["started"]) < 1
        return int(owner["pid"]) if alive else None
    except (OSError, ValueError, LookupError, TypeError, OverflowError, psutil.Error):
        return None
