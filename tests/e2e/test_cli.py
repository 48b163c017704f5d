"""The command line end to end: every command, output format and kind of setting, on images of 100 px."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.core.image_formats import PixelKind
from tests.support.e2e import (
    PIPELINE,
    TIMEOUT_S,
    canvases,
    journal,
    leftovers,
    read_picture,
    results,
    run_pipeline,
    write_config,
    write_picture,
    write_run,
)


def iterations(work_dir: Path) -> list[dict[str, Any]]:
    return [record for record in journal(work_dir) if record["type"] == "iteration"]


# --- the first steps -------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_from_init_to_picture(tmp_path, call):
    """The first steps of a new user: init, plan, run, status."""
    write_picture(tmp_path / "content.jpg", 100, 80, seed=1)
    write_picture(tmp_path / "style.jpg", 90, 70, seed=2)
    path = tmp_path / "mine.yaml"
    outcome = call("init", path, "--full")
    assert outcome.code == 0
    assert str(path) in outcome.out
    assert call("init", path).code == 3  # and does not overwrite it
    assert call("init", "-", "--full").out == path.read_text()

    text = path.read_text()
    for key, value in {
        "initial_size": 50,
        "  name": "random",
        "  max_iterations": 2,
        "  coarse_iterations": 1.0,
        "  chunk_px": 32,
        "  tile_px": 64,
        "output": "result.tif",
    }.items():
        text, number = re.subn(rf"(?m)^{key}: .*", f"{key}: {value}", text)
        assert number == 1, key
    path.write_text(text)

    planned = call("plan", "-c", path)
    assert planned.code == 0
    assert "100×80" in planned.out and "85×68" in planned.out
    as_json = json.loads(call("plan", "-c", path, "--json").out)
    assert [stage["size"] for stage in as_json["stages"]] == [[40, 50], [68, 85], [80, 100]]
    assert as_json["projected_mem_bytes"] == max(as_json["host_bytes"].values())
    assert not (tmp_path / "result.run").exists()  # a plan writes nothing

    done = run_pipeline("run", "-c", path, "--log-format", "json")
    assert (done.code, done.out) == (0, "")
    events = [json.loads(line) for line in done.err.splitlines()]
    assert {"StageStarted", "WorkDone", "IterationDone", "StageDone", "RunDone"} == {event["event"] for event in events}
    assert [event["iteration"] for event in events if event["event"] == "IterationDone"] == [0, 1, 0, 1, 0, 1]
    picture = read_picture(tmp_path / "result.tif")
    assert picture.shape == (80, 100, 3)
    assert picture.std() > 10

    progress = json.loads(call("status", "-c", path, "--json").out)
    assert (progress["state"], progress["pid"], progress["exported"]) == ("done", None, [str(tmp_path / "result.tif")])
    assert [stage["iterations"] for stage in progress["stages"]] == [2, 2, 2]
    assert progress["last"]["seconds"].keys() == {"gram", "gradient", "update"}
    report = call("status", "--run", tmp_path / "result.run").out
    assert "done" in report and "100×80" in report and "2/2" in report


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a finished run of two stages. Tests must not change it."""
    from pipeline import load_config, run

    config = write_run(tmp_path_factory.mktemp("finished"), (90, 70))
    run(load_config(config))
    return config.parent


@pytest.fixture
def finished(finished_run, tmp_path) -> Path:
    """A copy of the finished run that a test may change."""
    import shutil

    shutil.copytree(finished_run, tmp_path / "finished")
    (tmp_path / "finished" / "out.png").unlink()  # written by another run directory
    return tmp_path / "finished"


def test_finished_run_is_not_computed_again(finished, call):
    """The same command again must neither render again nor fail."""
    config = finished / "config.yaml"
    assert call("run", "-c", config).code == 0
    before, picture = (finished / "run" / "journal.jsonl").read_bytes(), (finished / "out.png").stat()
    outcome = call("run", "-c", config, "--log-format", "plain")
    assert outcome.code == 0
    assert "already there" in outcome.err
    assert (finished / "run" / "journal.jsonl").read_bytes() == before
    assert (finished / "out.png").stat().st_mtime_ns == picture.st_mtime_ns


