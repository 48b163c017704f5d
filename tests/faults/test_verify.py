"""Damage is found and named, never rendered, and mended as far as it can be: `pipeline verify`, and a resume."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.commands.verify.verify import Report
from pipeline.core.errors import ConfigError, DamagedStateError, LockedError, Stopped
from pipeline.rundir.journal import Journal
from pipeline.rundir.lock import RunLock
from pipeline.rundir.manifest import _manifest_text
from pipeline.rundir.records import FORMAT, Iteration, StagePrepared
from pipeline.store.checksums import packed, unpacked
from tests.support import rot
from tests.support.e2e import journal, make_call, write_config, write_journal
from tests.support.rot import FINISHED, ITERATIONS, RUN, STATES, Base, flip

Json = dict[str, Any]

MID = "after an iteration"  # stage 2, three iterations done, the other slot whole
UPDATE = "in an update"  # the other slot half overwritten


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """A run that was left alone, uncompressed and compressed; tools/torture/rot.py has all variants."""
    variants = ("none", "lz4", "rich")
    return {variant: rot.make_base(tmp_path_factory.mktemp(variant), variant) for variant in variants}


@pytest.fixture
def base(bases: dict[str, Base]) -> Base:
    return bases["none"]


@pytest.fixture
def call(capfd, monkeypatch):
    return make_call(capfd, monkeypatch)


def flip_in(base: Base, name: str) -> Path:
    """Flip one bit of a file of the store."""
    path = base.work_dir / "store.zarr" / name
    flip(base, path, random.Random(name))
    return path


def newest(base: Base, name: str) -> str:
    """The first chunk of `name` of the newest slot of stage 2."""
    iterations = [record for record in Journal(base.work_dir / "journal.jsonl").read() if isinstance(record, Iteration)]
    return f"stage_2/{name}_{(iterations[-1].iteration + 1) % 2}/c/0/0/0"


def mended(base: Base) -> Report:
    """Repair; the run must then be clean, and end as it would have without damage."""
    report = pipeline.verify(base.work_dir, repair=True)
    assert report.clean, [str(problem) for problem in report.remaining]
    assert pipeline.verify(base.work_dir).found == ()
    pipeline.run(pipeline.load_config(base.config))
    assert base.differences() == []
    return report


# --- random damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["none", "lz4", "rich"])
def test_no_random_damage_goes_unseen_and_all_is_mended(bases, variant):
    """A bit that rots, a file that goes, a write that was lost would get into the picture without a word."""
    trials = []
    for seed in range(42):
        state = [*STATES, FINISHED][seed % 7]
        trial = rot.try_fault(bases[variant], state, seed, mend=seed % 8 == 0, to_end=seed % 4 == 1)
        trials += [trial] if trial else []
    assert [(trial.state, trial.seed, str(trial.fault), trial.problems) for trial in trials if trial.problems] == []
    assert len(trials) >= 25
    assert {trial.fault.kind for trial in trials} >= {"flip", "delete", "truncate", "foreign"}


# --- a run that is whole ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [*STATES, FINISHED])
def test_a_run_that_was_stopped_anywhere_is_clean_and_untouched(base, call, state):
    """A false alarm, or a check that changes what it checks, and nobody would run it again."""
    base.put_back(state)
    before = rot.tree_of(base)
    outcome = call("verify", "-c", base.config)
    assert outcome.code == 0, outcome.err
    assert "no damage" in outcome.out
    assert rot.tree_of(base) == before
    if state == "preparation":
        assert "stage_2.partial" in outcome.out  # told, and no damage
    assert call("verify", "--run", base.work_dir, "--repair").code == 0
    assert rot.tree_of(base) == before


def test_a_run_that_has_not_begun_is_clean(tmp_path):
    """Killed before its first stage was there, a run would seem to be damaged."""
    from pipeline.core.errors import PipelineError

    config = pipeline.load_config(rot.write_run(tmp_path, **RUN | {"network": {"name": "random"}}))

    def sink(_event: object) -> None:
        raise PipelineError("at the first thing that it tells")

    with pytest.raises(PipelineError, match="first thing"):
        pipeline.run(config, sink=sink)
    report = pipeline.verify(config.work_dir)
    assert report.clean and "no stage is prepared" in report.notes[0]


def test_a_torn_record_is_an_earlier_position(base):
    """A crash in the middle of a commit is no damage: the state that the record before it describes is still there."""
    base.put_back(MID)
    path = base.work_dir / "journal.jsonl"
    os.truncate(path, path.stat().st_size - 7)
    report = pipeline.verify(base.work_dir)
    assert report.clean and (report.stage, report.iteration) == (2, 2)
    assert any("not whole" in note for note in report.notes)


# --- what is named ---------------------------------------------------------------------------------------------------


def test_damage_is_named_to_the_chunk_and_what_to_do_is_told(base, call):
    """ "Something is damaged" helps nobody; and what a repair would cost must be known before it is begun."""
    base.put_back(MID)
    path = flip_in(base, newest(base, "m"))
    outcome = call("verify", "--run", base.work_dir, "--json")
    assert outcome.code == 6 and "--repair" in outcome.err
    found = json.loads(outcome.out)
    assert not found["clean"] and found["found"] == found["remaining"]
    (problem,) = found["found"]
    assert problem == {
        "path": str(path),
        "kind": "changed",
        "what": "is not what was written there",
        "stage": 2,
        "array": "m_1",
        "chunk": [0, 0],
    }
    assert found["iterations_lost"] == 1 and "stage 2 goes on from iteration 2" in found["steps"][0]
    shown = call("verify", "--run", base.work_dir)
    assert shown.code == 6
    assert f"changed: {path} (stage 2, m_1, chunk row 0, column 0)" in shown.out
    assert "lost by that: 1 iteration" in shown.out


def cut(path: Path) -> None:
    os.truncate(path, 5)


@pytest.mark.parametrize(("damage", "kind"), [(Path.unlink, "missing"), (cut, "truncated")])
def test_kinds_of_damage_are_told_apart(base, damage, kind):
    """A file that is gone and one that has rotted have different causes."""
    base.put_back(MID)
    damage(base.work_dir / "store.zarr" / newest(base, "v"))
    (problem,) = pipeline.verify(base.work_dir).found
    assert (problem.kind, problem.stage, problem.array, problem.chunk) == (kind, 2, "v_1", (0, 0))


def test_a_chunk_that_cannot_be_read_is_named(base):
    """A bad sector ends the reading program with an error; the rest of the disk must still be looked at."""
    base.put_back(MID)
    path = base.work_dir / "store.zarr" / newest(base, "v")
    path.unlink()
    path.mkdir()  # reading it gives an error of the system, as a bad sector does
    other = flip_in(base, newest(base, "canvas"))
    found = {problem.path: problem.kind for problem in pipeline.verify(base.work_dir).found}
    assert found[other] == "changed" and path in found


def test_content_of_the_idle_slot_is_nobodys(base):
    """It is written over before it is read: a false alarm would send the run back for nothing."""
    base.put_back(MID)
    flip_in(base, "stage_2/canvas_0/c/1/1/0")
    flip_in(base, "stage_2/gradient/c/0/0/0")
    assert pipeline.verify(base.work_dir).clean


# --- repair, case by case --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["canvas", "m", "v"])
def test_one_iteration_is_lost_where_its_input_is_still_there(base, name):
    """A stage of a day would begin again for one bad chunk."""
    base.put_back(MID)
    flip_in(base, newest(base, name))
    report = mended(base)
    assert (report.iterations_lost, report.stage, report.iteration) == (1, 2, 2)
    assert [record["records"] for record in journal(base.work_dir) if record["type"] == "rolled_back"] == [16]


def test_the_stage_begins_again_where_it_is_not(base):
    """Half of the other slot is written over already: going on from it would mix two iterations."""
    base.put_back(UPDATE)
    flip_in(base, newest(base, "canvas"))
    report = mended(base)
    assert (report.iterations_lost, report.stage, report.iteration) == (3, 1, ITERATIONS)
    assert "stage 2 begins again" in report.steps[0]


def test_two_damages_send_the_run_back_two_stages(base):
    """The canvas that the stage would begin from is damaged too: it must not be begun from."""
    base.put_back(UPDATE)
    flip_in(base, newest(base, "canvas"))
    flip_in(base, "stage_1/canvas_0/c/1/1/0")
    report = mended(base)
    assert "stage 1 begins again" in report.steps[0]
    assert report.iterations_lost == 3 + ITERATIONS


def test_all_is_rendered_again_where_nothing_else_is_left(base):
    """At last the inputs alone make the same picture."""
    base.put_back(UPDATE)
    for name in (newest(base, "canvas"), "stage_1/canvas_0/c/1/1/0", "stage_0/canvas_0/c/0/0/0"):
        flip_in(base, name)
    assert mended(base).iterations_lost == 3 + 2 * ITERATIONS


@pytest.mark.parametrize("state", ["between stages", "last iteration done", FINISHED])
def test_a_stage_that_ended_is_rendered_again_if_its_canvas_rots(base, state):
    """The next stage begins from it; its m and v are gone, or needed no more."""
    base.put_back(state)
    stage = 2 if state == FINISHED else 1
    flip_in(base, f"stage_{stage}/canvas_0/c/0/0/0")
    assert mended(base).iterations_lost == (1 if state == "last iteration done" else ITERATIONS)


def test_the_canvas_of_an_earlier_stage_is_given_up(base, call):
    """Nothing needs it but `export --stage`, which must say so instead of showing a damaged one."""
    base.put_back(MID)
    flip_in(base, "stage_0/canvas_0/c/0/0/0")
    assert call("run", "-c", base.config, "--set", f"output={base.folder / 'out.tif'}").code == 0  # does not need it
    base.put_back(MID)
    flip_in(base, "stage_0/canvas_0/c/0/0/0")
    report = mended(base)
    assert report.iterations_lost == 0 and "give up the canvas of stage 0" in report.steps[0]
    outcome = call("export", "--run", base.work_dir, "--stage", "0", "-o", base.folder / "stage0.tif")
    assert outcome.code == 3 and "stage 0 has no canvas; stages with one: 1, 2" in outcome.err


@pytest.mark.parametrize("name", ["content", "features_conv4_2", "gram_conv3_1"])
@pytest.mark.parametrize("variant", ["none", "lz4"])
def test_inputs_of_a_stage_are_computed_again(bases, variant, name):
    """They follow from the images: no iteration need be lost for them."""
    base = bases[variant]
    base.put_back(MID)
    flip_in(base, f"stage_2/{name}/c/0/0" + ("" if name.startswith("gram") else "/0"))
    report = mended(base)
    assert (report.iterations_lost, report.iteration) == (0, 3)
    assert report.steps == (f"compute {name} of stage 2 again",)


def test_inputs_that_come_out_otherwise_begin_the_stage_again(base):
    """Another device rounds otherwise: features of two kinds side by side would leave a seam."""
    name = "features_conv4_2"
    base.put_back(MID)
    path = base.work_dir / "journal.jsonl"
    records = Journal(path).read()
    path.unlink()
    for record in records:
        if isinstance(record, StagePrepared) and record.stage == 2:  # as if on a device that rounds otherwise
            other = packed([value ^ 1 for value in unpacked(record.checksums[name])])
            Journal(path).append(record.model_copy(update={"checksums": {**record.checksums, name: other}}))
        else:
            Journal(path).append(record)
    report = pipeline.verify(base.work_dir, repair=True)
    assert report.clean and report.iterations_lost == 3
    assert [step.split(":")[0] for step in report.steps] == ["compute features_conv4_2 of stage 2 again", "go back"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{}")])
@pytest.mark.parametrize("state", [MID, FINISHED])
def test_metadata_is_written_again_as_it_was(base, state, damage):
    """A lost line of text would make gigabytes of whole pixels unreadable."""
    base.put_back(state)
    paths = sorted((base.work_dir / "store.zarr").rglob("zarr.json"))
    before = {path: path.read_bytes() for path in paths}
    for path in paths:
        if "gram" not in path.parent.name:
            damage(path)
    with pytest.raises(DamagedStateError) if state == MID else pytest.MonkeyPatch.context():
        pipeline.run(pipeline.load_config(base.config))
    assert mended(base).iterations_lost == 0
    assert state == MID or {path: path.read_bytes() for path in paths} == before


def test_a_manifest_is_restored_from_the_journal(base):
    """Nobody else knows which config the state belongs to."""
    base.put_back(MID)
    path = base.work_dir / "manifest.json"
    whole = path.read_bytes()
    for damage in (Path.unlink, lambda path: path.write_bytes(whole[:100]), lambda path: path.write_bytes(b"")):
        damage(path)
        with pytest.raises(DamagedStateError):
            pipeline.run(pipeline.load_config(base.config))
        report = pipeline.verify(base.work_dir, repair=True)
        assert report.clean and report.iterations_lost == 0
        assert path.read_bytes() == whole


def test_a_manifest_of_another_run_is_replaced(base):
    """A whole manifest in the wrong place would be believed."""
    base.put_back(MID)
    path = base.work_dir / "manifest.json"
    whole = path.read_bytes()
    manifest = json.loads(whole)
    manifest.pop("crc")
    path.write_bytes(_manifest_text({**manifest, "created": "another day"}))
    with pytest.raises(DamagedStateError, match="another run"):
        pipeline.run(pipeline.load_config(base.config))
    assert pipeline.verify(base.work_dir, repair=True).clean
    assert path.read_bytes() == whole


def test_a_journal_is_kept_up_to_its_damage(base):
    """What comes after a damaged line cannot be trusted, but it is not thrown away."""
    base.put_back(MID)
    path = base.work_dir / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert b'"stage_prepared"' in lines[13] and b'"stage": 2' in lines[13]
    bad = b"?" * 40 + lines[14][40:]  # the first iteration of stage 2
    path.write_bytes(b"".join([*lines[:14], bad, *lines[15:]]))
    report = mended(base)
    assert report.iterations_lost == 3
    assert (base.work_dir / "journal.jsonl.damaged-1").read_bytes() == b"".join([bad, *lines[15:]])


def test_a_lost_journal_sets_the_store_aside(base, call):
    """Without it nobody knows what the store holds; a copy of the journal may still be found."""
    base.put_back(MID)
    (base.work_dir / "journal.jsonl").unlink()
    for command in ("run", "verify"):
        outcome = call(command, "-c", base.config)
        assert outcome.code == 6 and "journal.jsonl" in outcome.err + outcome.out
    chunks = rot.files_below(base.work_dir / "store.zarr")
    mended(base)
    assert len(rot.files_below(base.work_dir / "store.zarr.damaged-1")) == len(chunks)


def test_without_manifest_and_journal_nothing_is_touched(base, call):
    """Nothing is known of such a run: a repair that guesses would make it worse."""
    base.put_back(MID)
    for name in ("manifest.json", "journal.jsonl"):
        flip(base, base.work_dir / name, random.Random(3))
    first = (base.work_dir / "journal.jsonl").read_bytes().splitlines(keepends=True)[0]
    (base.work_dir / "journal.jsonl").write_bytes(b"x" + first)
    before = rot.tree_of(base)
    assert call("verify", "--run", base.work_dir).code == 6
    assert rot.tree_of(base) == before


def test_foreign_files_are_moved_not_deleted(base):
    """They may be somebody's notes."""
    base.put_back(MID)
    names = ("notes.txt", "store.zarr/stage_1/more/x", "store.zarr/stage_2/canvas_1/c/0/9", "store.zarr/stage_2/m_1/y")
    for name in names:
        path = base.work_dir / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    found = pipeline.verify(base.work_dir).found
    assert [problem.kind for problem in found] == ["foreign"] * 4
    mended(base)
    for name in names:
        assert (base.work_dir / "foreign-files" / name).read_text() == name


