"""Journal, position, manifest and lock: committed records are read back, damage is detected, one run has the lock."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core.errors import DamagedStateError, LockedError, StorageError
from pipeline.rundir import lock as lock_module
from pipeline.rundir.journal import Journal, JournalState, standing
from pipeline.rundir.lock import RunLock, running_owner
from pipeline.rundir.manifest import OtherFormatError, _manifest_text, read_manifest, trusted_manifest, write_manifest
from pipeline.rundir.position import Position, effective, position_of
from pipeline.rundir.records import (
    FORMAT,
    VERSION,
    Begun,
    CanvasLost,
    Cleaned,
    Exported,
    Exporting,
    Iteration,
    KeptConfig,
    Manifest,
    OtherVersionError,
    Pass,
    Record,
    RolledBack,
    SmallerTile,
    StageAdded,
    StageDone,
    StagePrepared,
    WrittenPicture,
    as_json,
    parse_record,
)

SAME_FOLDER = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
PICTURE = WrittenPicture(size_bytes=3, modified_ns=10**18, sha256="0" * 64)
LOSSES = {"objective": 2.5, "content_loss": 0.5, "style_loss": 2.0, "seconds": {"gram": 0.1}}


def written_by(number: int) -> dict:
    """Checksums of an iteration's arrays; their values do not matter here."""
    return {f"{name}_{(number + 1) % 2}": f"{name} after {number}" for name in ("canvas", "m", "v")}


def iteration(number: int, stage: int = 0, **values) -> Iteration:
    base = {"alpha": 0.5, "mean_abs_u": 0.2, "max_abs_u": 0.9, "stepped": True, "checksums": written_by(number)}
    return Iteration(stage=stage, iteration=number, **(LOSSES | base | values))


def prepared(stage: int) -> StagePrepared:
    sums = {name: name for name in ("canvas_0", "m_0", "v_0", "gram_conv1_1", "zarr.json")}
    sums |= {f"{name}_{slot}/zarr.json": "meta" for name in ("canvas", "m", "v") for slot in (0, 1)}
    return StagePrepared(stage=stage, content_energies={"conv4_2": 1.5 + stage}, checksums=sums)


def done(stage: int, iterations: int = 1) -> StageDone:
    return StageDone(stage=stage, iterations=iterations, reason="converged")


RECORDS = [prepared(0), iteration(0, alpha=1e-05, layer_losses={"harbour é 港": 0.1}), done(0)]

numbers = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=9)
sides = st.integers(1, 10**6)
stages = st.integers(0, 63)
sums = st.dictionaries(st.sampled_from(["canvas_0", "m_1", "zarr.json", "v_0/zarr.json"]), st.text(max_size=9))
losses = st.dictionaries(texts, numbers, max_size=3)
pictures = st.builds(
    WrittenPicture,
    size_bytes=st.integers(0, 2**62),
    modified_ns=st.integers(0, 2**62),
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
)
some_records = st.one_of(
    st.builds(
        StagePrepared, time=texts, stage=stages, tile_px=st.none() | sides, content_energies=losses, checksums=sums
    ),
    st.builds(
        Iteration,
        stage=stages,
        iteration=st.integers(0, 10**5),
        objective=numbers,
        content_loss=numbers,
        style_loss=numbers,
        layer_losses=losses,
        mean_abs_u=numbers,
        max_abs_u=numbers,
        alpha=st.none() | numbers,
        seconds=losses,
        busy=losses,
        stepped=st.booleans(),
        checksums=sums,
    ),
    st.builds(StageDone, stage=stages, iterations=st.integers(0, 10**5), reason=texts),
    st.builds(SmallerTile, tile_px=sides),
    st.builds(Exporting, output=texts, picture=st.none() | pictures),
    st.builds(Exported, output=texts, options=st.just({"bits": 8, "quality": None}), picture=pictures),
    st.builds(CanvasLost, stage=stages),
)