def test_lost_picture_is_exported_again_without_computing(finished, call):
    """A deleted output is exported again without rendering."""
    count = len(iterations(finished / "run"))
    assert call("run", "-c", finished / "config.yaml").code == 0
    expected = (finished / "out.png").read_bytes()
    (finished / "out.png").unlink()
    assert call("run", "-c", finished / "config.yaml").code == 0
    assert (finished / "out.png").read_bytes() == expected
    assert len(iterations(finished / "run")) == count


def test_changed_export_settings_make_the_picture_anew(finished, call):
    """A change of the bit depth must export the image again."""
    config, count = finished / "config.yaml", len(iterations(finished / "run"))
    assert call("run", "-c", config).code == 0
    assert call("run", "-c", config, "--set", "export.bits=16").code == 0
    assert read_picture(finished / "out.png").dtype == np.uint16
    assert len(iterations(finished / "run")) == count


@pytest.mark.parametrize("suffix", [".tif", ".png", ".jpg", ".dz", ".zarr"])
def test_export_of_every_stage_in_every_format(finished, call, suffix):
    """Every stage can be exported in every format."""
    (finished / "exports").mkdir()
    for stage, size in ((0, (37, 48, 3)), (1, (70, 90, 3))):
        output = finished / "exports" / f"stage_{stage}{suffix}"
        outcome = call("export", "--run", finished / "run", "--stage", stage + 1, "-o", output)
        assert outcome.code == 0, outcome.err
        assert outcome.out.strip() == str(output)
        pixels = exported_pixels(output)
        assert pixels.shape == size
        difference = np.abs(pixels - canvas_of(finished / "run", stage))
        if suffix in (".jpg", ".dz"):
            assert difference.mean() < 15  # of noise JPEG keeps little
        else:
            assert difference.max() <= 0.5
        assert leftovers(output) == []
        assert call("export", "--run", finished / "run", "--stage", stage + 1, "-o", output).code == 3  # exists
        assert call("export", "--run", finished / "run", "--stage", stage + 1, "-o", output, "--force").code == 0


def test_a_suffix_in_capitals_is_the_same_format(finished, call):
    """The check before a run and the writer after it must accept the same suffixes."""
    output = finished / "capitals.ZARR"
    assert call("export", "--run", finished / "run", "--stage", 1, "-o", output).code == 0
    assert (output / "0" / "zarr.json").is_file()


def exported_pixels(output: Path) -> np.ndarray:
    """An image of any format as (H, W, 3). Reads the largest level of a DeepZoom, which must be one tile."""
    if output.suffix == ".zarr":
        import zarr

        return np.moveaxis(np.asarray(zarr.open_array(output / "0", mode="r")[...]), 0, -1)
    if output.suffix == ".dz":
        levels = (output / f"{output.stem}_files").iterdir()
        return read_picture(max(levels, key=lambda level: int(level.name)) / "0_0.jpg")
    return read_picture(output)


def canvas_of(work_dir: Path, stage: int) -> np.ndarray:
    """The retained canvas of a stage, read with plain zarr."""
    import zarr

    (path,) = (work_dir / "store.zarr" / f"stage_{stage}").glob("canvas_?")
    return np.asarray(zarr.open_array(path, mode="r")[...])