OF_THE_SYSTEM = (
    ".DS_Store",
    "._canvas_0",
    "Thumbs.db",
    "desktop.ini",
    ".directory",
    "@eaDir/x",
    ".nfs00000000018c2a5b00000007",
)


def test_files_of_desktops_and_file_servers_are_no_damage(base, call):
    """Looked at with Finder, or kept on a Synology, every whole run would be called damaged."""
    base.put_back(MID)
    places = ("", "store.zarr", "store.zarr/stage_1", "store.zarr/stage_2/canvas_1/c/0")
    paths = [base.work_dir / place / name for place in places for name in OF_THE_SYSTEM]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("icons")
    outcome = call("verify", "--run", base.work_dir)
    assert outcome.code == 0, outcome.out
    assert "left over, read by nothing" in outcome.out
    found = pipeline.verify(base.work_dir, repair=True)
    listed = {path if path.parent.name != "@eaDir" else path.parent for path in paths}
    assert found.found == () and set(found.leftovers) == listed
    assert all(path.read_text() == "icons" for path in paths)  # they are not ours to move
    pipeline.run(pipeline.load_config(base.config))
    assert base.differences() == []


def test_links_are_foreign_and_nothing_is_read_through_them(base):
    """A chunk that is another file's name changes when that file does."""
    base.put_back(MID)
    symbolic, hard = (base.work_dir / "store.zarr" / newest(base, name) for name in ("canvas", "m"))
    symbolic.rename(base.folder / "elsewhere")
    symbolic.symlink_to(base.folder / "elsewhere")
    os.link(hard, base.folder / "second name")
    assert {problem.path for problem in pipeline.verify(base.work_dir).found} == {symbolic, hard}
    assert mended(base).iterations_lost == 1  # what stood behind the link is not ours to take
    assert (base.work_dir / "foreign-files" / symbolic.relative_to(base.work_dir)).is_symlink()