def written(path: Path, some=RECORDS) -> Journal:
    path.unlink(missing_ok=True)
    journal = Journal(path)
    for record in some:
        journal.append(record)
    return journal


# --- reading what was written ---


def test_no_journal_is_an_empty_one(tmp_path):
    """A run killed before its first record starts from the beginning."""
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.read() == []
    journal.repair_tail()
    assert not (tmp_path / "journal.jsonl").exists()


@given(st.lists(some_records, max_size=4))
@settings(SAME_FOLDER, max_examples=80)
def test_records_are_read_back_as_written(tmp_path, some):
    """Losses, step sizes and slots determine the resume; floats must be read back to the last bit."""
    assert written(tmp_path / "journal.jsonl", some).read() == some


def test_values_that_json_has_not_are_refused_and_leave_the_journal_whole(tmp_path):
    """A NaN loss would make a journal that other JSON readers cannot read."""
    journal = written(tmp_path / "journal.jsonl")
    with pytest.raises(ValueError, match="finite number"):
        iteration(1, objective=float("nan"))
    with pytest.raises(ValueError, match="JSON compliant"):  # also if validation is bypassed
        journal.append(iteration(1).model_copy(update={"objective": float("nan")}))
    assert journal.read() == RECORDS


def test_lines_are_plain_json(tmp_path):
    """Users read the journal with their own tools."""
    journal = written(tmp_path / "journal.jsonl")
    lines = journal.path.read_text().splitlines()
    assert [json.loads(line)["record"] for line in lines] == [as_json(record) for record in RECORDS]


# --- torn and damaged lines ---


@given(st.data())
@SAME_FOLDER
def test_a_torn_last_line_is_dropped_and_repaired(tmp_path, data):
    """A kill in the middle of a commit costs that iteration, not the run."""
    path = tmp_path / "journal.jsonl"
    journal = written(path)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    path.write_bytes(whole[: data.draw(st.integers(last, len(whole) - 1), label="cut after")])
    assert journal.read() == RECORDS[:-1]
    assert path.stat().st_size >= last  # reading repairs nothing: `status` reads while a run appends
    journal.repair_tail()
    assert path.read_bytes() == whole[:last]
    journal.append(RECORDS[-1])
    assert path.read_bytes() == whole


def test_a_tail_of_zeros_is_dropped(tmp_path):
    """Some file systems leave zeros in place of the last line after a power cut."""
    journal = written(tmp_path / "journal.jsonl")
    with journal.path.open("ab") as file:
        file.write(bytes(200))
    assert journal.read() == RECORDS
    journal.repair_tail()
    journal.append(RECORDS[0])
    assert journal.read() == [*RECORDS, RECORDS[0]]


@given(st.data())
@SAME_FOLDER
def test_a_last_line_without_some_of_its_sectors_is_dropped(tmp_path, data):
    """A disk writes sectors in any order: a power cut during a long record would be reported as damage."""
    path = tmp_path / "journal.jsonl"
    long = iteration(1, checksums={"m_0": "A" * data.draw(st.integers(0, 3000), label="length")})
    last = len(written(path).path.read_bytes())
    whole = written(path, [*RECORDS, long]).path.read_bytes()
    sectors = range(last // 512, -(-len(whole) // 512))
    lost = data.draw(st.sets(st.sampled_from(sectors), min_size=1), label="lost")
    torn = bytearray(whole)
    for sector in lost:
        for position in range(max(last, sector * 512), min(len(whole), sector * 512 + 512)):
            torn[position] = 0
    path.write_bytes(torn)
    journal = Journal(path)
    assert journal.read() == RECORDS
    journal.repair_tail()
    journal.append(long)
    assert path.read_bytes() == whole


@given(st.data())
@settings(SAME_FOLDER, max_examples=200)
def test_a_changed_byte_in_a_committed_line_is_damage(tmp_path, data):
    """A wrong or silently missing record would resume from the wrong slot and render a wrong image."""
    path = tmp_path / "journal.jsonl"
    journal = written(path)
    whole = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(whole) - 1), label="position")
    value = data.draw(st.integers(0, 255).filter(lambda value: value != whole[position]), label="value")
    whole[position] = value
    path.write_bytes(whole)
    with pytest.raises(DamagedStateError, match=r"journal\.jsonl:\d+: .*--repair"):
        journal.read()
    with pytest.raises(DamagedStateError):
        journal.repair_tail()
    assert path.read_bytes() == whole