def test_export_options_and_mistakes(finished, call):
    """16-bit output has 16 bits of precision, and wrong options give a message instead of a traceback."""
    run = finished / "run"
    assert call("export", "--run", run, "-o", finished / "deep.png", "--bits", 16).code == 0
    deep = read_picture(finished / "deep.png")
    assert deep.dtype == np.uint16
    assert np.abs(deep / 257 - canvas_of(run, 1)).max() <= 0.51 / 257
    assert call("export", "--run", run, "-o", finished / "q.jpg", "--quality", 5).code == 0
    assert call("export", "--run", run, "-o", finished / "w.jpg", "--quality", 95).code == 0
    assert (finished / "q.jpg").stat().st_size < (finished / "w.jpg").stat().st_size
    assert (
        call("export", "-c", finished / "config.yaml", "-o", finished / "none.tif", "--compression", "none").code == 0
    )

    for wrong, code, what in [
        (["--stage", 7], 3, "stages with one: 1, 2"),
        (["--stage", 0], 2, "--stage"),
        (["-o", finished / "x.gif"], 3, ".gif"),
        (["-o", finished / "nosuffix"], 3, "suffix"),
        (["-o", finished / "x.jpg", "--bits", 16], 3, "8 bits|16 bits"),
        (["-o", finished / "config.yaml" / "x.png"], 3, "is a file"),
    ]:
        options = wrong if "-o" in wrong else [*wrong, "-o", finished / "x.png"]
        outcome = call("export", "--run", run, *options)
        assert (outcome.code, "Traceback" in outcome.err) == (code, False), outcome.err
        assert re.search(what, outcome.err), outcome.err
    assert not list(finished.glob("x.*"))


@pytest.mark.parametrize("command", ["export", "preview --size 48", "preview --crop 0,0,20,20"])
def test_no_folder_is_made_for_a_picture_that_the_command_line_names(finished, call, command):
    """A mistyped path must not create folders."""
    before = sorted(finished.rglob("*"))
    for name in ("some/new/tree/x.png", "neu/x.png"):
        outcome = call(*command.split(), "-c", finished / "config.yaml", "-o", finished / name)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (3, "", 1), outcome
        assert f"there is no folder {(finished / name).parent}. Make it" in outcome.err
        assert sorted(finished.rglob("*")) == before
    (finished / "neu").mkdir()
    outcome = call(*command.split(), "-c", finished / "config.yaml", "-o", finished / "neu" / "x.png")
    assert outcome.code == 0, outcome.err


def test_the_configs_own_output_may_be_in_a_new_folder(tmp_path, call):
    """As in the quickstart: a config that is copied with its images runs without preparation."""
    config = write_run(tmp_path, output="out/new/x.png")
    assert call("run", "-c", config).code == 0
    assert (tmp_path / "out" / "new" / "x.png").exists()


UNHEEDED = [
    ("x.png", ["--compression", "jpeg"], "compression: PNG supports only deflate, not jpeg", ".tif or .jpg or .dz"),
    ("x.jpg", ["--compression", "zstd"], "compression: JPEG supports only jpeg, not zstd", "choose .zarr"),
    ("x.dz", ["--compression", "deflate"], "compression: DeepZoom supports only jpeg, not deflate", ".tif or .png"),
    ("x.zarr", ["--compression", "none"], "compression: OME-Zarr supports only zstd, not none", ".tif"),
    ("x.png", ["--quality", "95"], "quality: applies to JPEG only, and PNG does not", ".jpg or .dz, or .tif with"),
    ("x.zarr", ["--quality", "5"], "quality: applies to JPEG only, and OME-Zarr", ".jpg"),
    ("x.tif", ["--quality", "5"], "and TIFF with compression deflate does not use", "or .tif with compression jpeg"),
    ("x.dz", ["--no-pyramid"], "pyramid: DeepZoom is always a pyramid", ".tif or .png or .jpg"),
    ("x.zarr", ["--no-pyramid"], "pyramid: OME-Zarr is always a pyramid", ".tif or .png or .jpg"),
    ("x.png", ["--pyramid"], "pyramid: PNG does not support pyramids", ".tif or .dz or .zarr"),
    (
        "x.png",
        ["--compression", "jpeg", "--quality", "7"],
        "quality: applies to JPEG only",
        "compression: PNG supports",
    ),
]