@pytest.mark.parametrize("name", rot.INPUTS)
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: flip(None, path, random.Random(1))])
def test_inputs_are_to_be_restored(base, call, name, damage):
    """Nothing can make them anew, and with another file the picture would be another."""
    base.put_back(MID)
    path = base.folder / name
    damage(path)
    flip_in(base, "stage_2/features_conv4_2/c/0/0/0")
    outcome = call("verify", "-c", base.config, "--repair")
    assert outcome.code == 6 and str(path) in outcome.out and "Restore the inputs" in outcome.err
    assert call("run", "-c", base.config).code == 3
    shutil.copyfile(base.snapshots[MID] / name, path)
    assert mended(base).iterations_lost == 0


def test_inputs_may_have_moved(base, call):
    """With the config, verify looks where the inputs are now."""
    base.put_back(MID)
    (base.folder / "content.png").rename(base.folder / "photo.png")
    assert call("verify", "--run", base.work_dir).code == 6
    assert call("verify", "-c", base.config, "--set", f"content={base.folder / 'photo.png'}").code == 0
    outcome = call("verify", "-c", base.config, "--set", "seed=9")
    assert outcome.code == 3 and "seed: was 0, is 9" in outcome.err


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_sample_reads_a_part_and_says_so(base, call):
    """Who is told "no damage" of a twentieth must know that it was a twentieth."""
    base.put_back(MID)
    found = json.loads(call("verify", "--run", base.work_dir, "--sample", "5%", "--json").out)
    assert found["sample"]["share"] == 0.05
    arrays = 2 + 3 + 2 + 5  # canvases of two stages; canvas, m, v; content and features; style targets
    assert arrays <= found["checked"] < found["total"] / 2
    outcome = call("verify", "--run", base.work_dir, "--sample", "5%")
    assert outcome.code == 0 and "no damage in the sample" in outcome.out and "--seed" in outcome.out

    flip_in(base, newest(base, "canvas"))
    told = {seed: pipeline.verify(base.work_dir, share=0.3, seed=seed).clean for seed in range(20)}
    assert {True, False} == set(told.values())
    assert all(pipeline.verify(base.work_dir, share=0.3, seed=seed).clean == clean for seed, clean in told.items())
    assert not pipeline.verify(base.work_dir, share=1.0).clean
    os.truncate(base.work_dir / "store.zarr" / newest(base, "v"), 9)  # what costs nothing is looked at in any sample
    assert not any(pipeline.verify(base.work_dir, share=0.05, seed=seed).clean for seed in range(5))