def test_every_newline_and_space_is_guarded(tmp_path):
    """The same for bytes that JSON ignores."""
    path = tmp_path / "journal.jsonl"
    journal = written(path)
    whole = path.read_bytes()
    for position, byte in enumerate(whole):
        if byte in b" \n":
            for other in b" \n\t\rx":
                if other != byte:
                    path.write_bytes(whole[:position] + bytes([other]) + whole[position + 1 :])
                    with pytest.raises(DamagedStateError):
                        journal.read()


@pytest.mark.parametrize("lines", [[0, 2], [1, 2], [1, 0, 2], [0, 1, 1, 2], [2]])
def test_whole_lines_missing_or_moved_are_damage(tmp_path, lines):
    """Removing a line from the middle would make the run resume from the wrong slot."""
    path = tmp_path / "journal.jsonl"
    journal = written(path)
    all_lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(all_lines[index] for index in lines))
    with pytest.raises(DamagedStateError, match="--repair"):
        journal.read()
    good = list(itertools.takewhile(lambda pair: pair[0] == pair[1], enumerate(lines)))
    good_bytes = sum(len(all_lines[index]) for index, _ in good)
    assert journal.inspect() == JournalState(RECORDS[: len(good)], good_bytes, len(good) + 1, torn=False)


def test_what_follows_damage_is_set_aside_not_thrown_away(tmp_path):
    """The records after one bad sector must not be deleted: they may still be of use."""
    path = tmp_path / "journal.jsonl"
    journal = written(path)
    first, second, third = path.read_bytes().splitlines(keepends=True)
    for number in (1, 2):
        bad = second.replace(b"e", b"E")
        path.write_bytes(first + bad + third)
        aside = journal.set_damage_aside()
        assert aside == tmp_path / f"journal.jsonl.damaged-{number}" and aside.read_bytes() == bad + third
        assert path.read_bytes() == first
        journal.append(RECORDS[1])
        assert path.read_bytes() == first + second