@pytest.mark.parametrize(("name", "options", "why", "instead"), UNHEEDED)
def test_options_that_a_format_passes_over_are_refused(finished, call, name, options, why, instead):
    """An option that the format would ignore is an error."""
    outcome = call("export", "--run", finished / "run", "-o", finished / name, *options)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (3, "", 1), outcome
    assert str(finished / name) in outcome.err and why in outcome.err and instead in outcome.err
    assert not (finished / name).exists()


HEEDED = [
    ("x.tif", ["--compression", "jpeg", "--quality", "95"]),
    ("x.tif", ["--no-pyramid", "--compression", "deflate"]),
    ("x.png", ["--compression", "deflate", "--no-pyramid"]),
    ("x.jpg", ["--compression", "jpeg", "--quality", "95"]),
    ("x.dz", ["--compression", "jpeg", "--quality", "95", "--pyramid"]),
    ("x.zarr", ["--compression", "zstd", "--pyramid"]),
]


@pytest.mark.parametrize(("name", "options"), HEEDED)
def test_options_that_say_what_a_format_does_are_taken(finished, call, name, options):
    """An option that agrees with the format is accepted."""
    outcome = call("export", "--run", finished / "run", "-o", finished / name, *options)
    assert outcome.code == 0, outcome.err


def test_a_config_may_give_its_defaults_to_any_format(tmp_path, call):
    """`pipeline init` writes all keys, so every format must accept the defaults."""
    export = {"bits": "auto", "compression": "deflate", "quality": 95, "pyramid": True, "profile": "srgb"}
    for suffix in (".tif", ".png", ".jpg", ".dz", ".zarr"):
        config = write_run(tmp_path, export=export, output=f"out{suffix}")
        outcome = call("plan", "-c", config)
        assert outcome.code == 0, outcome.err


def test_a_config_with_options_that_its_format_passes_over(tmp_path, call):
    """The same check before a run, with all errors at once."""
    config = write_run(tmp_path, export={"compression": "zstd", "quality": 80})
    outcome = call("run", "-c", config)
    assert outcome.code == 3
    for line in ("export.compression: PNG supports only deflate", "export.quality: applies to JPEG only"):
        assert line in outcome.err
    assert not (tmp_path / "run").exists()
    assert call("plan", "-c", config, "--set", "export.pyramid=false", "--set", "output=x.zarr").code == 3


def test_quality_of_tiles_that_are_png(tmp_path, call):
    """A DeepZoom with alpha has PNG tiles, so `quality` has no effect; only the content tells."""
    config = write_run(tmp_path, content_kind=PixelKind(8, alpha=True), output="out.dz", export={"quality": 50})
    for command in ("plan", "run"):
        outcome = call(command, "-c", config)
        assert (outcome.code, outcome.err.count("\n")) == (3, 1), outcome
        assert "quality: applies to JPEG only, and DeepZoom with alpha does not" in outcome.err
    assert not (tmp_path / "run").exists()
    assert call("run", "-c", config, "--set", "export.quality=95").code == 0
    outcome = call("export", "--run", tmp_path / "run", "-o", tmp_path / "x.dz", "--quality", 50)
    assert outcome.code == 3 and "DeepZoom with alpha" in outcome.err


def test_doctor(call):
    """A bug report needs the versions and the hardware."""
    outcome = call("doctor")
    assert outcome.code == 0
    for what in ("python", "torch", "zarr", "libvips", "device", "memory", "disk"):
        assert re.search(rf"(?m)^{what} +\S", outcome.out), what


