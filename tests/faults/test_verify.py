"""`pipeline verify` and a resume find and name all damage; `--repair` rolls back to an intact state."""

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
from pipeline.rundir.records import FORMAT, Iteration
from tests.support import rot
from tests.support.e2e import journal, write_config, write_journal
from tests.support.rot import FINISHED, ITERATIONS, RUN, STATES, Base, flip

Json = dict[str, Any]

MID = "after an iteration"  # stage 2, three iterations done, the other slot intact
UPDATE = "in an update"  # the other slot half overwritten


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """Uninterrupted runs, uncompressed and compressed; tools/torture/rot.py has all variants."""
    variants = ("none", "lz4", "rich")
    return {variant: rot.make_base(tmp_path_factory.mktemp(variant), variant) for variant in variants}


@pytest.fixture
def base(bases: dict[str, Base]) -> Base:
    return bases["none"]


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
    """Repair the run, which must then be clean, and end as it would have without damage."""
    report = pipeline.verify(base.work_dir, repair=True)
    assert report.clean, [str(problem) for problem in report.remaining]
    assert pipeline.verify(base.work_dir).found == ()
    pipeline.run(pipeline.load_config(base.config))
    assert base.differences() == []
    return report


# --- random damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["none", "lz4", "rich"])
def test_no_random_damage_goes_unseen_and_all_is_mended(bases, variant):
    """A flipped bit, a missing file or a lost write would get into the image unnoticed."""
    trials = []
    for seed in range(42):
        state = [*STATES, FINISHED][seed % 7]
        trial = rot.try_fault(bases[variant], state, seed, mend=seed % 8 == 0, to_end=seed % 4 == 1)
        trials += [trial] if trial else []
    assert [(trial.state, trial.seed, str(trial.fault), trial.problems) for trial in trials if trial.problems] == []
    assert len(trials) >= 25
    assert {trial.fault.kind for trial in trials} >= {"flip", "delete", "truncate", "foreign"}


# --- intact runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [*STATES, FINISHED])
def test_a_run_that_was_stopped_anywhere_is_clean_and_untouched(base, call, state):
    """False alarms, or a check that changes what it checks, would make the command useless."""
    base.put_back(state)
    before = rot.tree_of(base)
    outcome = call("verify", "-c", base.config)
    assert outcome.code == 0, outcome.err
    assert "no damage" in outcome.out
    assert rot.tree_of(base) == before
    if state == "preparation":
        assert "stage_2.partial" in outcome.out  # listed, but not damage
    assert call("verify", "--run", base.work_dir, "--repair").code == 0
    assert rot.tree_of(base) == before


def test_a_run_that_has_not_begun_is_clean(tmp_path):
    """A run that was killed before its first stage would be reported as damaged."""
    from pipeline.core.errors import PipelineError

    config = pipeline.load_config(rot.write_run(tmp_path, **RUN | {"network": {"name": "random"}}))

    def sink(_event: object) -> None:
        raise PipelineError("at the first thing that it tells")

    with pytest.raises(PipelineError, match="first thing"):
        pipeline.run(config, sink=sink)
    report = pipeline.verify(config.work_dir)
    assert report.clean and "no stage is prepared" in report.notes[0]


def test_a_torn_record_is_an_earlier_position(base):
    """A crash during a commit is not damage: the state of the record before it is still intact."""
    base.put_back(MID)
    path = base.work_dir / "journal.jsonl"
    os.truncate(path, path.stat().st_size - 7)
    report = pipeline.verify(base.work_dir)
    assert report.clean and (report.stage, report.iteration) == (2, 2)
    assert any("incomplete" in note for note in report.notes)


# --- reports ---------------------------------------------------------------------------------------------------------


def test_damage_is_named_to_the_chunk_and_what_to_do_is_told(base, call):
    """The report names the damaged chunk, and the cost of a repair before it is made."""
    base.put_back(MID)
    path = flip_in(base, newest(base, "m"))
    outcome = call("verify", "--run", base.work_dir, "--json")
    assert outcome.code == 6 and "--repair" in outcome.err
    report = json.loads(outcome.out)
    assert not report["clean"] and report["found"] == report["remaining"]
    (problem,) = report["found"]
    assert problem == {
        "path": str(path),
        "kind": "changed",
        "what": "is not what was written there",
        "stage": 2,
        "array": "m_1",
        "chunk": [0, 0],
    }
    assert report["iterations_lost"] == 1 and "stage 3 resumes at iteration 3" in report["steps"][0]
    shown = call("verify", "--run", base.work_dir)
    assert shown.code == 6
    assert f"changed: {path} (stage 3, m_1, chunk row 0, column 0)" in shown.out
    assert "to compute again after a repair: 1 iteration" in shown.out