def test_a_torn_line_is_no_damage_when_a_journal_is_inspected(tmp_path):
    """A crash would be reported as a failing disk."""
    path = tmp_path / "journal.jsonl"
    journal = written(path)
    assert journal.inspect() == JournalState(RECORDS, path.stat().st_size, None, torn=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    *committed, _last = RECORDS
    state = journal.inspect()
    assert (state.records, state.damaged_line, state.torn) == (committed, None, True)


def test_last_lines_missing_are_an_earlier_position(tmp_path):
    """A known limit: only the checksums of the chunks distinguish a lost record from one never written."""
    path = tmp_path / "journal.jsonl"
    journal = written(path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert journal.read() == RECORDS[:2]


def test_what_a_repair_took_back_is_gone_but_for_claims(tmp_path):
    """After a rollback, the run must still recognise its output images."""
    claim = Exporting(output="/a.png", picture=PICTURE)
    some = [prepared(0), iteration(0), claim, iteration(1), RolledBack(records=1), iteration(0)]
    journal = written(tmp_path / "journal.jsonl", some)
    assert journal.read() == [prepared(0), claim, iteration(0)]
    lost = CanvasLost(stage=0)
    journal.append(lost)
    journal.append(RolledBack(records=0))
    assert journal.read() == [claim, lost]


def test_a_lost_canvas_has_no_slot_until_its_stage_is_rendered_again(tmp_path):
    """`export --stage` would offer a lost canvas, or refuse one that was rendered again."""
    some = [prepared(0), iteration(0), done(0), prepared(1)]
    lost = CanvasLost(stage=0)
    position = position_of([*some, lost])
    assert position.slots == {1: 0} and set(position.checksums) == {1}
    assert position_of([lost, prepared(0)]) == position_of([prepared(0)])


def test_an_append_that_fails_leaves_no_half_line(tmp_path):
    """A full disk must not make the journal unreadable: the run resumes once there is space."""
    journal = written(tmp_path / "journal.jsonl")
    before = journal.path.read_bytes()
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from pipeline.core.errors import SpaceError\n"
        "from pipeline.rundir.journal import Journal\n"
        "from pipeline.rundir.records import Exporting\n"
        "path = Path(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20,) * 2)\n"
        "try:\n"
        "    Journal(path).append(Exporting(output='x' * 100))\n"
        "except SpaceError as error:\n"
        "    print('refused', error)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(journal.path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert out.stdout.startswith("refused") and str(journal.path) in out.stdout
    assert journal.path.read_bytes() == before


def test_a_journal_that_cannot_be_written_says_so(tmp_path):
    """A full disk and missing permissions end in a sentence, not in a traceback."""
    with pytest.raises(StorageError, match=r"journal\.jsonl"):
        Journal(tmp_path / "gone" / "journal.jsonl").append(Exporting(output="x"))


# --- the position that records describe ---


def test_an_empty_journal_is_the_start():
    """Nothing is committed, so the run starts from the beginning."""
    assert position_of([]) == Position()
    assert (Position().stage, Position().prepared, Position().iteration) == (0, False, 0)


def test_a_prepared_stage_starts_at_slot_0():
    """The first iteration reads slot 0, where the preparation wrote the canvas."""
    position = position_of([prepared(0)])
    assert position.prepared and position.iteration == 0 and not position.stage_done
    assert position.slots == {0: 0}
    assert position.content_energies == {"conv4_2": 1.5}
    assert position.alpha is position.mean_abs_u is None


@given(st.integers(1, 9))
def test_slots_alternate_with_the_iterations(count):
    """Reading the wrong slot would resume from an older or half-written canvas."""
    some = [prepared(0), *(iteration(number, alpha=0.25, mean_abs_u=1 / (number + 1)) for number in range(count))]
    position = position_of(some)
    assert position.iteration == count
    assert position.slots == {0: count % 2}
    assert position.alpha == 0.25 and position.mean_abs_u == 1 / count


def test_checksums_are_those_of_what_was_written_last():
    """Comparing a chunk with the checksum of another iteration would report false damage, or miss damage."""
    position = position_of([prepared(0), iteration(0), iteration(1)])
    sums = position.checksums[0]
    assert sums["canvas_0"] == "canvas after 1" and sums["m_1"] == "m after 0" and sums["gram_conv1_1"]
    ended = position.after(done(0, 2))
    assert ended.checksums[0] == {"canvas_0": "canvas after 1", "canvas_0/zarr.json": "meta", "zarr.json": "zarr.json"}
    assert ended.after(prepared(1)).checksums[0] == ended.checksums[0]


def test_an_iteration_that_made_no_step_leaves_the_slot():
    """An iteration that makes no step does not write the other slot, which still holds zeros."""
    position = position_of([prepared(0), iteration(0, stepped=False, max_abs_u=0.0, mean_abs_u=0.0, alpha=0.0)])
    assert position.slots == {0: 0} and position.iteration == 0 and position.max_abs_u == 0


def test_the_next_stage_forgets_step_size_and_moments_but_not_canvases():
    """α starts again at every stage, and the canvas of the stage before is still needed."""
    some = [prepared(0), iteration(0), done(0)]
    ended = position_of(some)
    assert ended.stage_done and ended.slots == {0: 1}
    following = position_of([*some, prepared(1)])
    assert (following.stage, following.iteration, following.alpha, following.stage_done) == (1, 0, None, False)
    assert following.max_abs_u is None and following.mean_abs_u is None
    assert following.slots == {0: 1, 1: 0}
    assert following.content_energies == {"conv4_2": 2.5}


def test_exported_pictures_are_remembered_across_stages():
    """A finished run must not render again, nor overwrite an image that it did not write."""
    other = PICTURE.model_copy(update={"size_bytes": 4})
    some = [
        prepared(0),
        Exported(output="/a.png", options={"bits": 8}, picture=PICTURE),
        prepared(1),
        Exporting(output="/a.png", picture=other),
        Exported(output="/b.tif", picture=PICTURE),
    ]
    assert set(position_of(some).exported) == {"/a.png", "/b.tif"}
    # and the image before it, which a kill before the rename leaves in place
    assert position_of(some).pictures == {"/a.png": (PICTURE, other), "/b.tif": (PICTURE,)}


def test_a_picture_is_known_before_it_has_its_name():
    """A kill between the rename and the record leaves an image that the next start must recognise as its own."""
    position = position_of([prepared(0), Exporting(output="/a.png", picture=PICTURE)])
    assert position.pictures == {"/a.png": (PICTURE,)} and not position.exported


def test_an_added_stage_stays_after_a_rollback_and_its_image_is_to_be_exported():
    """A repair would forget what the user asked for, or the run would leave the picture of before in its place."""
    ended = [prepared(0), iteration(0), done(0), Exported(output="/a.png", options={}, picture=PICTURE)]
    added = position_of([*ended, StageAdded(iterations=5)])
    assert (added.added, added.exported, added.stage_done) == ((5,), {}, True)
    assert added.pictures == {"/a.png": (PICTURE,)}  # which the run may overwrite
    rolled_back = position_of(effective([*ended, StageAdded(iterations=5), prepared(1), RolledBack(records=1)]))
    assert (rolled_back.stage, rolled_back.stage_done, rolled_back.added) == (0, False, (5,))
    assert position_of([*ended, StageAdded(iterations=5), prepared(1)]).added == (5,)


def test_a_run_without_state_still_knows_its_images():
    """A cleaned run would render again over its own picture, or refuse it as a stranger's."""
    ended = [prepared(0), iteration(0), done(0), Exported(output="/a.png", options={}, picture=PICTURE)]
    cleaned = position_of([*ended, Cleaned()])
    assert cleaned.is_fixed and not cleaned.slots and cleaned.results == (PICTURE,)


# --- records of other versions ---

OLD = [
    {"type": "stage_prepared", "stage": 0, "content_energies": {"conv4_2": 12}, "checksums": prepared(0).checksums},
    {
        **{"type": "iteration", "stage": 0, "iteration": 0, "alpha": 0.5, "mean_abs_u": 0.2, "max_abs_u": 0.9},
        **{"stepped": True, "checksums": written_by(0), "time": "2026-01-01T00:00:00+00:00", "note": "of its time"},
        **LOSSES,
    },
    {"type": "exporting", "output": "/a.png"},
    {"type": "exported", "output": "/a.png", "options": {"bits": 8}},
]


def test_old_journals_are_understood():
    """A run that is older than versions of records would have to be rendered again."""
    first, second, *pictures = map(parse_record, OLD)
    assert first == prepared(0).model_copy(update={"content_energies": {"conv4_2": 12.0}})
    assert second == iteration(0, time="2026-01-01T00:00:00+00:00")
    position = position_of([first, second, *pictures])
    assert position.pictures == {"/a.png": (None,)}
    position = position.after(Exporting(output="/a.png", picture=PICTURE))
    assert position.pictures == {"/a.png": (None, PICTURE)}  # before the rename, the old image is still there
    assert position.after(Exported(output="/a.png", picture=PICTURE)).pictures == {"/a.png": (PICTURE,)}


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"seconds": {"gram": "0.1"}},
            {"seconds": {"gram": True}},
            {"stepped": 1},
            {"stage": "0"},
            {"iteration": 0.0},
        ),
        *({"alpha": "0.5"}, {"objective": None}, {"checksums": {"../x": ""}}, {"busy": [1]}, {"time": 3}),
        *({"note": "of a version that is not there"}, {"version": "1"}, {"version": 0}, {"version": None}),
    ],
)
def test_records_are_strict(change):
    """`status` and a resume would compute with values of a wrong type or meaning."""
    data = as_json(iteration(0))
    assert parse_record(data) == iteration(0)
    with pytest.raises(ValueError, match=next(iter(change))):
        parse_record(data | change)