# --- wrong usage, wrong settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["paint"],
        ["run"],
        ["run", "--config"],
        ["run", "-c", "x.yaml", "--fast"],
        ["run", "-c", "x.yaml", "--log-format", "xml"],
        ["plan", "x.yaml"],
        ["status"],
        ["status", "-c", "x.yaml", "--run", "run"],
        ["export", "--run", "run"],
        ["export", "--run", "run", "-o", "x.png", "--bits", "12"],
        ["export", "--run", "run", "-o", "x.png", "--stage", "last"],
        ["export", "--run", "run", "-o", "x.png", "--quality", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(call, argv):
    """Scripts distinguish usage errors from failed runs."""
    outcome = call(*argv)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" not in outcome.err
    assert outcome.err.strip()


def test_set_changes_and_checks_values(tmp_path, call):
    """A mistyped --set is an error, not ignored."""
    config = write_run(tmp_path, (100, 80))
    changed = call("plan", "-c", config, "--json", "--set", "size=64", "--set", "compute.tile_px=32")
    as_json = json.loads(changed.out)
    assert as_json["stages"][-1]["size"] == [51, 64]
    assert as_json["tile_px"] == 32
    for setting, word in {
        "optimiser.max_iterations=3": "optimizer",
        "optimizer.max_iterations=none": "max_iterations",
        "loss.kind=gaty": "gatys",
        "size=8": "16",
        "size": "=",
        "compute.tile_px=48": "multiple",
    }.items():
        for command in ("plan", "run"):
            outcome = call(command, "-c", config, "--set", setting)
            assert (outcome.code, outcome.out) == (3, ""), setting
            assert word in outcome.err and "Traceback" not in outcome.err, outcome.err
    outcome = call("run", "-c", config, "--set", "size=8", "--set", "loss.kind=gaty", "--set", "seeed=3")
    assert all(word in outcome.err for word in ("size", "gatys", "seed"))  # all at once
    assert not (tmp_path / "run").exists()


def test_foreign_output_is_kept_unless_forced(tmp_path, call):
    """An existing file at the output path is refused before the run."""
    config = write_run(tmp_path)
    (tmp_path / "out.png").write_bytes(b"mine")
    outcome = call("run", "-c", config)
    assert outcome.code == 3
    assert "--force" in outcome.err and not iterations(tmp_path / "run")
    assert (tmp_path / "out.png").read_bytes() == b"mine"
    assert call("run", "-c", config, "--force").code == 0
    assert read_picture(tmp_path / "out.png").shape == (52, 70, 3)
    assert call("run", "-c", config).code == 0  # this run has written it


def test_refused_before_the_start_what_cannot_end(tmp_path, call):
    """Predictable errors (memory, limits of a format, disk space) are reported before the run."""
    config = write_run(tmp_path)
    for settings, words in [
        (["memory.limit=100MiB"], ["memory.limit", "MiB"]),
        (["size=70000", "output=wide.jpg", "compute.tile_px=auto", "store.chunk_px=512"], ["65,500"]),
    ]:
        for command in ("plan", "run"):
            outcome = call(command, "-c", config, *(f"--set={setting}" for setting in settings))
            assert (outcome.code, outcome.out) == (3, ""), outcome.err
            assert all(word in outcome.err for word in words), outcome.err
    large = ["size=300000", "store.chunk_px=512", "compute.tile_px=auto", "limits.max_result_pixels=100000000000"]
    outcome = call("run", "-c", config, *(f"--set={setting}" for setting in large))
    assert outcome.code == 5 and "GiB are free" in outcome.err, outcome.err
    assert not (tmp_path / "out.png").exists()


# --- what is printed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["20", "40", "80"])
def test_narrow_terminals_lose_nothing(finished, call, monkeypatch, columns):
    """Numbers are not truncated to '15…' in a narrow terminal or a log."""
    monkeypatch.setenv("COLUMNS", columns)
    config = finished / "config.yaml"
    shown = call("plan", "-c", config)
    assert shown.code == 0
    assert "…" not in shown.out
    assert re.search(r"(?m)^ *2 +90×70 +4 +×\d+\.\d\d +\d+\.\d\d KiB +\d+\.\d GFLOP$", shown.out), shown.out
    shown = call("status", "-c", config)
    assert "…" not in shown.out
    assert re.search(r"(?m)^ *2 +90×70 +done +2/2 +all iterations done +\d+s$", shown.out), shown.out
    for command in ("run", "plan", "status", "export", "init", "doctor"):
        helped = call(command, "--help")
        assert (helped.code, helped.err) == (0, "")
        assert "Traceback" not in helped.out and "--help" in helped.out
    helped = call("--help")
    assert "75" in helped.out and "resum" in helped.out.lower()


def test_plan_on_a_real_narrow_terminal(finished):
    """The same on a real terminal instead of a pipe."""
    import fcntl
    import pty
    import struct
    import subprocess
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    argv = [PIPELINE, "plan", "-c", finished / "config.yaml"]
    process = subprocess.Popen(argv, stdout=slave, stderr=slave, env={**environment, "TERM": "xterm"})
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 4096):
            shown += part
    except OSError:  # Linux: nobody has the terminal any more
        pass
    os.close(master)
    assert process.wait(TIMEOUT_S) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())
    assert "…" not in text
    assert re.search(r"(?m)^ *2 +90×70 +4 +×\d+\.\d\d +\d+\.\d\d KiB +\d+\.\d GFLOP\r?$", text), text
    prose = text.splitlines()[4:]
    assert prose and all(len(line) <= 40 or " " not in line.strip() for line in prose), text