def cut(path: Path) -> None:
    os.truncate(path, 5)


@pytest.mark.parametrize(("damage", "kind"), [(Path.unlink, "missing"), (cut, "truncated")])
def test_kinds_of_damage_are_told_apart(base, damage, kind):
    """Missing and changed files have different causes."""
    base.put_back(MID)
    damage(base.work_dir / "store.zarr" / newest(base, "v"))
    (problem,) = pipeline.verify(base.work_dir).found
    assert (problem.kind, problem.stage, problem.array, problem.chunk) == (kind, 2, "v_1", (0, 0))


def test_a_chunk_that_cannot_be_read_is_named(base):
    """After a read error at a bad sector, the rest of the store must still be checked."""
    base.put_back(MID)
    path = base.work_dir / "store.zarr" / newest(base, "v")
    path.unlink()
    path.mkdir()  # reading it gives an OSError, as a bad sector does
    other = flip_in(base, newest(base, "canvas"))
    kinds = {problem.path: problem.kind for problem in pipeline.verify(base.work_dir).found}
    assert kinds[other] == "changed" and path in kinds


def test_content_of_the_idle_slot_is_nobodys(base):
    """It is overwritten before it is read: a false alarm would roll the run back for nothing."""
    base.put_back(MID)
    flip_in(base, "stage_2/canvas_0/c/1/1/0")
    flip_in(base, "stage_2/gradient/c/0/0/0")
    assert pipeline.verify(base.work_dir).clean


# --- repair, case by case --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["canvas", "m", "v"])
def test_one_iteration_is_lost_where_its_input_is_still_there(base, name):
    """One bad chunk would cost a stage of a day."""
    base.put_back(MID)
    flip_in(base, newest(base, name))
    report = mended(base)
    assert (report.iterations_lost, report.stage, report.iteration) == (1, 2, 2)
    assert [record["records"] for record in journal(base.work_dir) if record["type"] == "rolled_back"] == [16]


def test_the_stage_begins_again_where_it_is_not(base):
    """Half of the other slot is overwritten already: to resume from it would mix two iterations."""
    base.put_back(UPDATE)
    flip_in(base, newest(base, "canvas"))
    report = mended(base)
    assert (report.iterations_lost, report.stage, report.iteration) == (3, 1, ITERATIONS)
    assert "stage 3 starts again" in report.steps[0]


def test_two_damages_send_the_run_back_two_stages(base):
    """The stage must not start from the damaged canvas of the stage before."""
    base.put_back(UPDATE)
    flip_in(base, newest(base, "canvas"))
    flip_in(base, "stage_1/canvas_0/c/1/1/0")
    report = mended(base)
    assert "stage 2 starts again" in report.steps[0]
    assert report.iterations_lost == 3 + ITERATIONS


def test_all_is_rendered_again_where_nothing_else_is_left(base):
    """The inputs alone are enough to render the same image."""
    base.put_back(UPDATE)
    for name in (newest(base, "canvas"), "stage_1/canvas_0/c/1/1/0", "stage_0/canvas_0/c/0/0/0"):
        flip_in(base, name)
    assert mended(base).iterations_lost == 3 + 2 * ITERATIONS


@pytest.mark.parametrize("state", ["between stages", "last iteration done", FINISHED])
def test_a_stage_that_ended_is_rendered_again_if_its_canvas_rots(base, state):
    """The next stage starts from it, and its m and v may be freed already."""
    base.put_back(state)
    stage = 2 if state == FINISHED else 1
    flip_in(base, f"stage_{stage}/canvas_0/c/0/0/0")
    assert mended(base).iterations_lost == (1 if state == "last iteration done" else ITERATIONS)


def test_the_canvas_of_an_earlier_stage_is_given_up(base, call):
    """Only `export --stage` needs it, which must refuse instead of writing a damaged image."""
    base.put_back(MID)
    flip_in(base, "stage_0/canvas_0/c/0/0/0")
    assert call("run", "-c", base.config, "--set", f"output={base.folder / 'out.tif'}").code == 0  # does not need it
    base.put_back(MID)
    flip_in(base, "stage_0/canvas_0/c/0/0/0")
    report = mended(base)
    assert report.iterations_lost == 0 and "give up the canvas of stage 1" in report.steps[0]
    outcome = call("export", "--run", base.work_dir, "--stage", "1", "-o", base.folder / "stage0.tif")
    assert outcome.code == 3 and "stage 1 has no canvas; stages with one: 2, 3" in outcome.err


