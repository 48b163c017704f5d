"""What comes after a run: cleaning, more iterations, another name for the output, and what `plan` says of it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import pipeline
from pipeline.core.errors import ConfigError, Stopped
from pipeline.core.events import IterationDone
from pipeline.core.tiling import Rect
from pipeline.rundir.journal import Journal
from tests.support.e2e import PIPELINE, TIMEOUT_S, Outcome, journal, read_picture, run_until, write_run

# One small stage, and no work_dir: it has the name of the output.
TINY = {"initial_size": 48, "style_stages": False, "work_dir": None, "optimizer": {"max_iterations": 2}}
SIZE = (48, 40)


@pytest.fixture
def finished(tmp_path, call) -> Path:
    """The config of a finished run in out.run."""
    config = write_run(tmp_path, SIZE, (32, 32), **TINY)
    assert call("run", "-c", config).code == 0
    return config


def change(config: Path, **keys: object) -> Path:
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **keys}))
    return config


def iterations(work_dir: Path) -> int:
    return sum(record["type"] == "iteration" for record in journal(work_dir))


def outlook(call: Callable[..., Outcome], config: Path) -> str:
    """The line of `plan` that says what `run` would do."""
    shown = call("plan", "-c", config)
    assert shown.code == 0, shown
    return next(line for line in shown.out.splitlines() if line.startswith("run ")).removeprefix("run").strip()


@pytest.mark.parametrize("command", [["run"], ["preview", "--crop", "0,0,16,16"]], ids=lambda command: command[0])
def test_a_start_reads_the_journal_once(finished, call, monkeypatch, command):
    """It holds the checksums of all chunks for every iteration: the start of a long run would take minutes."""
    read, parse = list[Path](), Journal._parse
    monkeypatch.setattr(Journal, "_parse", lambda journal, *known: read.append(journal.path) or parse(journal, *known))
    assert call(*command, "-c", finished).code == 0
    assert read.count(finished.parent / "out.run" / "journal.jsonl") == 1


# --- clean ----------------------------------------------------------------------------------------------------------


def test_clean_deletes_the_state_and_nothing_else(finished, call):
    """A finished run of 30,000 px leaves gigabytes. The picture, and how it was made, must stay."""
    work_dir, picture = finished.parent / "out.run", (finished.parent / "out.png").read_bytes()
    shown = call("clean", "-c", finished, "--dry-run")
    assert shown.code == 0 and "KiB" in shown.out and (work_dir / "store.zarr").exists()
    cleaned = call("clean", "-c", finished, "--yes")
    assert cleaned.code == 0 and "freed" in cleaned.out
    assert not (work_dir / "store.zarr").exists()
    assert (finished.parent / "out.png").read_bytes() == picture
    assert {"manifest.json", "journal.jsonl"} <= {path.name for path in work_dir.iterdir()}
    status = json.loads(call("status", "-c", finished, "--json").out)
    assert (status["state"], status["cleaned"], status["percent"]) == ("done", True, 100.0)
    assert call("verify", "-c", finished).code == 0
    assert "already there" in call("run", "-c", finished).err
    assert call("clean", "-c", finished, "--yes").code == 0  # nothing is left to be freed


def test_what_needs_the_state_is_refused_after_clean(finished, call):
    """Rendering a day again must be asked for; and a state that was deleted on purpose is not called damaged."""
    assert call("clean", "-c", finished, "--yes").code == 0
    (finished.parent / "out.png").unlink()
    for command in (
        ["run", "-c", finished],
        ["run", "-c", finished, "--more-iterations", "2"],
        ["export", "-c", finished, "-o", finished.parent / "other.png"],
    ):
        refused = call(*command)
        assert refused.code == 3 and "pipeline clean" in refused.err, refused
    assert outlook(call, finished).startswith("is refused: ")
    assert iterations(finished.parent / "out.run") == 2


@pytest.mark.e2e
def test_clean_refuses_a_run_whose_work_would_be_lost(tmp_path, call):
    """Without an image, the state is all that there is of the work."""
    config = write_run(tmp_path, SIZE, (32, 32), **TINY)
    run_until(config, lambda event: isinstance(event, IterationDone))
    refused = call("clean", "-c", config, "--yes")
    assert refused.code == 3 and "not finished" in refused.err and "--force" in refused.err
    assert call("run", "-c", config).code == 0
    (tmp_path / "out.png").write_bytes(b"retouched")
    refused = call("clean", "-c", config, "--yes")
    assert refused.code == 3 and "no longer, at" in refused.err
    assert call("clean", "-c", config, "--yes", "--force").code == 0


@pytest.mark.e2e
def test_clean_refuses_while_a_panel_is_missing(tmp_path, call):
    """A wall of which one panel is lost, or was not written before a crash, can only be completed from the state."""
    panels = {"dpi": 254, "panels": {"width": "3mm", "overlap": "1mm"}}
    config = write_run(tmp_path, SIZE, (32, 32), **TINY, output="wall.tif", export=panels)
    assert call("run", "-c", config).code == 0
    lost = tmp_path / "wall-1of2.tif"
    before = lost.read_bytes()
    lost.unlink()
    refused = call("clean", "-c", config, "--yes")
    assert refused.code == 3 and f"no longer, at {lost}" in refused.err
    assert f"writes {lost} from the finished run" in outlook(call, config)
    assert call("run", "-c", config).code == 0 and lost.read_bytes() == before
    log = tmp_path / "wall.run" / "journal.jsonl"
    whole = log.read_bytes()
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:-4]))  # a crash before the second panel was written
    assert json.loads(call("status", "-c", config, "--json").out)["state"] == "stopped"
    assert call("clean", "-c", config, "--yes").code == 3
    log.write_bytes(whole)
    assert call("clean", "-c", config, "--yes").code == 0


@pytest.mark.e2e
def test_other_options_are_not_called_done_after_clean(finished, call):
    """The user would send a file to the printer that has not the resolution, or the border, that the config names."""
    assert call("clean", "-c", finished, "--yes").code == 0
    assert "does nothing" in outlook(call, finished)
    change(finished, export={"dpi": 100})
    refused = call("run", "-c", finished)
    assert refused.code == 3 and "pipeline clean" in refused.err
    assert "is refused" in outlook(call, finished)


def test_clean_refuses_while_a_run_is_active(tmp_path, call):
    """It would delete the arrays that the run writes."""
    config = write_run(tmp_path, SIZE, (32, 32), **TINY)
    outcomes: list[str] = []

    def clean(event: object) -> None:
        if isinstance(event, IterationDone):
            with pytest.raises(pipeline.errors.LockedError) as caught:  # type: ignore[attr-defined]
                pipeline.clean(tmp_path / "out.run", force=True)
            outcomes.append(str(caught.value))

    pipeline.run(pipeline.load_config(config), sink=clean)
    assert len(outcomes) == 2 and "locked by another run" in outcomes[0]


@pytest.mark.e2e
def test_clean_asks(finished, call):
    """A command that was typed by mistake deletes nothing."""
    unasked = call("clean", "-c", finished)
    assert unasked.code == 2 and "--yes" in unasked.err
    for answer, deleted in ((b"n\n", False), (b"y\n", True)):
        ours, theirs = pty.openpty()
        process = subprocess.Popen([PIPELINE, "clean", "-c", finished], stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        os.write(ours, answer)
        assert process.wait(TIMEOUT_S) == 0
        os.close(ours)
        assert (finished.parent / "out.run" / "store.zarr").exists() != deleted


# --- more iterations ------------------------------------------------------------------------------------------------


def test_more_iterations_continue_the_picture_as_one_more_stage(finished, call):
    """They start where the run ended, and the picture is replaced by the better one."""
    work_dir, before = finished.parent / "out.run", read_picture(finished.parent / "out.png")
    assert call("run", "-c", finished, "--more-iterations", "3").code == 0
    assert iterations(work_dir) == 5
    assert (read_picture(finished.parent / "out.png") != before).any()
    status = json.loads(call("status", "-c", finished, "--json").out)
    assert [(stage["iterations"], stage["max_iterations"]) for stage in status["stages"]] == [(2, 2), (3, 3)]
    assert status["state"] == "done"
    assert call("verify", "-c", finished).code == 0
    assert "already there" in call("run", "-c", finished).err  # the plain command adds nothing
    assert call("run", "-c", finished, "--more-iterations", "1").code == 0
    assert iterations(work_dir) == 6


@pytest.mark.e2e
def test_more_iterations_are_those_of_a_stage_of_that_number(tmp_path, call):
    """Their cosine schedule runs over them, not over those of the config: else their last steps would be too large."""
    keys = {**TINY, "stages": [{"up_to": 48, "optimizer": {"max_iterations": 2}}]}
    config = write_run(tmp_path, SIZE, (32, 32), **keys)
    assert call("run", "-c", config).code == 0
    assert call("run", "-c", config, "--more-iterations", "4").code == 0
    records = [record for record in journal(tmp_path / "out.run") if record["type"] == "iteration"]
    assert [(record["stage"], record["iteration"]) for record in records[2:]] == [(1, n) for n in range(4)]
    done = [record for record in journal(tmp_path / "out.run") if record["type"] == "stage_done"]
    assert [record["reason"] for record in done] == ["max_iterations", "max_iterations"]


@pytest.mark.e2e
def test_more_iterations_stopped_and_resumed_by_either_command_end_alike(tmp_path, call):
    """The same command must resume, as its message says, and not add the iterations a second time."""
    pictures = []
    for name, resume in (("a", None), ("b", []), ("c", ["--more-iterations", "3"])):
        config = write_run(tmp_path / name, SIZE, (32, 32), **TINY)
        assert call("run", "-c", config).code == 0
        if resume is not None:
            with pytest.raises(Stopped):
                stop_after(config, 1)
            assert call("run", "-c", config, *resume).code == 0
        else:
            assert call("run", "-c", config, "--more-iterations", "3").code == 0
        assert iterations(tmp_path / name / "out.run") == 5
        pictures.append((tmp_path / name / "out.png").read_bytes())
    assert pictures[0] == pictures[1] == pictures[2]


def stop_after(config: Path, count: int) -> None:
    """Add three iterations, and stop after some of them."""
    import threading

    stop, seen = threading.Event(), []

    def sink(event: object) -> None:
        if isinstance(event, IterationDone):
            seen.append(event)
            if len(seen) == count:
                stop.set()

    pipeline.run(pipeline.load_config(config), more_iterations=3, sink=sink, stop=stop)


@pytest.mark.e2e
def test_more_iterations_are_for_finished_runs(tmp_path, call):
    """An unfinished run has iterations of its own to do first."""
    config = write_run(tmp_path, SIZE, (32, 32), **TINY)
    assert "not finished" in call("run", "-c", config, "--more-iterations", "2").err
    assert not (tmp_path / "out.run").exists()
    run_until(config, lambda event: isinstance(event, IterationDone))
    with pytest.raises(ConfigError, match="not finished"):
        pipeline.run(pipeline.load_config(config), more_iterations=2)
    assert iterations(tmp_path / "out.run") == 1


@pytest.mark.e2e
def test_a_crop_of_a_continued_run_is_a_part_of_its_picture(finished, call):
    """The crop of the stage before would look like a mistake of the run."""
    assert call("run", "-c", finished, "--more-iterations", "3").code == 0
    cut = pipeline.crop(pipeline.load_config(finished), pipeline.CropSpec(Rect(4, 20, 8, 32)))
    assert (read_picture(cut) == read_picture(finished.parent / "out.png")[4:20, 8:32]).all()


# --- status ---


def test_status_says_how_far_the_run_is(tmp_path, call):
    """Percent, time left and disk are what a user looks for; counts of iterations say little of unlike stages."""
    config = write_run(tmp_path, SIZE, (32, 32), **{**TINY, "optimizer": {"max_iterations": 6}})
    run_until(config, lambda event: isinstance(event, IterationDone) and event.iteration == 3)
    shown = json.loads(call("status", "-c", config, "--json").out)
    assert 0 < shown["percent"] < 100 and shown["run_left_s"] > 0 and shown["state_bytes"] > 0
    text = call("status", "-c", config).out
    assert "left to its end once it is resumed" in text and "on disk" in text
    assert call("run", "-c", config).code == 0
    assert json.loads(call("status", "-c", config, "--json").out)["percent"] == 100


# --- another name of the output ---------------------------------------------------------------------------------------


def test_a_renamed_output_is_exported_from_the_finished_run(finished, call):
    """The run directory has the output's name: a new name meant a new run, and a day of rendering."""
    change(finished, output="poster.tif")
    assert "renders nothing" in outlook(call, finished)
    outcome = call("run", "-c", finished)
    assert outcome.code == 0 and "out.run holds the finished run" in outcome.err
    assert not (finished.parent / "poster.run").exists() and iterations(finished.parent / "out.run") == 2
    assert (read_picture(finished.parent / "poster.tif") == read_picture(finished.parent / "out.png")).all()


