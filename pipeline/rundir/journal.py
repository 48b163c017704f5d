"""The journal of a run: what was committed, one line per record, JSON with a CRC-32C, fsynced.

    {"crc": "89abcdef", "record": {"type": "iteration", "version": 1, "stage": 1, "iteration": 17, ...}}

The journal, not the presence of files, says where a run stands. Every line's CRC goes on from that of the line before,
so that a line that was taken out is seen too. A last line that was cut short by a crash was never committed, and is
dropped. Any other bad line is damage. The first record holds the manifest once more. Records of prepared stages and of
iterations carry the checksum of every chunk they stand for. What a record holds: records.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import DamagedStateError, storage
from pipeline.core.files import read_regular, sync_folder, write_whole
from pipeline.rundir.position import Position, checked_position, effective, no_runs_records
from pipeline.rundir.records import MAX_JOURNAL_BYTES, OtherVersionError, Record, as_json, parse_json, parse_record
from pipeline.store.checksums import checksum


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
        """All committed records that hold.

        Raises DamagedStateError for a damaged line, for a record that no run writes, and for one of a later version.
        """
        return self._typed(self._parse())

    def inspect(self) -> JournalState:
        """What is there, damaged or not: what a repair can build on."""
        found = self._parse(to_damage=True)
        torn = found.damaged_line is None and self.path.exists() and self.path.stat().st_size > found.good_bytes
        return JournalState(self._typed(found), found.good_bytes, found.damaged_line, torn)

    def _typed(self, found: _Lines) -> list[Record]:
        try:
            return effective(map(parse_record, found.records))
        except OtherVersionError as error:
            raise DamagedStateError(
                f"{self.path}: holds records of {error}, which a later version of pipeline has written. Nothing is "
                "damaged: go on with that version."
            ) from error
        except ValueError as error:
            raise no_runs_records(self.path, error) from error

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
        with storage(aside):
            write_whole(aside, self.path.read_bytes()[found.good_bytes :])
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
        data = _line_of(as_json(record), crc)
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
        records: list[Mapping[str, Any]] = []
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


@dataclass(frozen=True)
class _Lines:
    """Whole lines from the start of a journal, their bytes, what the next one's CRC goes on from, and the bad one."""

    records: list[Mapping[str, Any]]
    good_bytes: int
    crc: int
    damaged_line: int | None


_SECTOR_BYTES = 512
_CRC = slice(len('{"crc": "'), len('{"crc": "89abcdef'))


def _line_of(record: Mapping[str, Any], previous_crc: int) -> bytes:
    text = json.dumps(record, allow_nan=False)
    return f'{{"crc": "{checksum(text.encode(), previous_crc):08x}", "record": {text}}}\n'.encode()


def _crc_of(line: bytes) -> int:
    return int(line[_CRC], 16)


def _record_of(line: bytes, previous_crc: int) -> Mapping[str, Any] | None:
    """The record of a whole line, or None. Whole is what was written, byte for byte: JSON overlooks a changed space."""
    try:
        record: Mapping[str, Any] = parse_json(line)["record"]
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
