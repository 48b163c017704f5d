"""The journal of a run: one line per committed record, JSON with a CRC-32C, synced to the disk.

    {"crc": "89abcdef", "record": {"type": "iteration", "version": 1, "stage": 1, "iteration": 17, ...}}

The journal alone, not the presence of files, determines where a run resumes. The CRC of a line continues that of the
line before, so that a removed line is detected too. An incomplete last line, cut short by a crash, was never committed
and is dropped; any other invalid line is damage. The first record holds a copy of the manifest. Records of prepared
stages and of iterations hold the checksums of all chunks that they commit. The fields of the records: records.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import DamagedStateError, storage
from pipeline.core.files import read_regular, sync_folder, write_whole
from pipeline.rundir.position import Position, checked_position, effective, no_runs_records
from pipeline.rundir.records import (
    MAX_JOURNAL_BYTES,
    OtherVersionError,
    Record,
    RolledBack,
    as_json,
    parse_json,
    parse_record,
)
from pipeline.store import checksum


@dataclass(frozen=True)
class JournalState:
    """A journal file, damaged or not.

    `records`: those before the first damage, without those that a repair rolled back; their lines are the first
    `good_bytes` of the file. `damaged_line`: the number of the line after them, if it was changed. `torn`: a crash cut
    the last line short before it was committed.
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
        self._last_read: _Lines | None = None

    def read(self) -> list[Record]:
        """All committed records, without those that a repair rolled back.

        Raises DamagedStateError for a damaged line, an invalid record, and a record of a later version.
        """
        lines = self._intact_lines()
        self._last_read = replace(lines, records=[])  # a long run's records are large
        return self._typed(lines)

    def inspect(self) -> JournalState:
        """The state of the file up to its first damage. Raises DamagedStateError for invalid records."""
        lines = self._parse()
        torn = lines.damaged_line is None and self.size_bytes() > lines.good_bytes
        return JournalState(self._typed(lines), lines.good_bytes, lines.damaged_line, torn)

    def _typed(self, lines: _Lines, before: Sequence[Record] = ()) -> list[Record]:
        """The records of these lines after those `before`, without what a repair rolled back."""
        try:
            return effective(map(parse_record, lines.records), before)
        except OtherVersionError as error:
            raise DamagedStateError(
                f"{self.path}: holds records of {error}, which a later version of pipeline has written. Nothing is "
                "damaged: resume with that version."
            ) from error
        except ValueError as error:
            raise no_runs_records(self.path, error) from error

    def size_bytes(self) -> int:
        """The size of the file, including a line that is being written; 0 if there is no file yet."""
        with storage(self.path):
            return self.path.stat().st_size if self.path.exists() else 0

    def repair_tail(self) -> None:
        """Cut off an incomplete last line, so that the next record starts on a line of its own.

        If this object has read the file as it is now, it is not read again.
        """
        known = self._last_read
        self._cut(known if known is not None and known.file_bytes == self.size_bytes() else self._intact_lines())

    def set_damage_aside(self) -> Path:
        """Move everything from the first damaged line on to a new file, and return its path."""
        lines = self._parse()
        names = (self.path.with_name(f"{self.path.name}.damaged-{number}") for number in itertools.count(1))
        aside = next(path for path in names if not path.exists())
        with storage(aside):
            write_whole(aside, self.path.read_bytes()[lines.good_bytes :])
        self._cut(lines)  # only now that the copy is on the disk
        return aside

    def _cut(self, lines: _Lines) -> None:
        if self.size_bytes() > lines.good_bytes:
            with storage(self.path), self.path.open("r+b") as file:
                file.truncate(lines.good_bytes)
                os.fsync(file.fileno())
        self._crc = lines.crc

    def append(self, record: Record) -> None:
        """Commit one record: it is on the disk when this returns. Raises StorageError."""
        # the CRC is remembered: reading a long journal for every record would take longer each time
        crc = self._intact_lines().crc if self._crc is None else self._crc
        data = _line_of(as_json(record), crc)
        line = memoryview(data)
        created = not self.path.exists()
        with storage(self.path):
            # unbuffered: after a failed write, closing a buffered file would write the rest of the line
            with self.path.open("ab", buffering=0) as file:
                start = file.tell()
                try:
                    while line:
                        line = line[file.write(line) :]
                    os.fsync(file.fileno())
                except OSError:
                    with contextlib.suppress(OSError):  # if this fails too, the next start cuts the line off
                        os.ftruncate(file.fileno(), start)
                    raise
            if created:  # without this, a power cut may remove the new file's name
                sync_folder(self.path.parent)
        self._crc = _crc_of(data)

    def _bytes(self, start: int = 0) -> bytes:
        with storage(self.path):
            try:
                return read_regular(self.path, MAX_JOURNAL_BYTES, start)
            except FileNotFoundError:
                return b""
            except ValueError as error:
                message = f"{self.path}: {error}, so it is not a journal. Restore it from a copy."
                raise DamagedStateError(message) from error

    def _intact_lines(self, known: _Lines | None = None) -> _Lines:
        """All lines after those `known`, except an incomplete last one. Raises DamagedStateError if one is damaged."""
        lines = self._parse(known)
        if lines.damaged_line is not None:
            raise DamagedStateError(
                f"{self.path}:{lines.damaged_line}: this line or the one before it was changed after it was written, "
                "so the state it describes cannot be trusted. `pipeline verify --repair` rolls back to the line before."
            )
        return lines

    def _parse(self, known: _Lines | None = None) -> _Lines:
        """The lines after those `known`, before the first that is damaged or incomplete."""
        known = known or _NO_LINES
        records: list[Mapping[str, Any]] = []
        good_bytes, crc, last = known.good_bytes, known.crc, known.last
        damaged_line = None
        data = self._bytes(good_bytes)
        lines = data.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            record = _record_of(line, crc)
            if record is None:
                is_torn = number == len(lines) and _is_torn(line, good_bytes, crc)
                damaged_line = None if is_torn else known.number + number
                break
            records.append(record)
            good_bytes, crc, last = good_bytes + len(line), _crc_of(line), line
        number, file_bytes = known.number + len(records), known.good_bytes + len(data)
        return _Lines(records, number, good_bytes, file_bytes, crc, last, damaged_line)

    def _begins_with(self, known: _Lines) -> bool:
        """Whether the file still begins with these lines: the CRC of the last one is that of all before it too."""
        return self._bytes(known.good_bytes - len(known.last)).startswith(known.last)


