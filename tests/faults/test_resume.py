"""A run that ended at any moment resumes to the same image: kills, signals, locks, and changes between starts."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.support.e2e import (
    PIPELINE,
    TIMEOUT_S,
    Child,
    Nursery,
    canvases,
    gradient_tiles,
    journal,
    keys_of,
    leftovers,
    read_picture,
    results,
    run_pipeline,
    user_environment,
    write_config,
    write_picture,
    write_run,
)

KILLED = -signal.SIGKILL

# Three stages (40, 80, 150 px), the last of six tiles, every kind of array and two styles.
THREE_STAGES: dict[str, Any] = {
    "styles": [{"image": "style.png", "weight": 2.0}, {"image": "second.png"}],
    "output": "out.tif",
    "initial_size": 40,
    "optimizer": {"max_iterations": 3},
}


def write_three_stages(folder: Path, **keys: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_picture(folder / "second.png", 64, 75, seed=3)
    return write_run(folder, (150, 110), (100, 90), **THREE_STAGES, **keys)


@dataclass(frozen=True)
class Unbroken:
    """An uninterrupted run: its results, which every other run must have, and the order of its events."""

    config: Path
    picture: bytes
    canvases: dict[str, bytes]
    results: list[dict[str, Any]]
    ranks: dict[tuple[Any, ...], int]
    gradient_tiles: int

    def assert_same(self, folder: Path) -> None:
        """The run in `folder` is done, with the same bits and no other files."""
        assert results(folder / "run") == self.results  # the same number of records: no work was committed twice
        assert (folder / "out.tif").read_bytes() == self.picture
        assert canvases(folder / "run") == self.canvases
        assert leftovers(folder / "out.tif") == []


@pytest.fixture(scope="module")
def unbroken(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Unbroken]:
    """The same run, stored as it is and compressed."""
    made = {}
    for codec in ("none", "zstd"):
        folder = tmp_path_factory.mktemp(f"unbroken_{codec}")
        config = write_three_stages(folder, store={"codec": codec})
        child = start(nursery, config)
        assert child.wait() == 0, child.err
        events = child.events()
        ranks = {key: rank for rank, key in enumerate(keys_of(events))}
        picture = (folder / "out.tif").read_bytes()
        run = folder / "run"
        made[codec] = Unbroken(config, picture, canvases(run), results(run), ranks, gradient_tiles(events))
    return made


def start(nursery: Nursery, config: Path, *options: object, kill_before: int = 0) -> Child:
    return nursery.start("run", "-c", config, "--log-format", "json", *options, kill_before=kill_before)


def wait_for_rank(child: Child, ranks: dict[tuple[Any, ...], int], rank: int) -> bool:
    """Wait until the run has reached the event of this rank."""
    return child.wait_until(lambda events: any(ranks.get(key, -1) >= rank for key in keys_of(events)))


def kill_at(nursery: Nursery, unbroken: Unbroken, config: Path, rank: int, delay_s: float = 0.0) -> Child:
    child = start(nursery, config)
    wait_for_rank(child, unbroken.ranks, rank)
    time.sleep(delay_s)
    child.kill()
    return child


# --- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "seed"), [("none", 0), ("none", 1), ("zstd", 2)])
def test_killed_at_random_moments_it_ends_with_the_same_bits(nursery, unbroken, tmp_path, codec, seed):
    """Crashes or the OOM killer, at any moment and many times, must not change or lose the image."""
    expected = unbroken[codec]
    config = write_three_stages(tmp_path, store={"codec": codec})
    rng = random.Random(seed)
    parts, moments = 10, len(expected.ranks)  # one moment in every tenth of the run
    kills = tiles = 0
    for part in range(parts):
        if part % 3 == 1:  # and one moment while the last resume is starting
            starting = start(nursery, config)
            time.sleep(rng.uniform(0, 0.3))
            kills += starting.kill() == KILLED
            tiles += gradient_tiles(starting.events())
        rank = rng.randrange(part * moments // parts, (part + 1) * moments // parts)
        child = kill_at(nursery, expected, config, rank, rng.uniform(0, 0.02))
        kills += child.process.exitcode == KILLED
        tiles += gradient_tiles(child.events())
        picture = tmp_path / "out.tif"
        assert not picture.exists() or picture.read_bytes() == expected.picture
    last = start(nursery, config)
    assert last.wait() == 0, last.err
    tiles += gradient_tiles(last.events())

    assert kills >= 9  # of 13: the last ones may come too late
    expected.assert_same(tmp_path)
    assert tiles <= expected.gradient_tiles + 6 * kills  # a kill costs at most the iteration it hit, of six tiles


def progress(run: Path) -> int:
    """The records except `exporting`, of which every export appends one."""
    return sum(record["type"] != "exporting" for record in journal(run))


def test_killed_before_every_commit_it_ends_with_the_same_bits(nursery, tmp_path):
    """Two steps of a commit in the wrong order would leave a state that no resume understands."""
    expected = write_run(tmp_path / "unbroken", output="out.tif")
    assert start(nursery, expected).wait() == 0
    config = write_run(tmp_path / "broken", output="out.tif")
    run = config.parent / "run"
    before, attempts = 1, 0
    while True:
        committed = progress(run)
        child = start(nursery, config, kill_before=before)
        if child.wait() == 0:
            break
        assert child.wait() == KILLED, child.err
        attempts += 1
        assert attempts < 80, f"it never ends:\n{child.err}"
        # Once a record is committed the next attempt dies right after committing one more (its first step is the lock).
        before = 3 if progress(run) > committed else before + 1
        assert not (picture := config.with_name("out.tif")).exists() or len(read_picture(picture)) == 52

    assert attempts >= 20
    assert results(run) == results(expected.with_name("run"))
    assert canvases(run) == canvases(expected.with_name("run"))
    assert config.with_name("out.tif").read_bytes() == expected.with_name("out.tif").read_bytes()
    assert leftovers(config.with_name("out.tif")) == []


def test_killed_with_several_scales_it_ends_with_the_same_bits(nursery, tmp_path, call):
    """The arrays of coarse scales are part of the state: a resume, and verify, must know them."""
    expected, config = (write_three_stages(tmp_path / name, loss={"scales": 2}) for name in ("unbroken", "broken"))
    assert start(nursery, expected).wait() == 0
    for done in (1, 2):
        child = start(nursery, config)
        child.wait_until(lambda events, last=(1, done - 1, "iteration"): last in keys_of(events))
        assert child.kill() == KILLED
        assert (config.parent / "run" / "store.zarr" / "stage_1" / "features_conv4_2_s1").exists()
        outcome = call("verify", "-c", config)
        assert outcome.code == 0, outcome.err
    child = start(nursery, config)
    assert child.wait() == 0, child.err
    assert canvases(config.parent / "run") == canvases(expected.parent / "run")
    assert (config.parent / "out.tif").read_bytes() == (expected.parent / "out.tif").read_bytes()


def test_installed_command_on_all_cores_is_killed_and_goes_on(tmp_path):
    """The other tests use one core and a forked process; this one uses the command of the user."""
    env = user_environment()
    done = [write_run(tmp_path / name, (150, 110), output="out.tif") for name in ("unbroken", "broken")]
    assert run_pipeline("run", "-c", done[0], env=env).code == 0
    rng = random.Random(3)
    for records in (2, 6):
        process = subprocess.Popen([PIPELINE, "run", "-c", done[1]], stderr=subprocess.DEVNULL, env=env)
        deadline = time.monotonic() + TIMEOUT_S
        while len(journal(done[1].with_name("run"))) < records and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        assert process.wait(TIMEOUT_S) == KILLED
    assert run_pipeline("run", "-c", done[1], env=env).code == 0

    assert results(done[1].with_name("run")) == results(done[0].with_name("run"))
    assert canvases(done[1].with_name("run")) == canvases(done[0].with_name("run"))
    assert done[1].with_name("out.tif").read_bytes() == done[0].with_name("out.tif").read_bytes()


@pytest.fixture(scope="module")
def rendered_run(nursery, tmp_path_factory) -> Path:
    """The folder of a finished run, which for another output only has to export."""
    config = write_run(tmp_path_factory.mktemp("rendered"))
    assert start(nursery, config).wait() == 0
    return config.parent


@pytest.mark.parametrize("suffix", [".tif", ".dz", ".zarr"])
def test_killed_while_exporting_leaves_no_half_picture(nursery, rendered_run, tmp_path, suffix):
    """Half an image would be at the output path, or the disk would fill with hidden temporary files."""
    folder = tmp_path / "copy"
    shutil.copytree(rendered_run, folder)
    config = write_config(folder, output=f"whole/out{suffix}")
    assert start(nursery, config).wait() == 0
    whole = tree(folder / "whole" / f"out{suffix}")

    config = write_config(folder, output=f"killed/out{suffix}")
    output = folder / "killed" / f"out{suffix}"
    for before in range(1, 40):
        child = start(nursery, config, kill_before=before)
        if child.wait() == 0:
            break
        assert child.wait() == KILLED, child.err
        assert tree(output) in ({}, whole)
    assert tree(output) == whole
    assert leftovers(output) == []
    assert journal(folder / "run")[-1]["output"] == str(output)


def test_what_a_killed_export_left_goes_though_its_number_is_taken_again(nursery, rendered_run, tmp_path):
    """After a reboot, other processes have the old ids: temporary files of gigabytes would never be deleted."""
    folder = tmp_path / "copy"
    shutil.copytree(rendered_run, folder)
    config = write_config(folder, output="out.tif")
    # process 1 always runs: it may have made the new file, but not one that is older than itself
    old, new = (folder / f".out.partial-{os.uname().nodename}-1-{number:08}.tif" for number in range(2))
    for path, modified_s in ((old, psutil.boot_time() - 1000), (new, time.time())):
        path.touch()
        os.utime(path, (modified_s, modified_s))
    assert start(nursery, config).wait() == 0
    assert (old.exists(), new.exists()) == (False, True)


def tree(path: Path) -> dict[str, bytes]:
    """Every file at or below `path`."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "what"),
    [(signal.SIGINT, "content"), (signal.SIGINT, "gradient pass"), (signal.SIGTERM, "update pass")],
)
def test_one_signal_stops_between_two_tasks(nursery, unbroken, tmp_path, call, number, what):
    """Ctrl-C or a batch system's signal must not lose work, nor look like a failure."""
    config = write_three_stages(tmp_path)
    child = start(nursery, config)
    moment = next(rank for key, rank in unbroken["none"].ranks.items() if key[0] == 1 and key[2] == what)
    assert wait_for_rank(child, unbroken["none"].ranks, moment)
    child.signal(number)
    assert child.wait() == 75
    assert "Run the same command again" in child.err
    assert "Traceback" not in child.err
    assert not (tmp_path / "out.tif").exists()
    assert json.loads(call("status", "-c", config, "--json").out)["state"] == "stopped"

    assert start(nursery, config).wait() == 0
    unbroken["none"].assert_same(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_second_signal_ends_at_once(nursery, tmp_path, number, code):
    """A tile may take minutes, which the second signal must not wait for."""
    # two tiles of some seconds: when the first is done, the second is being computed, and a stop has to wait for it
    config = write_run(
        tmp_path,
        (1536, 768),
        initial_size=1536,
        compute={"tile_px": 768, "dtype": "float64"},
        store={"chunk_px": 256},
        loss={"content_weight": 0.0},
    )
    child = start(nursery, config)
    assert child.wait_until(lambda events: any(event.get("what") == "Gram pass" for event in events)), child.err
    child.signal(number)
    deadline = time.monotonic() + TIMEOUT_S
    while "interrupt again to abort" not in child.err and time.monotonic() < deadline:
        time.sleep(0.001)
    child.signal(number)
    assert child.wait() == code, child.err
    assert not (tmp_path / "out.png").exists()


# --- two runs at once ------------------------------------------------------------------------------------------------


def test_second_run_is_kept_out_and_the_first_unharmed(nursery, unbroken, tmp_path, call):
    """Two runs of one config would destroy each other's state; `status` has to name the process of the run."""
    config = write_three_stages(tmp_path)
    first = start(nursery, config)
    ranks = unbroken["none"].ranks
    assert wait_for_rank(first, ranks, len(ranks) // 2)
    with first.paused():
        started = time.monotonic()
        outcome = run_pipeline("status", "-c", config, "--json")
        status_s = time.monotonic() - started
        status = json.loads(outcome.out)
        assert (status["state"], status["pid"]) == ("running", first.pid)
        assert str(first.pid) in call("status", "-c", config).out
        started = time.monotonic()
        second = run_pipeline("run", "-c", config)
        run_s = time.monotonic() - started
        assert second.code == 4
        assert str(first.pid) in second.err and "Traceback" not in second.err
        assert run_s < status_s + 2
        assert call("export", "-c", config, "-o", tmp_path / "while_running.png").code == 0
    assert first.wait() == 0, first.err
    unbroken["none"].assert_same(tmp_path)
    status = json.loads(call("status", "-c", config, "--json").out)
    assert (status["state"], status["pid"]) == ("done", None)


# --- changes between two starts: allowed and refused ----------------------------------------------------------------


@pytest.fixture(scope="module")
def killed_run(nursery, unbroken, tmp_path_factory) -> Path:
    """The folder of a run that was killed in the middle of its last stage."""
    folder = tmp_path_factory.mktemp("killed")
    config = write_three_stages(folder)
    moment = next(rank for key, rank in unbroken["none"].ranks.items() if key == (2, 1, "gradient pass", 2))
    assert kill_at(nursery, unbroken["none"], config, moment).process.exitcode == KILLED
    return folder


@pytest.fixture
def killed(killed_run, tmp_path) -> Path:
    """A copy of that folder, for one test to change."""
    shutil.copytree(killed_run, tmp_path / "killed")
    return tmp_path / "killed"


def test_status_of_a_killed_run_is_stopped(killed, call):
    """A dead run would be shown as running."""
    status = json.loads(call("status", "--run", killed / "run", "--json").out)
    assert (status["state"], status["pid"], status["stage"], status["iteration"]) == ("stopped", None, 2, 1)
    assert [stage["state"] for stage in status["stages"]] == ["done", "done", "prepared"]


@pytest.mark.parametrize("tile_px", ["32", "160", "auto"])
def test_tiles_memory_and_device_may_change(nursery, unbroken, killed, tile_px):
    """A run could not resume on a smaller or larger machine, or its image would change there."""
    options = [f"--set=compute.tile_px={tile_px}", "--set=memory.limit=3GiB", "--set=compute.device=auto"]
    child = start(nursery, killed / "config.yaml", *options)
    assert child.wait() == 0, child.err
    done = [
        (record["stage"], record["iteration"]) for record in journal(killed / "run") if record["type"] == "iteration"
    ]
    assert done == [(stage, iteration) for stage in range(3) for iteration in range(3)]
    expected = read_picture(unbroken["none"].config.with_name("out.tif")).astype(int)
    assert np.abs(read_picture(killed / "out.tif") - expected).mean() < 0.01  # additions in another order


def test_changed_result_fields_are_refused_with_a_list(killed, call):
    """The stages of the image would be rendered with different settings, unnoticed."""
    changes = {
        "optimizer.beta1": ("0.9", "0.8"),
        "optimizer.max_iterations": ("3", "9"),
        "loss.kind": ("wasserstein", "gatys"),
        "loss.content_weight": ("0.3", "0.1"),
        "network.padding": ("replicate", "zeros"),
        "network.pooling": ("mixed", "tent"),
        "network.pooling_scale": ("1.0", "1.5"),
        "styles.1.weight": ("1.0", "3.0"),
        "store.chunk_px": ("32", "16"),
        "compute.dtype": ("float32", "float64"),
        "init": ("content", "noise"),
        "seed": ("0", "7"),
        "size": ("null", "300"),
        "initial_size": ("40", "64"),
    }
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    for key, (old, new) in changes.items():
        outcome = call("run", "-c", killed / "config.yaml", "--set", f"{key}={new}")
        assert outcome.code == 3
        assert [line for line in outcome.err.splitlines() if line.startswith("  ")] == [f"  {key}: was {old}, is {new}"]
    outcome = call("run", "-c", killed / "config.yaml", *(f"--set={key}={new}" for key, (_, new) in changes.items()))
    assert outcome.code == 3
    listed = [line.split(":")[0].strip() for line in outcome.err.splitlines() if line.startswith("  ")]
    assert listed == sorted(changes)
    after = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file() and path.name != "lock"}
    assert after == {path: data for path, data in before.items() if path.name not in ("lock", "lock.owner")}


def test_styles_may_not_come_or_go(killed, call):
    """A style that was added half-way would be missing from the finished stages."""
    write_config(killed, **{**THREE_STAGES, "styles": [{"image": "style.png", "weight": 2.0}]})
    outcome = call("run", "-c", killed / "config.yaml")
    assert outcome.code == 3
    assert "styles.1.weight: was 1.0, is not given" in outcome.err
    assert "styles.1.image: the content of the file has changed" in outcome.err


@pytest.mark.parametrize(("name", "key"), [("content.png", "content"), ("second.png", "styles.1.image")])
def test_changed_inputs_are_refused(killed, call, name, key):
    """An input that was overwritten meanwhile would be mixed with its older version."""
    height, width, _ = read_picture(killed / name).shape
    write_picture(killed / name, width, height, seed=99)
    outcome = call("run", "-c", killed / "config.yaml")
    assert outcome.code == 3
    assert f"{key}: the content of the file has changed" in outcome.err
    assert not (killed / "out.tif").exists()


def test_everything_may_move(nursery, unbroken, killed):
    """A run could not be moved to another disk, nor its output be renamed."""
    elsewhere = killed.with_name("elsewhere")
    elsewhere.mkdir()
    (killed / "run").rename(elsewhere / "state")
    (killed / "content.png").rename(elsewhere / "photo.png")
    keys = {"content": "../elsewhere/photo.png", "work_dir": "../elsewhere/state", "output": "../elsewhere/new.tif"}
    config = write_config(killed, **{**THREE_STAGES, **keys})
    child = start(nursery, config)
    assert child.wait() == 0, child.err
    assert results(elsewhere / "state") == unbroken["none"].results
    assert (elsewhere / "new.tif").read_bytes() == unbroken["none"].picture
    assert not (killed / "out.tif").exists()


def test_half_a_journal_line_is_forgotten(nursery, unbroken, killed):
    """A power cut during the write of a record would be reported as damage, at the cost of days of work."""
    with (killed / "run" / "journal.jsonl").open("ab") as file:
        file.write(b'{"crc": "00000000", "record": {"type": "itera')
    child = start(nursery, killed / "config.yaml")
    assert child.wait() == 0, child.err
    unbroken["none"].assert_same(killed)


def test_a_picture_that_is_only_renamed_is_not_a_stranger(nursery, unbroken, tmp_path):
    """Killed between the rename of the image and its record, the run would refuse its own image."""
    config = write_three_stages(tmp_path)
    assert start(nursery, config).wait() == 0
    path = tmp_path / "run" / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert '"exported"' in lines[-1]
    path.write_text("".join(lines[:-1]))
    again = start(nursery, config)
    assert again.wait() == 0, again.err
    unbroken["none"].assert_same(tmp_path)


def test_what_an_error_asked_for_is_no_change(tmp_path, call):
    """A user who follows the advice to replace a broken image would be refused for having changed it."""
    config = write_run(tmp_path, size=60)
    whole = (tmp_path / "style.png").read_bytes()
    (tmp_path / "style.png").write_bytes(whole[: len(whole) // 2])
    assert call("run", "-c", config).code == 3
    (tmp_path / "style.png").write_bytes(whole)
    outcome = call("run", "-c", config, "--set", "size=64")
    assert (outcome.code, (tmp_path / "out.png").exists()) == (0, True), outcome.err


def test_the_lock_ends_with_its_process(killed, call):
    """A lock file that a crash left behind would refuse every start."""
    assert (killed / "run" / "lock").exists()
    owner = json.loads((killed / "run" / "lock.owner").read_text())
    assert owner["pid"] != os.getpid()
    assert call("run", "-c", killed / "config.yaml", "--set", "seed=7").code == 3  # not 4