@pytest.mark.parametrize("name", ["content", "features_conv4_2", "gram_conv3_1"])
@pytest.mark.parametrize("variant", ["none", "lz4"])
def test_the_stage_starts_again_if_its_inputs_rot(bases, variant, name):
    """They are the same in every iteration of the stage, so that an earlier one is damaged as much."""
    base = bases[variant]
    base.put_back(MID)
    flip_in(base, f"stage_2/{name}/c/0/0" + ("" if name.startswith("gram") else "/0"))
    report = mended(base)
    assert (report.iterations_lost, report.stage, report.iteration) == (3, 1, ITERATIONS)
    assert report.steps == ("roll back: stage 3 starts again, and the output image will be the same",)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{}")])
@pytest.mark.parametrize(("state", "lost"), [(MID, 3 + 2 * ITERATIONS), (FINISHED, 3 * ITERATIONS)])
def test_lost_metadata_of_all_arrays_starts_the_run_again(base, state, lost, damage):
    """Pixels of an unknown shape and type must not be read."""
    base.put_back(state)
    for path in sorted((base.work_dir / "store.zarr").rglob("zarr.json")):
        damage(path)
    with pytest.raises(DamagedStateError) if state == MID else pytest.MonkeyPatch.context():
        pipeline.run(pipeline.load_config(base.config))
    assert mended(base).iterations_lost == lost


@pytest.mark.parametrize("state", [MID, FINISHED])
def test_metadata_of_groups_is_written_again(base, state):
    """It is the same for every group: no stage has to start again for it."""
    base.put_back(state)
    top = base.work_dir / "store.zarr"
    for path in (top / "zarr.json", top / "stage_2" / "zarr.json"):
        path.unlink()
    assert mended(base).iterations_lost == 0


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 5)])
def test_chunks_of_the_idle_slot_are_allocated_again(base, damage):
    """An iteration overwrites them in place; what they held is not needed."""
    base.put_back(MID)
    for name in ("canvas_0", "gradient"):
        damage(base.work_dir / "store.zarr" / "stage_2" / name / "c" / "1" / "1" / "0")
    report = mended(base)
    assert report.iterations_lost == 0 and all(step.startswith("allocate 1 chunks") for step in report.steps)


def test_a_manifest_is_restored_from_the_journal(base):
    """Without the manifest, the config of the state is unknown."""
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
    """An intact manifest of another run would be trusted."""
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
    """The records after a damaged line cannot be trusted, but they are set aside, not deleted."""
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
    """Without the journal, the content of the store is unknown; the user may have a copy of the journal."""
    base.put_back(MID)
    (base.work_dir / "journal.jsonl").unlink()
    for command in ("run", "verify"):
        outcome = call(command, "-c", base.config)
        assert outcome.code == 6 and "journal.jsonl" in outcome.err + outcome.out
    chunks = rot.files_below(base.work_dir / "store.zarr")
    mended(base)
    assert len(rot.files_below(base.work_dir / "store.zarr.damaged-1")) == len(chunks)


def test_without_manifest_and_journal_nothing_is_touched(base, call):
    """A repair that guesses the state of such a run would make it worse."""
    base.put_back(MID)
    for name in ("manifest.json", "journal.jsonl"):
        flip(base, base.work_dir / name, random.Random(3))
    first = (base.work_dir / "journal.jsonl").read_bytes().splitlines(keepends=True)[0]
    (base.work_dir / "journal.jsonl").write_bytes(b"x" + first)
    before = rot.tree_of(base)
    assert call("verify", "--run", base.work_dir).code == 6
    assert rot.tree_of(base) == before


