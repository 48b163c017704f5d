"""A journal that another process appends to is read on from where it was, and says what a whole reading would."""

from __future__ import annotations

import pytest

from pipeline.core.errors import DamagedStateError
from pipeline.rundir import FollowedJournal, Journal, journal, standing
from pipeline.rundir.records import Iteration, RolledBack, StageDone, StagePrepared, parse_record
from pipeline.store.checksums import packed

NAMES = ("canvas", "m", "v")
NUMBERS = {"objective": 2.5, "content_loss": 0.5, "style_loss": 2.0, "mean_abs_u": 0.2, "max_abs_u": 0.9}


def prepared(stage: int) -> StagePrepared:
    sums = {f"{name}_0": packed([stage]) for name in NAMES}
    sums |= {f"{name}_{slot}/zarr.json": packed([slot]) for name in NAMES for slot in (0, 1)}
    sums["zarr.json"] = packed([7])
    return StagePrepared(stage=stage, content_energies={}, checksums=sums)


def iteration(number: int, stage: int = 0) -> Iteration:
    sums = {f"{name}_{(number + 1) % 2}": packed([number]) for name in NAMES}
    return Iteration(stage=stage, iteration=number, alpha=0.5, stepped=True, seconds={}, checksums=sums, **NUMBERS)


RECORDS = [
    prepared(0),
    iteration(0),
    iteration(1),
    RolledBack(records=2),
    iteration(1),
    StageDone(stage=0, iterations=2, reason="converged"),
    prepared(1),
    RolledBack(records=1),
    iteration(0),
]


def test_every_record_is_read_once_and_means_what_it_does_in_the_whole(tmp_path, monkeypatch) -> None:
    """A viewer that read the whole journal at every iteration would slow down the run more and more."""
    path = tmp_path / "journal.jsonl"
    followed, writing = FollowedJournal(path), Journal(path)
    assert followed.standing() == standing(Journal(path))
    read: list[object] = []
    monkeypatch.setattr(journal, "parse_record", lambda data: read.append(data) or parse_record(data))
    for record in RECORDS:
        writing.append(record)
        found, reads = followed.standing(), len(read)
        assert followed.standing() == found == standing(Journal(path))
        assert reads == 1 + isinstance(record, RolledBack)
        read.clear()
    assert [repair.records for repair in followed.repairs] == [2, 1]


def test_a_line_that_is_being_written_is_read_when_it_is_whole(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    for record in RECORDS[:3]:
        Journal(path).append(record)
    data = path.read_bytes()
    cut = len(data) - 40
    path.write_bytes(data[:cut])
    followed = FollowedJournal(path)
    assert followed.standing()[1].iteration == 1
    path.write_bytes(data)
    assert followed.standing()[1].iteration == 2


@pytest.mark.parametrize("longer", [False, True])
def test_a_journal_that_was_changed_is_read_from_its_start(tmp_path, longer: bool) -> None:
    """After a repair, or when another run was begun there, the old records must not be shown."""
    path, other = tmp_path / "journal.jsonl", tmp_path / "other.jsonl"
    for record in RECORDS[:3]:
        Journal(path).append(record)
    followed = FollowedJournal(path)
    assert followed.standing()[1].iteration == 2
    for record in [prepared(0), iteration(0), *[iteration(1), iteration(2)][: 2 * longer], iteration(1)]:
        Journal(other).append(record.model_copy(update={"time": "later"}))
    path.write_bytes(other.read_bytes())
    assert followed.standing() == standing(Journal(path))


def test_damage_is_found_until_it_is_repaired(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    followed = FollowedJournal(path)
    for record in RECORDS[:3]:
        Journal(path).append(record)
    before, data = followed.standing(), path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    for _ in range(2):
        with pytest.raises(DamagedStateError, match=":1: this line"):
            followed.standing()
    path.write_bytes(data)
    assert followed.standing() == before
    path.write_bytes(data + data[-30:].replace(b"\n", b"") + b"}\n")
    with pytest.raises(DamagedStateError, match=":4: this line"):
        followed.standing()