@pytest.mark.parametrize("options", ["--sample 0%", "--sample 101%", "--sample five", "--sample 5% --repair"])
def test_wrong_usage(base, call, options):
    """A repair of a part, or a sample of nothing, would give a wrong comfort."""
    assert call("verify", "--run", base.work_dir, *options.split()).code == 2


def test_a_run_at_work_is_not_disturbed(base, call):
    """What is checked while it is written is always damaged; what is repaired then, more so."""
    base.put_back(MID)
    with RunLock(base.work_dir):
        assert call("verify", "--run", base.work_dir).code == 4
        with pytest.raises(LockedError):
            pipeline.verify(base.work_dir, repair=True)


def test_it_stops_when_asked(base):
    """Reading a terabyte takes an hour."""
    base.put_back(MID)
    stop = threading.Event()
    heard: list[object] = []

    def sink(event: object) -> None:
        heard.append(event)
        stop.set()

    with pytest.raises(Stopped):
        pipeline.verify(base.work_dir, sink=sink, stop=stop)
    assert heard


def test_where_there_is_no_run(tmp_path, call):
    """An empty folder is not clean: it is the wrong folder."""
    assert call("verify", "--run", tmp_path).code == 3
    with pytest.raises(ConfigError, match="no run here"):
        pipeline.verify(tmp_path)