def test_a_stage_prepared_by_version_1_starts_afresh():
    """Runs from before `optimizer.carry` could no longer resume."""
    new = as_json(prepared(0))
    old = {name: value for name, value in new.items() if name not in ("alpha", "adam_steps", "carries")}
    record = parse_record({**old, "version": 1})
    assert position_of([record]) == position_of([prepared(0)])
    assert (position_of([record]).alpha, position_of([record]).carrying) == (None, frozenset())


def test_old_records_are_strict_too():
    """`"seconds": {"gram": "0.1"}` passed, and `status` ended in a TypeError."""
    with pytest.raises(ValueError, match=r"seconds\.gram"):
        parse_record(OLD[1] | {"seconds": {"gram": "0.1"}})


def test_the_names_on_disk_are_those_of_the_schema():
    """Renaming a variable must not change the names in the journal, which are fixed."""
    both, losses = "type version time stage", "objective content_loss style_loss layer_losses"
    names = (
        (
            iteration(0),
            f"{both} iteration {losses} mean_abs_u max_abs_u alpha seconds busy stepped checksums remaining_s",
        ),
        (prepared(0), f"{both} tile_px content_energies areas checksums alpha adam_steps carries"),
        (
            Pass(stage=0, iteration=0, seconds={}),
            f"{both} iteration network norm mean variance seconds busy checksums remaining_s",
        ),
        (done(0), f"{both} iterations reason"),
        (Exported(output="x"), "type version time output options picture"),
        (StageAdded(iterations=1), "type version time iterations"),
        (Cleaned(), "type version time"),
    )
    for record, fields in names:
        assert sorted(as_json(record)) == sorted(fields.split())
    assert VERSION == 4  # adding or removing a field takes a new version