def test_brackets_and_colons_in_names_are_printed_as_they_are(tmp_path, call):
    """A folder called '[/old] :x:' looks like markup of rich."""
    folder = tmp_path / "[/old] [red]x :smile:"
    config = write_run(folder, optimizer={"max_iterations": 1})
    for log_format in ("plain", "live"):
        outcome = call("run", "-c", config, "--log-format", log_format, "--set", f"output={folder / log_format}.png")
        assert outcome.code == 0, outcome.err
        assert "[/old] [red]x :smile:" in outcome.err.replace("\n", "")
    for command in ("plan", "status"):
        outcome = call(command, "-c", config)
        assert outcome.code == 0, outcome.err
        assert "[/old] [red]x :smile:" in outcome.out.replace("\n", "")


def test_plain_logs_show_the_progress(tmp_path, call):
    """Stages, iterations, losses and times of the passes."""
    config = write_run(tmp_path, (90, 70))
    plain = call("run", "-c", config)  # stderr is no terminal here
    assert "stage 1 of 2: 48×37 px, 1 tile" in plain.err
    assert "stage 2 of 2: 90×70 px, 4 tiles" in plain.err
    assert re.search(r"iteration 2/2: content \S+, style \S+, mean\|u\| \S+; gram \S+s gradient \S+s", plain.err)
    assert "stage 1: all iterations done (2)" in plain.err
    assert "\x1b" not in plain.err


# --- settings that change the picture --------------------------------------------------------------------------------


def render(call, folder: Path, content_px=(70, 52), style_px=(60, 50), **keys: Any) -> np.ndarray:
    """The output of a small run in a folder of its own. Checks that all losses are finite."""
    config = write_run(folder, content_px, style_px, **keys)
    outcome = call("run", "-c", config)
    assert outcome.code == 0, outcome.err
    for record in iterations(folder / "run"):
        assert np.isfinite([record["objective"], record["alpha"], record["mean_abs_u"], record["max_abs_u"]]).all()
    return read_picture(folder / "out.png")


def test_several_styles_are_mixed_by_weight(tmp_path, call):
    """All styles and their weights affect the output."""
    alone = render(call, tmp_path / "alone")
    mixed = {}
    for weights in ((1.0, 0.0), (1.0, 1.0), (2.0, 2.0), (0.25, 0.75)):
        folder = tmp_path / f"mixed_{weights}"
        folder.mkdir()
        write_picture(folder / "second.png", 80, 40, seed=5)
        styles = [{"image": name, "weight": w} for name, w in zip(("style.png", "second.png"), weights, strict=True)]
        mixed[weights] = render(call, folder, styles=styles, initial_size=80)
    assert np.array_equal(mixed[1.0, 1.0], mixed[2.0, 2.0])
    assert not np.array_equal(mixed[1.0, 1.0], mixed[0.25, 0.75])
    assert not np.array_equal(mixed[1.0, 1.0], mixed[1.0, 0.0])
    assert alone.shape == mixed[1.0, 0.0].shape