@pytest.mark.e2e
@pytest.mark.parametrize("keys", [{"seed": 1}, {"work_dir": "own.run"}])
def test_another_run_begins_anew_under_a_new_name(finished, call, keys):
    """The picture of other settings would be wrong, and a work_dir that is given is where the user wants the run."""
    change(finished, output="poster.png", **keys)
    assert "from the beginning" in outlook(call, finished)
    assert call("run", "-c", finished).code == 0
    assert iterations(finished.parent / keys.get("work_dir", "poster.run")) == 2


@pytest.mark.e2e
def test_a_changed_input_begins_anew_under_a_new_name(finished, call):
    """The finished picture is that of another content."""
    (finished.parent / "content.png").write_bytes((finished.parent / "style.png").read_bytes())
    change(finished, output="poster.png")
    assert "from the beginning" in outlook(call, finished)


@pytest.mark.e2e
def test_more_iterations_under_a_new_name_are_resumed(finished, call):
    """Stopped in the added stage, the run is no longer a finished one; it must be found again all the same."""
    change(finished, output="poster.png")
    with pytest.raises(Stopped):
        stop_after(finished, 1)
    assert call("run", "-c", finished).code == 0
    assert iterations(finished.parent / "out.run") == 5 and not (finished.parent / "poster.run").exists()


