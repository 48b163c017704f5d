"""A run directory from a stranger: `status` and `export` end with one line that says what is wrong with it."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.config import load_config
from pipeline.core.errors import DamagedStateError
from pipeline.rundir import records
from pipeline.rundir.journal import Journal, standing
from pipeline.rundir.lock import running_owner
from pipeline.rundir.manifest import _manifest_text, read_manifest
from pipeline.store.checksums import checksum, packed
from tests.support.e2e import Outcome, write_journal, write_run

Json = dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The directory of a run that has ended."""
    import pipeline

    folder = tmp_path_factory.mktemp("finished")
    pipeline.run(load_config(write_run(folder)))
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it to be damaged."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def refused(call: Callable[..., Outcome], run: Path, *words: str) -> None:
    for command in (["status"], ["status", "--json"], ["export", "-o", run.parent / "x.png"]):
        outcome = call(*command, "--run", run)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (6, "", 1), outcome
        assert len(outcome.err) < 1500 and "\x1b" not in outcome.err
        for word in (str(run), *words):
            assert word in outcome.err, outcome.err
    assert not (run.parent / "x.png").exists()


def records_of(run: Path) -> list[Json]:
    return [json.loads(line)["record"] for line in (run / "journal.jsonl").read_text().splitlines()]


# --- files that are not records ---