def test_records_of_a_later_version_are_named_as_such(tmp_path):
    """They are not damage, whose remedy would be to delete the run."""
    journal = written(tmp_path / "journal.jsonl", [prepared(0)])
    later = iteration(0).model_copy(update={"version": VERSION + 1})
    journal.append(later)
    for read in (journal.read, journal.inspect, lambda: standing(journal)):
        with pytest.raises(DamagedStateError, match=f"version {VERSION + 1}.*later version of pipeline"):
            read()
    with pytest.raises(OtherVersionError):  # the first difference of a later version is an unknown type
        parse_record({"type": "color_matched", "version": VERSION + 1, "stage": 1})
    manifest = {**MANIFEST_JSON, "version": VERSION + 1, "palette": "warm"}
    (tmp_path / "manifest.json").write_bytes(_manifest_text(manifest))
    with pytest.raises(OtherFormatError, match=f"version {VERSION + 1}.*later version of pipeline"):
        read_manifest(tmp_path / "manifest.json")


# --- the manifest ---

MANIFEST = Manifest(
    format=FORMAT,
    created="now",
    config=KeptConfig.model_validate({"size": 3, "name": "é", "output": "/o.tif", "optimizer": {"max_iterations": 2}}),
    stages=[{"size": [3, 2], "style_sizes": [[1, 1]]}],
    threads=2,
    result_fields={"loss.content_weight": 0.05, "size": 3, "optimizer.clip": True, "init": "noise", "styles.0": None},
    inputs={},
)
MANIFEST_JSON = MANIFEST.model_dump(mode="json")