def test_noise_is_seeded(tmp_path, call):
    """Noise depends on the seed only, so a run can be reproduced."""
    first, again, other = (
        render(call, tmp_path / name, init="noise", seed=seed) for name, seed in (("a", 4), ("b", 4), ("c", 5))
    )
    assert np.array_equal(first, again)
    assert canvases(tmp_path / "a" / "run") == canvases(tmp_path / "b" / "run")
    assert not np.array_equal(first, other)


def test_codecs_change_the_disk_and_not_the_picture(tmp_path, call):
    """Compression of the state must not change the output."""
    for codec in ("none", "zstd", "lz4"):
        render(call, tmp_path / codec, store={"codec": codec})
    none, *others = (results_without_metadata(tmp_path / codec / "run") for codec in ("none", "zstd", "lz4"))
    assert others == [none, none]
    pictures = {(tmp_path / codec / "out.png").read_bytes() for codec in ("none", "zstd", "lz4")}
    assert len(pictures) == 1
    assert canvases(tmp_path / "none" / "run") != canvases(tmp_path / "zstd" / "run")


def results_without_metadata(work_dir: Path) -> list[dict[str, Any]]:
    """The results, without the checksums of the metadata files, which name the codec."""
    records = results(work_dir)
    for record in records:
        sums = record.get("checksums", {})
        record["checksums"] = {name: value for name, value in sums.items() if not name.endswith("zarr.json")}
    return records


def test_every_kind_of_network_loss_and_schedule_runs(tmp_path, call):
    """Every allowed setting works, and changes the output."""
    kinds: dict[str, dict[str, Any]] = {
        "zeros": {"network": {"padding": "zeros"}},
        "reflect": {"network": {"padding": "reflect"}},
        "max": {"network": {"pooling": "max"}},
        "scaled average": {"network": {"pooling": "average", "pooling_scale": 1.3}},
        "tent": {"network": {"pooling": "tent"}},
        "l2": {"network": {"pooling": "l2"}},
        "normalized": {"loss": {"kind": "normalized"}},
        "rgb": {"optimizer": {"color_space": "rgb"}},
        "gatys": {"loss": {"kind": "gatys", "content_weight": 1.0, "style_weight": 100.0}},
        "style_only": {"loss": {"content_weight": 0.0}},
        "content_only": {"loss": {"style_weight": 0.0}, "init": "noise"},
        "shallow": {"network": {"content_layers": {"conv2_2": 1.0}, "style_layers": {"conv1_1": 1.0}}},
        "constant": {"optimizer": {"schedule": "constant"}},
        "unclipped": {"optimizer": {"clip": False}},
        "float64": {"compute": {"dtype": "float64"}},
        "bfloat16": {"compute": {"dtype": "bfloat16"}},
    }
    base = {"initial_size": 70}
    pictures = {"default": render(call, tmp_path / "default", **base)}
    for name, keys in kinds.items():
        pictures[name] = render(call, tmp_path / name, **{**base, **keys})
        assert pictures[name].std() > 5, name
        close = name in ("float64", "bfloat16")  # the same picture, but for rounding
        assert np.array_equal(pictures[name], pictures["default"]) <= close, name
    # a tie of two pixels under a maximum, broken by rounding, moves both: not a level on average
    assert np.abs(pictures["float64"].astype(int) - pictures["default"]).mean() < 1