DEEP = b'{"a":' * 200_000
FILES: dict[str, bytes] = {
    "nothing": b"",
    "half": b"{",
    "a list": b"[]",
    "a number": b"3",
    "not text": b"\xff\xfe\xff\xfe",
    "deep": b"[" * 200_000,
    "deep and whole": b'{"crc": "00000000", "record": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "long digits": b'{"format": ' + b"9" * 100_000 + b"}\n",
    "not a number": b'{"format": NaN}\n',
    "infinity": b'{"format": Infinity}\n',
    "words": b'{"format": "\\u001b[2J\\n\\n"}\n',
    "half a surrogate": b'{"format": "\\ud800"}\n',
    "a format of ours": b'{"format": 2}\n',
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("name", ["manifest.json", "journal.jsonl"])
def test_files_that_are_no_records(run, call, name, case):
    """`status` is the first command for a run from elsewhere: it must not fail on any content."""
    (run / name).write_bytes(FILES[case])
    if name == "journal.jsonl" and b"\n" not in FILES[case]:  # an incomplete last line was never committed
        outcome = call("status", "--run", run)
        assert (outcome.code, "stopped" in outcome.out) == (0, True), outcome
        return
    refused(call, run, name)


@pytest.mark.parametrize("name", ["manifest.json", "journal.jsonl"])
def test_files_beyond_any_size(run, call, name):
    """A sparse file costs its sender nothing, and would use all memory when read."""
    os.truncate(run / name, 2**40)
    refused(call, run, name, "more than any run writes")


@pytest.mark.parametrize("name", ["manifest.json", "journal.jsonl", "lock.owner"])
def test_pipes_are_not_waited_for(run, call, name):
    """`status` would hang forever."""
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    if name == "lock.owner":  # the owner is only one line of the output
        assert call("status", "--run", run).code == 0
    else:
        refused(call, run, name)


# --- intact files with other content ---


def set_at(data: Any, path: str, value: object) -> None:
    *parents, last = path.split("/")
    for part in parents:
        data = data[int(part) if isinstance(data, list) else part]
    data[int(last) if isinstance(data, list) else last] = value


WRONG: list[object] = [None, [], {}, "x", "\x1b[2J", True, -1, 10**30, 1.5, [[[]]], {"a": {"b": []}}]
PLACES = [
    "config", "config/output", "config/optimizer", "config/optimizer/max_iterations", "stages", "stages/0",
    "stages/0/size", "stages/1/size/0", "stages/0/style_sizes", "result_fields", "inputs", "created", "format",
]  # fmt: skip
FITS = {
    ("config/output", "x"), ("created", "x"), ("inputs", "{}"), ("result_fields", "{}"), ("stages/0/style_sizes", "[]"),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_manifests_with_other_things_in_them(run, call, place):
    """A wrong name or type would end in a traceback, or reach the terminal."""
    whole = json.loads((run / "manifest.json").read_bytes())
    whole.pop("crc")
    for value in WRONG:
        if (place, value if isinstance(value, str) else json.dumps(value)) in FITS:
            continue
        manifest = json.loads(json.dumps(whole))
        set_at(manifest, place, value)
        (run / "manifest.json").write_bytes(_manifest_text(manifest))
        with pytest.raises(DamagedStateError) as caught:
            read_manifest(run / "manifest.json")
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000
    refused(call, run, "manifest.json")


RECORD_PLACES = {
    "stage_prepared": ["type", "stage", "content_energies", "checksums", "checksums/canvas_0"],
    "iteration": [
        "type", "stage", "iteration", "stepped", "alpha", "mean_abs_u", "max_abs_u", "objective", "content_loss",
        "style_loss", "seconds", "seconds/gram", "checksums", "checksums/canvas_1",
    ],
    "begun": ["type", "manifest", "manifest/config", "manifest/stages", "manifest/created"],
    "stage_done": ["type", "stage", "reason"],
    "exporting": ["type", "output"],
    "exported": ["type", "output"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "place"), [(kind, place) for kind, places in RECORD_PLACES.items() for place in places]
)
def test_records_with_other_things_in_them(run, kind, place):
    """The same for the journal, whose records determine which files are read and deleted."""
    whole = records_of(run)
    index = next(index for index, record in enumerate(whole) if record["type"] == kind)
    for value in [*WRONG, math.pi]:
        record = json.loads(json.dumps(whole[index]))
        set_at(record, place, value)
        if fits(place, value):
            continue
        write_journal(run / "journal.jsonl", [*whole[:index], record, *whole[index + 1 :]])
        with pytest.raises(DamagedStateError) as caught:
            standing(Journal(run / "journal.jsonl"))
        assert str(run / "journal.jsonl") in str(caught.value)
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000


def fits(place: str, value: object) -> bool:
    """Whether this value of WRONG is valid in this field."""
    name = place.rpartition("/")[2]
    if name in ("alpha", "mean_abs_u", "max_abs_u", "objective", "content_loss", "style_loss", "gram"):
        return isinstance(value, int | float) or (name == "alpha" and value is None)
    if name == "stepped":
        return isinstance(value, bool)
    if name in ("reason", "output", "created"):
        return value == "x"
    if name.startswith("canvas"):
        return isinstance(value, str)
    return name in ("content_energies", "seconds", "checksums") and value == {}


def test_records_in_an_order_that_no_run_writes(run, call):
    """An iteration of a stage that was never prepared, or a stage that ended twice."""
    whole = records_of(run)
    for some in (whole[2:], [whole[2]], [*whole[:1], *whole[2:]], [whole[-3]], [{"type": "rolled_back"}], [{}]):
        write_journal(run / "journal.jsonl", some)
        if any(record.get("type") not in ("begun", "exporting", "exported") for record in some):
            refused(call, run, "journal.jsonl", "are not a run's")


def test_a_manifest_that_knows_fewer_stages_than_the_journal(run, call):
    """Manifest and journal are intact, but of two runs: reading them must not end in a traceback."""
    manifest = json.loads((run / "manifest.json").read_bytes())
    del manifest["crc"], manifest["stages"][1:]
    (run / "manifest.json").write_bytes(_manifest_text(manifest))
    refused(call, run)
    write_journal(run / "journal.jsonl", [{**records_of(run)[0], "manifest": manifest}, *records_of(run)[1:]])
    refused(call, run)
    for command in (["status"], ["verify"], ["verify", "--repair"]):
        outcome = call(*command, "--run", run)
        assert (outcome.code, outcome.err.count("\n")) == (6, 1), outcome
        assert "the manifest beside it has stages 1 to 1 only" in outcome.err


METADATA: dict[str, Callable[[Json], Any]] = {
    "nothing": lambda old: None,
    "another shape": lambda old: old.update(shape=[1_000_000, 1_000_000, 3]),
    "no picture": lambda old: old.update(shape=[52, 70]),
    "giant chunks": lambda old: old["chunk_grid"]["configuration"].update(chunk_shape=[10**6, 10**6, 3]),
    "chunks of nothing": lambda old: old["chunk_grid"]["configuration"].update(chunk_shape=[0, 0, 3]),
    "chunks of another shape": lambda old: old["chunk_grid"]["configuration"].update(chunk_shape=[16, 16, 3]),
    "words": lambda old: old.update(data_type="string", fill_value="", codecs=[{"name": "vlen-utf8"}]),
    "other numbers": lambda old: old.update(data_type="complex128", fill_value=[0, 0]),
    "an unknown codec": lambda old: old.update(codecs=[{"name": "\x1b[2J\nevil"}]),
    "an older format": lambda old: old.update(zarr_format=2),
    "deep": lambda old: "[" * 100_000,
    "long": lambda old: " " * (2**20 + 1),
    "text": lambda old: "soup",
}


@pytest.mark.parametrize("case", METADATA)
def test_arrays_that_are_no_canvas(run, call, case):
    """The metadata of an array determines the memory of a chunk, and its decompressor."""
    canvas = next((run / "store.zarr" / "stage_1").glob("canvas_*"))
    data = json.loads((canvas / "zarr.json").read_text())
    text = METADATA[case](data)
    (canvas / "zarr.json").write_text(text if isinstance(text, str) else json.dumps(data))
    forged = records_of(run)
    for record in forged:
        if f"{canvas.name}/zarr.json" in record.get("checksums", {}):
            record["checksums"][f"{canvas.name}/zarr.json"] = packed([checksum((canvas / "zarr.json").read_bytes())])
    write_journal(run / "journal.jsonl", forged)
    (canvas / ".zarray").write_text(json.dumps({"zarr_format": 2, "filters": [{"id": "pickle"}]}))
    outcome = call("export", "--run", run, "-o", run.parent / "x.png")
    if case == "nothing":
        assert outcome.code == 0, outcome
    else:
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (6, "", 1), outcome
        assert "zarr.json" in outcome.err or "/c/0/0/0" in outcome.err, outcome.err
        assert "\x1b" not in outcome.err
    assert call("status", "--run", run).code == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_record_is_refused_or_known(run, finished, data):
    """Whatever the journal holds, it is read in full or refused in one line."""
    whole = records_of(finished)
    index = data.draw(st.integers(0, len(whole) - 1))
    record = json.loads(json.dumps(whole[index]))
    for _ in range(data.draw(st.integers(1, 3))):
        record[data.draw(st.sampled_from(sorted(record)) | st.text(max_size=5))] = data.draw(JSON)
    write_journal(run / "journal.jsonl", [*whole[:index], record, *whole[index + 1 :]])
    try:
        standing(Journal(run / "journal.jsonl"))
    except DamagedStateError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "[" * 900, "x" * 1001),
        *('{"pid": 1e99, "started": 0}', '{"pid": -1, "started": 0}', '{"pid": true}', '{"pid": "1", "started": 0}'),
        *('{"pid": 1}', '{"pid": 1, "started": "x"}', '{"pid": 99999999999999999999, "started": 0}'),
    ],
)
def test_an_owner_that_is_none(run, text):
    """The owner file is optional: an unreadable one means that no run is active."""
    (run / "lock.owner").write_text(text)
    assert running_owner(run) is None


def test_every_record_of_a_run_is_known(finished):
    """A type of record that this test does not cover could make every run that writes it unreadable."""
    kinds = {record["type"] for record in records_of(finished)}
    assert kinds == {"begun", "stage_prepared", "iteration", "stage_done", "exporting", "exported"}
    for record in records_of(finished):
        records.parse_record(record)