def test_the_manifest_is_read_back_and_leaves_nothing_beside_it(tmp_path):
    """Resume compares the config with it."""
    write_manifest(tmp_path / "manifest.json", MANIFEST)
    manifest = read_manifest(tmp_path / "manifest.json")
    assert manifest == MANIFEST and manifest.config.model_dump()["name"] == "é"
    assert manifest.result_fields["optimizer.clip"] is True and type(manifest.result_fields["size"]) is int
    other = MANIFEST.model_copy(update={"inputs": {"content": "0" * 64}})
    write_manifest(tmp_path / "manifest.json", other)
    assert read_manifest(tmp_path / "manifest.json") == other
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_older_manifests_are_understood(tmp_path):
    """A manifest that is older than `content` and the stages' `max_iterations`."""
    old = {key: value for key, value in MANIFEST_JSON.items() if key not in ("content", "version")}
    old["stages"] = [{"size": [3, 2], "style_sizes": [[1, 1]]}]
    (tmp_path / "manifest.json").write_bytes(_manifest_text(old))
    assert read_manifest(tmp_path / "manifest.json") == MANIFEST


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"config": {}}'])
def test_a_broken_manifest_is_damage(tmp_path, content):
    """Without the manifest, the config of the state is unknown."""
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedStateError, match=r"manifest\.json"):
        read_manifest(tmp_path / "manifest.json")


@given(st.data())
@settings(SAME_FOLDER, max_examples=100)
def test_a_changed_byte_of_the_manifest_is_damage(tmp_path, data):
    """A flipped digit in the stored config would refuse the right config, or accept a wrong one."""
    path = tmp_path / "manifest.json"
    write_manifest(path, MANIFEST)
    whole = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(whole) - 1))
    whole[position] = data.draw(st.integers(0, 255).filter(lambda value: value != whole[position]))
    path.write_bytes(whole)
    with pytest.raises(DamagedStateError, match=r"manifest\.json"):
        read_manifest(path)


def test_a_flipped_format_number_is_damage_not_another_version(tmp_path):
    """The remedy for a run of another version is to delete it, which a damaged run does not deserve."""
    path = tmp_path / "manifest.json"
    write_manifest(path, MANIFEST)
    path.write_text(path.read_text().replace(f'"format": {FORMAT}', f'"format": {FORMAT ^ 1}'))
    with pytest.raises(DamagedStateError, match="changed after it was written"):
        read_manifest(path)


def test_a_manifest_of_another_run_is_not_trusted(tmp_path):
    """An intact manifest of another run would be compared instead, and two images be mixed."""
    path = tmp_path / "manifest.json"
    write_manifest(path, MANIFEST)
    before = MANIFEST.model_copy(update={"created": "before"})
    begun: list[Record] = [Begun(manifest=before), Begun(manifest=MANIFEST)]
    assert parse_record(as_json(begun[1])) == begun[1]
    assert trusted_manifest(path, begun) == MANIFEST
    for records in ([], begun[:1]):
        with pytest.raises(DamagedStateError, match=r"another run.*--repair"):
            trusted_manifest(path, records)


def test_a_missing_manifest_is_damage(tmp_path):
    """The same without a manifest."""
    with pytest.raises(DamagedStateError, match=r"manifest\.json"):
        read_manifest(tmp_path / "manifest.json")


def test_a_manifest_of_another_format_is_refused_by_number(tmp_path):
    """A newer version must not misread an old run, nor an old version a new one."""
    (tmp_path / "manifest.json").write_bytes(_manifest_text({"format": FORMAT + 1}))
    with pytest.raises(OtherFormatError, match=f"format {FORMAT + 1}.*format {FORMAT}"):
        read_manifest(tmp_path / "manifest.json")


# --- the lock ---