def test_alike_content_and_style_converge(tmp_path, call):
    """Zero gradients must not cause a division by zero."""
    write_run(tmp_path)
    (tmp_path / "style.png").write_bytes((tmp_path / "content.png").read_bytes())
    config = write_config(tmp_path, initial_size=70, optimizer={"max_iterations": 3})
    outcome = call("run", "-c", config)
    assert outcome.code == 0, outcome.err
    assert np.array_equal(read_picture(tmp_path / "out.png"), read_picture(tmp_path / "content.png"))
    ended = [record for record in journal(tmp_path / "run") if record["type"] == "stage_done"]
    assert [(record["reason"], record["iterations"]) for record in ended] == [("converged", 0)]
    assert json.loads(call("status", "-c", config, "--json").out)["state"] == "done"
    assert call("status", "-c", config).code == 0


def test_stop_condition_ends_a_stage_early_and_says_so(tmp_path, call):
    """The stop condition ends a stage, and the journal records the reason."""
    render(call, tmp_path / "stopped", (90, 70), optimizer={"max_iterations": 5, "stop_condition": 100.0})
    ended = [record for record in journal(tmp_path / "stopped" / "run") if record["type"] == "stage_done"]
    assert [(record["stage"], record["reason"], record["iterations"]) for record in ended] == [
        (0, "stop_condition", 1),
        (1, "stop_condition", 1),
    ]
    assert "change below stop_condition" in call("status", "--run", tmp_path / "stopped" / "run").out


@pytest.mark.parametrize(
    ("content", "style", "keys", "sizes"),
    [
        ((120, 90), (60, 50), {"size": 60}, [(48, 36), (60, 45)]),
        ((60, 45), (60, 50), {"size": 130}, [(48, 36), (96, 72), (130, 98)]),
        ((60, 45), (150, 140), {}, [(48, 36), (60, 45), (60, 45)]),
        ((60, 45), (40, 150), {"initial_size": 100}, [(60, 45), (60, 45)]),
        ((33, 97), (60, 50), {"size": 95}, [(16, 48), (32, 95)]),
    ],
    ids=["smaller", "larger", "style_larger", "style_tall", "odd"],
)
def test_sizes_of_stages(tmp_path, call, content, style, keys, sizes):
    """The output has the requested size, and a large style is used at full size."""
    picture = render(call, tmp_path / "run_here", content, style, **keys)
    assert picture.shape == (sizes[-1][1], sizes[-1][0], 3)
    progress = json.loads(call("status", "--run", tmp_path / "run_here" / "run", "--json").out)
    assert [(stage["width_px"], stage["height_px"]) for stage in progress["stages"]] == sizes


def test_weights_files_of_both_kinds_run(tmp_path, call):
    """Weights files in both formats give the same output."""
    import torch
    from safetensors.torch import save_file

    from pipeline.network.vgg import random_state
    from pipeline.network.weights import find_weights

    state = random_state(find_weights("random", None, 0))
    torch.save(state, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    expected = render(call, tmp_path / "random")
    for name in ("w.pth", "w.safetensors"):
        network = {"name": "vgg19", "weights": str(tmp_path / name)}
        assert np.array_equal(render(call, tmp_path / f"run_{name}", network=network), expected)


def test_relative_paths_are_of_the_config_and_of_the_command(tmp_path, call, monkeypatch):
    """A config works from any current folder."""
    config = write_run(tmp_path / "project", initial_size=70)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    relative = os.path.relpath(config)
    assert call("run", "-c", relative, "--set", "output=here.png").code == 0
    assert (tmp_path / "elsewhere" / "here.png").exists()
    assert (tmp_path / "project" / "run" / "journal.jsonl").exists()
    assert call("export", "-c", relative, "-o", "there.png").code == 0
    assert (tmp_path / "elsewhere" / "there.png").read_bytes() == (tmp_path / "elsewhere" / "here.png").read_bytes()


def test_the_minimal_config_is_enough(tmp_path, call):
    """The defaults do not contradict each other."""
    write_run(tmp_path)
    path = tmp_path / "minimal.yaml"
    keys = {"content": "content.png", "styles": [{"image": "style.png"}], "output": "out.jpg"}
    path.write_text(yaml.safe_dump(keys))
    outcome = call("plan", "-c", path)
    assert outcome.code == 0, outcome.err
    assert "out.run" in outcome.out