class FollowedJournal:
    """A journal that another process appends to. Each call of `standing` parses what was added since the last one.

    `repairs`: the records of repairs that rolled others back.
    """

    def __init__(self, path: Path):
        self._journal = Journal(path)
        self._known, self._records, self._position = _NO_LINES, list[Record](), Position()
        self.repairs: list[Record] = []
        self._seen = (0, 0, 0)

    def standing(self) -> tuple[list[Record], Position]:
        """What the function `standing` returns, and raises."""
        seen = self._times()  # before reading: a record that follows is then read the next time
        if seen == self._seen:
            return self._records, self._position
        grown = seen[0] > self._seen[0] and self._journal._begins_with(self._known)
        if not grown:  # damaged, repaired, or another run's
            self._known, self._records, self._position, self.repairs = _NO_LINES, [], Position(), []
            self._seen = (0, 0, 0)
        lines = self._journal._intact_lines(self._known)
        records = self._journal._typed(lines, self._records)
        if records[: len(self._records)] == self._records:
            added = records[len(self._records) :]
            position = checked_position(added, self._journal.path, self._position)
        else:  # a repair has rolled some back
            position = checked_position(records, self._journal.path)
        self._known, self._records, self._position = replace(lines, records=[]), records, position
        rolled_back = [record for record in lines.records if record["type"] == RolledBack.model_fields["type"].default]
        self.repairs = [*self.repairs, *map(parse_record, rolled_back)]
        self._seen = seen
        return records, position

    def _times(self) -> tuple[int, int, int]:
        with storage(self._journal.path):
            try:
                status = self._journal.path.stat(follow_symlinks=False)
            except FileNotFoundError:
                return 0, 0, 0
        return status.st_size, status.st_mtime_ns, status.st_ino


def standing(journal: Journal) -> tuple[list[Record], Position]:
    """The records of a run, and the position at which it resumes.

    Raises DamagedStateError for a damaged line, and for records in an order that no run writes.
    """
    records = journal.read()
    return records, checked_position(records, journal.path)


@dataclass(frozen=True)
class _Lines:
    """Intact lines of a journal, from its start or after others, and the CRC that the next line continues.

    `number`, `good_bytes`: the lines up to here, and their size. `file_bytes`: the size of the file. `last`: the last.
    """

    records: list[Mapping[str, Any]]
    number: int
    good_bytes: int
    file_bytes: int
    crc: int
    last: bytes
    damaged_line: int | None


_NO_LINES = _Lines([], 0, 0, 0, 0, b"", None)


_SECTOR_BYTES = 512  # a disk writes whole sectors of at least this size
_CRC = slice(len('{"crc": "'), len('{"crc": "89abcdef'))


def _line_of(record: Mapping[str, Any], previous_crc: int) -> bytes:
    text = json.dumps(record, allow_nan=False)
    return f'{{"crc": "{checksum(text.encode(), previous_crc):08x}", "record": {text}}}\n'.encode()


def _crc_of(line: bytes) -> int:
    return int(line[_CRC], 16)


def _record_of(line: bytes, previous_crc: int) -> Mapping[str, Any] | None:
    """The record of an intact line, or None. Compares bytes, because JSON would accept a changed space."""
    try:
        record: Mapping[str, Any] = parse_json(line)["record"]
        return record if _line_of(record, previous_crc) == line else None
    except (ValueError, KeyError, TypeError):
        return None


def _is_torn(line: bytes, offset: int, previous_crc: int) -> bool:
    """Whether a crash or a power cut interrupted the write of the last line, which starts at this offset of the file.

    Such a line ends early, or a whole sector of it is zeros, since a disk writes sectors in any order. A flipped bit
    causes neither: a line that is complete except for its last byte was committed.
    """
    first = -offset % _SECTOR_BYTES
    sectors = [line[:first], *(line[start : start + _SECTOR_BYTES] for start in range(first, len(line), _SECTOR_BYTES))]
    if any(sector and not sector.strip(b"\0") for sector in sectors):
        return True
    return not line.endswith(b"\n") and _record_of(line[:-1] + b"\n", previous_crc) is None