HOLD = """
import sys
import threading
from pathlib import Path
from pipeline.rundir.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate(timeout=30)


def test_a_second_run_in_another_process_is_kept_out(tmp_path, holder):
    """Two runs in one folder would write into each other's slots and destroy both."""
    with pytest.raises(LockedError, match=f"process {holder.pid}") as caught, RunLock(tmp_path):
        pass
    assert str(tmp_path) in str(caught.value)
    assert running_owner(tmp_path) == holder.pid  # a refused start leaves the owner's file unchanged


def test_a_second_lock_in_the_same_process_is_kept_out(tmp_path):
    """The library may be called twice at once from one program."""
    with RunLock(tmp_path):
        with pytest.raises(LockedError), RunLock(tmp_path):
            pass
        assert running_owner(tmp_path) == os.getpid()
    assert running_owner(tmp_path) is None
    with RunLock(tmp_path):
        pass


def test_a_lock_is_free_after_its_owner_ends(tmp_path, holder):
    """The next run must not wait for one that is over."""
    holder.communicate("", timeout=30)
    assert running_owner(tmp_path) is None
    with RunLock(tmp_path):
        assert running_owner(tmp_path) == os.getpid()


def test_a_lock_is_free_after_its_owner_was_killed(tmp_path, holder):
    """After kill -9 the same command resumes; no stale lock has to be deleted."""
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=30)
    assert (tmp_path / "lock.owner").exists()
    assert running_owner(tmp_path) is None
    with RunLock(tmp_path):
        assert running_owner(tmp_path) == os.getpid()


HOLD_WITH_WORKER = """
import subprocess, sys
from pathlib import Path
from pipeline.rundir.lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    worker = subprocess.Popen(["sleep", "600"], pass_fds=[lock.descriptor], stdout=subprocess.DEVNULL)
    print(worker.pid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def worker_left(tmp_path):
    """The id of a process that a killed run has left behind, and that inherited its lock."""
    run = subprocess.Popen([sys.executable, "-c", HOLD_WITH_WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    run.kill()
    run.communicate(timeout=30)
    yield worker
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)


def test_a_lock_is_not_free_while_a_worker_of_its_owner_lives(tmp_path, worker_left, monkeypatch):
    """A worker that outlives a killed run would write chunks of an old iteration into the resumed run."""
    monkeypatch.setattr(lock_module, "_LEFT_BEHIND_S", 0.3)
    with pytest.raises(LockedError, match="worker processes of a run that was killed have not ended"):
        RunLock(tmp_path).__enter__()
    os.kill(worker_left, signal.SIGKILL)
    with RunLock(tmp_path):
        pass


def test_a_start_waits_for_the_workers_of_a_killed_run(tmp_path, worker_left):
    """The system takes a moment to end them; a start meanwhile has to wait, not to fail."""
    threading.Timer(0.3, os.kill, (worker_left, signal.SIGKILL)).start()
    with RunLock(tmp_path):
        assert running_owner(tmp_path) == os.getpid()


def test_a_reused_process_id_is_not_the_owner(tmp_path):
    """Process ids are reused: another process with the owner's old id is not the run."""
    (tmp_path / "lock.owner").write_text(json.dumps({"pid": os.getpid(), "started": 1.0}))
    assert running_owner(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}', '{"pid": -1, "started": 0}', "null"])
def test_a_broken_owner_file_is_nobody(tmp_path, text):
    """`status` must work whatever a crash left there."""
    (tmp_path / "lock.owner").write_text(text)
    assert running_owner(tmp_path) is None


def test_a_manifest_with_parts_missing_is_damage(tmp_path):
    """A traceback does not say that a file of the run was emptied."""
    for key in MANIFEST_JSON.keys() - {"format", "content", "version", "dpi", "command"}:
        text = _manifest_text({name: value for name, value in MANIFEST_JSON.items() if name != key})
        (tmp_path / "manifest.json").write_bytes(text)
        with pytest.raises(DamagedStateError, match=key):
            read_manifest(tmp_path / "manifest.json")