@pytest.mark.e2e
def test_every_command_finds_the_run_of_a_renamed_output(finished, call):
    """`run` wrote poster.tif from out.run: the same config must not be told that there is no run."""
    change(finished, output="poster.tif")
    assert call("run", "-c", finished).code == 0
    for command in (
        ["status", "-c", finished],
        ["verify", "-c", finished],
        ["export", "-c", finished, "-o", finished.parent / "other.png"],
        ["preview", "-c", finished, "--crop", "0,0,16,16"],
        ["clean", "-c", finished, "--yes"],
    ):
        outcome = call(*command)
        assert outcome.code == 0, outcome
    assert "already there" in call("run", "-c", finished).err  # the state is gone, but the image is this run's
    assert not (finished.parent / "poster.run").exists()


@pytest.mark.e2e
def test_an_added_stage_is_exported(finished, call):
    """After more iterations the newest stage is none of those that the run began with."""
    assert call("run", "-c", finished, "--more-iterations", "1").code == 0
    outcome = call("export", "-c", finished, "-o", finished.parent / "other.png")
    assert outcome.code == 0, outcome
    assert (read_picture(finished.parent / "other.png") == read_picture(finished.parent / "out.png")).all()


# --- what plan says ---------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_plan_says_what_run_would_do_at_every_step(tmp_path, call):
    """`run` may render for a day or refuse after a minute: the user wants to know before."""
    config = write_run(tmp_path, SIZE, (32, 32), **TINY)
    assert "from the beginning" in outlook(call, config)
    run_until(config, lambda event: isinstance(event, IterationDone))
    assert "resumes in stage 1 of 1, after 1 of 2 iterations" in outlook(call, config)
    assert call("run", "-c", config).code == 0
    assert "does nothing" in outlook(call, config)
    (tmp_path / "out.png").unlink()
    assert "writes" in outlook(call, config)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("keys", "foreign"),
    [({"seed": 5}, False), ({"initial_size": 40}, False), ({}, True), ({"output": "content.png"}, False)],
)
def test_plan_says_what_run_refuses_in_the_same_words(finished, call, keys, foreign):
    """Two texts of one refusal would soon differ, and `plan` would promise what `run` does not do."""
    change(finished, work_dir="out.run", **keys)
    if foreign:
        (finished.parent / "out.png").write_bytes(b"somebody's")
    refused = call("run", "-c", finished)
    assert refused.code == 3
    shown = call("plan", "-c", finished)
    if shown.code == 3:  # the plan itself is refused
        assert shown.err == refused.err
    else:
        assert refused.err.removeprefix("pipeline: error:").strip() in shown.out
    assert iterations(finished.parent / "out.run") == 2


@pytest.mark.e2e
def test_the_end_of_a_run_says_what_may_be_deleted(tmp_path, call):
    """Nobody dares to delete a folder whose purpose is not known; the command must work as it is printed."""
    config = write_run(tmp_path / "a poster", SIZE, (32, 32), **TINY)
    line = next(line for line in call("run", "-c", config).err.splitlines() if "pipeline clean" in line)
    assert " frees " in line
    command = line.split("`")[1]
    subprocess.run(f"{PIPELINE.parent}/{command} --yes", shell=True, check=True, stdout=subprocess.DEVNULL)
    assert not (tmp_path / "a poster" / "out.run" / "store.zarr").exists()