def test_foreign_files_are_moved_not_deleted(base):
    """They may be the user's notes."""
    base.put_back(MID)
    names = ("notes.txt", "store.zarr/stage_1/more/x", "store.zarr/stage_2/canvas_1/c/0/9", "store.zarr/stage_2/m_1/y")
    for name in names:
        path = base.work_dir / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    problems = pipeline.verify(base.work_dir).found
    assert [problem.kind for problem in problems] == ["foreign"] * 4
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
    """Every run that was opened in Finder or stored on a Synology would be reported as damaged."""
    base.put_back(MID)
    places = ("", "store.zarr", "store.zarr/stage_1", "store.zarr/stage_2/canvas_1/c/0")
    paths = [base.work_dir / place / name for place in places for name in OF_THE_SYSTEM]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("icons")
    outcome = call("verify", "--run", base.work_dir)
    assert outcome.code == 0, outcome.out
    assert "unused files: " in outcome.out
    report = pipeline.verify(base.work_dir, repair=True)
    listed = {path if path.parent.name != "@eaDir" else path.parent for path in paths}
    assert report.found == () and set(report.leftovers) == listed
    assert all(path.read_text() == "icons" for path in paths)  # a repair does not move them
    pipeline.run(pipeline.load_config(base.config))
    assert base.differences() == []


def test_links_are_foreign_and_nothing_is_read_through_them(base):
    """A chunk with a hard link elsewhere changes with that file."""
    base.put_back(MID)
    symbolic, hard = (base.work_dir / "store.zarr" / newest(base, name) for name in ("canvas", "m"))
    symbolic.rename(base.folder / "elsewhere")
    symbolic.symlink_to(base.folder / "elsewhere")
    os.link(hard, base.folder / "second name")
    assert {problem.path for problem in pipeline.verify(base.work_dir).found} == {symbolic, hard}
    assert mended(base).iterations_lost == 1  # the target of the link is not moved into the store
    assert (base.work_dir / "foreign-files" / symbolic.relative_to(base.work_dir)).is_symlink()


@pytest.mark.parametrize("name", rot.INPUTS)
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: flip(None, path, random.Random(1))])
def test_inputs_are_to_be_restored(base, call, name, damage):
    """Inputs cannot be recomputed, and another file would give another image."""
    base.put_back(MID)
    path = base.folder / name
    damage(path)
    flip_in(base, "stage_2/features_conv4_2/c/0/0/0")
    outcome = call("verify", "-c", base.config, "--repair")
    assert outcome.code == 6 and str(path) in outcome.out and "Restore the inputs" in outcome.err
    assert call("run", "-c", base.config).code == 3
    shutil.copyfile(base.snapshots[MID] / name, path)
    assert mended(base).iterations_lost == 3


def test_inputs_may_have_moved(base, call):
    """With a config, verify finds inputs that have moved."""
    base.put_back(MID)
    (base.folder / "content.png").rename(base.folder / "photo.png")
    assert call("verify", "--run", base.work_dir).code == 6
    assert call("verify", "-c", base.config, "--set", f"content={base.folder / 'photo.png'}").code == 0
    outcome = call("verify", "-c", base.config, "--set", "seed=9")
    assert outcome.code == 3 and "seed: was 0, is 9" in outcome.err


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_sample_reads_a_part_and_says_so(base, call):
    """A report about a sample must say that it is one."""
    base.put_back(MID)
    report = json.loads(call("verify", "--run", base.work_dir, "--sample", "5%", "--json").out)
    assert report["sample"]["share"] == 0.05
    arrays = 2 + 3 + 2 + 5  # canvases of two stages; canvas, m, v; content and features; style targets
    assert arrays <= report["checked"] < report["total"] / 2
    outcome = call("verify", "--run", base.work_dir, "--sample", "5%")
    assert outcome.code == 0 and "no damage in the sample" in outcome.out and "--seed" in outcome.out

    flip_in(base, newest(base, "canvas"))
    clean_by_seed = {
        seed: pipeline.verify(base.work_dir, sample=pipeline.SampleSpec(0.3, seed)).clean for seed in range(20)
    }
    assert {True, False} == set(clean_by_seed.values())
    assert all(
        pipeline.verify(base.work_dir, sample=pipeline.SampleSpec(0.3, seed)).clean == clean
        for seed, clean in clean_by_seed.items()
    )
    assert not pipeline.verify(base.work_dir, sample=pipeline.SampleSpec(1.0)).clean
    os.truncate(base.work_dir / "store.zarr" / newest(base, "v"), 9)  # what costs nothing is looked at in any sample
    assert not any(pipeline.verify(base.work_dir, sample=pipeline.SampleSpec(0.05, seed)).clean for seed in range(5))


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
    assert report.clean and report.iterations_lost == 3
    config = write_config(base.folder, **RUN | {"work_dir": str(tmp_path / "copy"), "store": {"codec": "none"}})
    pipeline.run(pipeline.load_config(config))
    assert (base.folder / "out.tif").read_bytes() == base.picture