def test_a_run_of_another_version_is_left_alone(base):
    """A repair would take its format for damage, and put an older manifest over it."""
    base.put_back(MID)
    path = base.work_dir / "manifest.json"
    path.write_bytes(_manifest_text({"format": FORMAT + 1}))
    before = path.read_bytes()
    with pytest.raises(DamagedStateError, match=f"format {FORMAT + 1}"):
        pipeline.verify(base.work_dir, repair=True)
    assert path.read_bytes() == before


LATER = {"loss": {"sparkle": 0.5}, "palette": "warm"}


@pytest.mark.parametrize("repair", [[], ["--repair"]])
def test_a_manifest_whose_config_does_not_work_here(base, call, repair):
    """A traceback says that it is a bug of ours; what has become of the run's files would be left to guess."""
    base.put_back(MID)
    (base.folder / "out.tif").unlink(missing_ok=True)
    (base.folder / "out.tif").symlink_to("content.png")
    before = rot.tree_of(base)
    outcome = call("verify", "--run", base.work_dir, *repair)
    assert (outcome.code, outcome.err.count("\n")) == (6, 1), outcome.err
    for words in (str(base.work_dir / "manifest.json"), "output: the same file as content", "--config"):
        assert words in outcome.err
    assert rot.tree_of(base) == before
    outcome = call("verify", "-c", base.config, "--set", f"output={base.folder / 'other.tif'}", *repair)
    assert outcome.code == 0, outcome.err


def test_a_manifest_with_keys_of_a_later_version(base, call):
    """The same where a run was begun with a newer version than this one, and copied here."""
    base.put_back(MID)
    rewrite_manifest(base, lambda config: config.update({**LATER, "loss": {**config["loss"], **LATER["loss"]}}))
    outcome = call("verify", "--run", base.work_dir)
    assert (outcome.code, outcome.err.count("\n")) == (6, 1), outcome.err
    assert "loss.sparkle: unknown key" in outcome.err and "palette: unknown key" in outcome.err
    assert call("verify", "-c", base.config).code == 0


def test_how_a_picture_was_to_be_written_is_no_matter_of_the_state(base, call):
    """A run from before options that a format passes over were refused would be called damaged for them."""
    base.put_back(MID)
    rewrite_manifest(base, lambda config: config.update(output=str(base.folder / "x.png"), export={"quality": 7}))
    assert call("verify", "--run", base.work_dir).code == 0


def test_a_manifest_without_the_hash_of_an_input(base, call):
    """An input that is in its config but not among its hashes: such a manifest comes from elsewhere."""
    base.put_back(MID)
    rewrite_manifest(base, lambda config: None, lambda manifest: manifest["inputs"].pop("content"))
    outcome = call("verify", "--run", base.work_dir)
    assert (outcome.code, outcome.err.count("\n")) == (6, 1), outcome.err
    assert "has no hash of what its config reads as content" in outcome.err


def rewrite_manifest(
    base: Base, change: Callable[[Json], object], also: Callable[[Json], object] = lambda manifest: None
) -> None:
    """Change the config that a run began with, in both its manifests, as if it had begun like that."""
    records = journal(base.work_dir)
    manifest = records[0]["manifest"]
    change(manifest["config"])
    also(manifest)
    write_journal(base.work_dir / "journal.jsonl", records)
    (base.work_dir / "manifest.json").write_bytes(_manifest_text(manifest))


def test_moved_runs_can_be_mended(base, tmp_path):
    """A disk that fails is copied, and the copy mended."""
    base.put_back(MID)
    flip_in(base, "stage_2/features_conv4_2/c/0/0/0")
    shutil.copytree(base.work_dir, tmp_path / "copy")
    report = pipeline.verify(tmp_path / "copy", repair=True)
    assert report.clean and report.iterations_lost == 0
    config = write_config(base.folder, **RUN | {"work_dir": str(tmp_path / "copy"), "store": {"codec": "none"}})
    pipeline.run(pipeline.load_config(config))
    assert (base.folder / "out.tif").read_bytes() == base.picture
