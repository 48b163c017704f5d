"""Invalid input ends with one clear message and the right exit code, and leaves no partial files.

Every case runs the command itself. Mounts need root; without it those cases are skipped.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.e2e import (
    Outcome,
    canvases,
    journal,
    leftovers,
    results,
    write_config,
    write_picture,
    write_run,
)

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")


def assert_one_sentence(outcome: Outcome, code: int, *words: object) -> None:
    """Check that the error is printed once, on stderr, with these words and without a traceback."""
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.err, outcome.err
    assert outcome.err.count("pipeline: error: ") == 1, outcome.err
    assert all(str(word) in outcome.err for word in words), outcome.err


def assert_nothing_written(folder: Path) -> None:
    assert not (folder / "out.png").exists()
    assert leftovers(folder / "out.png") == []


# --- images ----------------------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, without pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def make_cut_jpeg(path: Path) -> None:
    write_picture(path.with_suffix(".jpg"), 70, 52).replace(path)
    cut(path, 0.5)


def make_cut_png(path: Path) -> None:
    write_picture(path.with_suffix(".png"), 70, 52).replace(path)
    cut(path, 0.5)


def make_cut_tiff(path: Path) -> None:
    write_picture(path.with_suffix(".tif"), 70, 52).replace(path)
    cut(path, 0.5)


IMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "not an intact image"),
    "text": (lambda path: path.write_text("This is a recipe for soup.\n" * 50), "not an intact image"),
    "directory": (lambda path: path.mkdir(), "directory"),
    "pipe": (os.mkfifo, "a pipe or a device"),
    "svg": (lambda path: path.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="99" height="99"/>'), "image"),
    "cut_header": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0"), "image"),
    "cut_jpeg": (make_cut_jpeg, "truncated"),
    "cut_png": (make_cut_png, "truncated"),
    "cut_tiff": (make_cut_tiff, ""),
    "huge_header": (lambda path: path.write_bytes(png_header(900_000, 900_000)), "claims 900000×900000 px"),
    "one_pixel": (lambda path: write_picture(path.with_suffix(".png"), 1, 1).replace(path), "1×1 px"),
    "one_row": (lambda path: write_picture(path.with_suffix(".png"), 300, 1).replace(path), "×1 px"),
}


@pytest.mark.parametrize("role", ["content", "style"])
@pytest.mark.parametrize("case", IMAGES)
def test_image_that_cannot_be_used(tmp_path, call, role, case):
    """An unusable image must not cause a traceback, a grey output or an out-of-memory error."""
    make, words = IMAGES[case]
    write_run(tmp_path)
    bad = tmp_path / "bad.jpg"  # whatever it is, it claims to be a JPEG
    make(bad)
    key = {"content": str(bad)} if role == "content" else {"styles": [{"image": "style.png"}, {"image": str(bad)}]}
    outcome = call("run", "-c", write_config(tmp_path, **key))
    assert_one_sentence(outcome, 3, bad, words)
    assert_nothing_written(tmp_path)


def test_header_of_a_possible_size_needs_no_memory(tmp_path, call):
    """A file of 100 bytes that claims a gigapixel must not exhaust memory."""
    write_run(tmp_path)
    (tmp_path / "content.png").write_bytes(png_header(60_000, 60_000))
    outcome = call("run", "-c", write_config(tmp_path, size=70))
    assert_one_sentence(outcome, 3, "content.png")
    assert_nothing_written(tmp_path)


# --- weights ---------------------------------------------------------------------------------------------------------


def save_safetensors(path: Path, state: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(state, path)


def small_state() -> dict[str, Any]:
    from tests.support.reference import narrow_state

    return narrow_state()


class Harmful:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def make_other_network(path: Path) -> None:
    import torch

    save_safetensors(path, {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.bn1.bias": torch.zeros(64)})


def make_wrong_shapes(path: Path) -> None:
    import torch

    save_safetensors(path, {**small_state(), "conv2_1.weight": torch.zeros(8, 99, 3, 3)})


def make_too_shallow(path: Path) -> None:
    save_safetensors(path, {key: value for key, value in small_state().items() if not key.startswith("conv5")})


def make_cut_safetensors(path: Path) -> None:
    save_safetensors(path, small_state())
    cut(path, 0.9)


def make_cut_pth(path: Path) -> None:
    import torch

    torch.save(small_state(), path)
    cut(path, 0.7)


def make_whole_model(path: Path) -> None:
    import torch

    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), path)


def make_nan(path: Path) -> None:
    state = small_state()
    state["conv3_1.weight"][0, 0, 0, 0] = float("nan")
    save_safetensors(path, state)


WEIGHTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("w.safetensors", lambda path: None, "network.weights: no such file"),
    "missing_pth": ("w.pth", lambda path: None, "network.weights: no such file"),
    "directory": ("w.safetensors", lambda path: path.mkdir(), "weights file"),
    "directory_pth": ("w.pth", lambda path: path.mkdir(), "weights file"),
    "text": ("w.safetensors", lambda path: path.write_text("soup " * 99), "weights file"),
    "text_pth": ("w.pth", lambda path: path.write_text("soup " * 99), "weights file"),
    "empty": ("w.safetensors", lambda path: path.write_bytes(b""), "weights file"),
    "empty_pth": ("w.pth", lambda path: path.write_bytes(b""), "weights file"),
    "image": ("w.pth", lambda path: write_picture(path.with_suffix(".png"), 9, 9).replace(path), "weights file"),
    "cut": ("w.safetensors", make_cut_safetensors, "weights file"),
    "cut_pth": ("w.pth", make_cut_pth, "weights file"),
    "other_network": ("w.safetensors", make_other_network, "VGG-19-shaped"),
    "wrong_shapes": ("w.safetensors", make_wrong_shapes, "another network"),
    "too_shallow": ("w.safetensors", make_too_shallow, "conv5_1"),
    "whole_model": ("w.pth", make_whole_model, "weights file"),
    "nan": ("w.safetensors", make_nan, ""),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_cannot_be_used(tmp_path, call, case):
    """The weights of another network must not give noise, or a traceback of torch."""
    name, make, words = WEIGHTS[case]
    write_run(tmp_path)
    make(tmp_path / name)
    keys = {"name": "vgg19", "weights": name}
    outcome = call("run", "-c", write_config(tmp_path, network=keys))
    assert_one_sentence(outcome, 3, words)
    if case != "nan":
        assert str(tmp_path / name) in outcome.err
    assert_nothing_written(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_code_is_not_run(tmp_path, call, monkeypatch):
    """A weights file from the internet must not run code, whatever an environment variable allows."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    write_run(tmp_path)
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"conv1_1.weight": Harmful(tmp_path / "proof")}))
    outcome = call("run", "-c", write_config(tmp_path, network={"name": "vgg19", "weights": "w.pth"}))
    assert_one_sentence(outcome, 3, "w.pth")
    assert not (tmp_path / "proof").exists()


# --- places ----------------------------------------------------------------------------------------------------------


def test_places_that_cannot_be_written(tmp_path, call):
    """A mistyped folder is reported before the run."""
    config = write_run(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for setting, words in {
        "work_dir=file": "file",
        "work_dir=file/below/run": "file",
        "work_dir=loop/run": "loop",
        "output=file/below/out.png": "file",
        "output=folder.png": "folder",
    }.items():
        key, value = setting.split("=")
        outcome = call("run", "-c", config, "--set", f"{key}={tmp_path / value}")
        assert_one_sentence(outcome, 3, words)
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "run" / "journal.jsonl").exists()


def test_folder_of_somebody_else_is_left_alone(tmp_path, call):
    """A work_dir mistyped as ~/Pictures must not be filled with state, nor its folders deleted."""
    config = write_run(tmp_path)
    (tmp_path / "pictures" / "stage_0").mkdir(parents=True)
    (tmp_path / "pictures" / "stage_0" / "photo.jpg").write_text("mine")
    outcome = call("run", "-c", config, "--set", f"work_dir={tmp_path / 'pictures'}")
    assert_one_sentence(outcome, 3, "pictures")
    assert [path.name for path in (tmp_path / "pictures").rglob("*")] == ["stage_0", "photo.jpg"]


def test_output_folder_of_somebody_else_is_left_alone(tmp_path, call):
    """An output mistyped as another image's folder must not replace it."""
    config = write_run(tmp_path)
    for suffix in (".zarr", ".dz"):
        (tmp_path / f"other{suffix}").mkdir()
        (tmp_path / f"other{suffix}" / "precious").write_text("mine")
        outcome = call("run", "-c", config, "--set", f"output={tmp_path / 'other'}{suffix}")
        assert_one_sentence(outcome, 3, f"other{suffix}")
        assert (tmp_path / f"other{suffix}" / "precious").read_text() == "mine"


def test_names_cannot_steer_the_terminal(tmp_path, call):
    """Control characters in a file name must not clear the screen or fake output."""
    folder = tmp_path / "\x1b[2J\r\x9bfake"
    folder.mkdir()
    for outcome in (call("status", "--run", folder), call("plan", "-c", folder / "none.yaml")):
        assert outcome.code == 3
        assert not {"\x1b", "\r", "\x9b"} & set(outcome.err), outcome.err
        assert "fake" in outcome.err


def test_no_run_and_no_config(tmp_path, call):
    """A mistyped name must not cause a traceback or start a run."""
    (tmp_path / "empty").mkdir()
    for command in (["status"], ["export", "-o", tmp_path / "x.png"]):
        for folder in ("empty", "missing"):
            assert_one_sentence(call(*command, "--run", tmp_path / folder), 3, folder)
        assert_one_sentence(call(*command, "-c", tmp_path / "missing.yaml"), 3, "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "empty.yaml").write_text("")
    for name in ("missing.yaml", "empty", "binary.yaml", "empty.yaml"):
        outcome = call("run", "-c", tmp_path / name)
        assert (outcome.code, "Traceback" in outcome.err) == (3, False), outcome
        assert name in outcome.err
    assert not (tmp_path / "missing").exists() and not (tmp_path / "x.png").exists()
    assert_one_sentence(call("init", tmp_path / "missing" / "config.yaml"), 3, "missing")


# --- disks that are small, full or read-only -------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path, leave_bytes: int = 0) -> Path:
    """Fill the disk up to `leave_bytes`; returns the file that fills it."""
    path = disk / "filler"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - leave_bytes)
    return path


@NEEDS_ROOT
def test_read_only_disk(tmp_path, call, small_disk):
    """A disk that went read-only is not reported as a bug."""
    config = write_run(tmp_path)
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for setting in ("work_dir=run", "work_dir=new", "output=out.png", "output=new/out.png"):
        key, name = setting.split("=")
        outcome = call("run", "-c", config, "--set", f"{key}={small_disk / name}")
        assert_one_sentence(outcome, 5, small_disk)
    assert call("init", small_disk / "config.yaml").code == 3


@NEEDS_ROOT
def test_disk_too_small_is_refused_before_the_start(tmp_path, call, small_disk):
    """A disk that is too small is reported before the run."""
    config = write_run(tmp_path, size=600)
    for place in (small_disk / "run", small_disk / "new" / "run"):
        outcome = call("run", "-c", config, "--set", f"work_dir={place}")
        assert_one_sentence(outcome, 5, place, "iB are free")
        assert not results(place)
    # and what the message advises is no change of the config
    outcome = call("run", "-c", config, "--set", f"work_dir={small_disk / 'run'}", "--set", "size=70")
    assert outcome.code == 0, outcome.err


@pytest.fixture(scope="module")
def unbroken(nursery, tmp_path_factory) -> dict[str, Path]:
    """The folders of uninterrupted runs, by codec."""
    configs = {codec: write_run(tmp_path_factory.mktemp(codec), store={"codec": codec}) for codec in ("none", "zstd")}
    for config in configs.values():
        assert nursery.run("run", "-c", config).wait() == 0
    return {codec: config.parent for codec, config in configs.items()}


@NEEDS_ROOT
@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("moment", ["start", "content", "first stage", "last stage"])
def test_disk_that_fills_up_while_rendering(tmp_path, nursery, unbroken, small_disk, codec, moment):
    """A full disk ends the run without a traceback; once there is space, the run resumes."""
    keys = {"work_dir": "disk/run", "output": "disk/out.png", "store": {"codec": codec}}
    config, expected = write_run(tmp_path, **keys), unbroken[codec]

    if moment == "start":
        filler = fill(small_disk)
    child = nursery.start("run", "-c", config, "--log-format", "json")
    if moment != "start":
        reached = {
            "content": {"what": "content", "stage": 0},
            "first stage": {"what": "update pass", "stage": 0},
            "last stage": {"what": "update pass", "stage": 1},
        }[moment]
        assert child.wait_until(lambda events: any(reached.items() <= event.items() for event in events)), child.err
        with child.paused():  # it is as quick as the disk is filled
            filler = fill(small_disk, 2**16 if (codec, moment) == ("none", "last stage") else 0)
    code = child.wait()
    if (codec, moment) == ("none", "last stage"):
        assert code == 0, child.err  # what a stage writes has its place from the beginning, but for the journal
    else:
        lines = [line for line in child.err.splitlines() if not line.startswith("{")]
        assert_one_sentence(Outcome(code, "", "\n".join(lines)), 5, small_disk)
        assert_nothing_written(small_disk)

    filler.unlink()
    again = nursery.run("run", "-c", config)
    assert again.wait() == 0, again.err
    assert results(small_disk / "run") == results(expected / "run")
    assert canvases(small_disk / "run") == canvases(expected / "run")
    assert (small_disk / "out.png").read_bytes() == (expected / "out.png").read_bytes()


@NEEDS_ROOT
def test_finished_run_needs_no_room(tmp_path, call, small_disk):
    """A finished run must not ask again for the disk space of its stages."""
    config = write_run(tmp_path, (200, 200), work_dir="disk/run", initial_size=200, optimizer={"max_iterations": 1})
    assert call("run", "-c", config).code == 0
    fill(small_disk, leave_bytes=8192)
    assert call("run", "-c", config).code == 0
    outcome = call("run", "-c", config, "--set", f"output={small_disk / 'out.tif'}")
    assert_one_sentence(outcome, 5, small_disk)
    assert leftovers(small_disk / "out.tif") == []


@NEEDS_ROOT
@pytest.mark.parametrize("suffix", [".tif", ".png", ".jpg", ".dz", ".zarr"])
def test_disk_full_at_export(tmp_path, call, small_disk, suffix):
    """A partial image must not have the name of the output."""
    config = write_run(
        tmp_path, (300, 300), initial_size=300, optimizer={"max_iterations": 1}, compute={"tile_px": 320}
    )
    assert call("run", "-c", config).code == 0
    output = small_disk / f"out{suffix}"
    filler = fill(small_disk, leave_bytes=8192)
    outcome = call("export", "-c", config, "-o", output)
    assert_one_sentence(outcome, 5, output)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    filler.unlink()
    assert call("export", "-c", config, "-o", output).code == 0


# --- damaged state ---------------------------------------------------------------------------------------------------


def make_stopped(folder: Path, codec: str) -> Path:
    """A run that was stopped after the first iteration of its second stage."""
    from pipeline import load_config, run
    from pipeline.core.errors import Stopped
    from pipeline.core.events import Event, IterationDone

    config = write_run(folder, (90, 70), store={"codec": codec})
    stop = threading.Event()

    def sink(event: Event) -> None:
        if isinstance(event, IterationDone) and (event.stage, event.iteration) == (1, 0):
            stop.set()

    with pytest.raises(Stopped):
        run(load_config(config), sink=sink, stop=stop)
    return folder


@pytest.fixture(scope="module")
def stopped_runs(tmp_path_factory) -> dict[str, Path]:
    return {codec: make_stopped(tmp_path_factory.mktemp(codec), codec) for codec in ("none", "zstd")}


def flip(path: Path, at: int = -200) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def garble_first_line(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(['{"half a li\n', *lines[1:]]))


def change_format(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


STAGE = "store.zarr/stage_1"
# what is damaged, how, and the commands that must notice; canvas_1 is what comes next, canvas_0 is written over
DAMAGES: dict[str, tuple[str, str, Callable[[Path], Any], str]] = {
    "canvas chunk deleted": ("none", f"{STAGE}/canvas_1/c/1/1/0", Path.unlink, "run export"),
    "canvas chunk cut": ("none", f"{STAGE}/canvas_1/c/0/0/0", lambda path: cut(path, 0.5), "run export"),
    "canvas chunk empty": ("none", f"{STAGE}/canvas_1/c/0/0/0", lambda path: cut(path, 0), "run export"),
    "idle chunk deleted": ("none", f"{STAGE}/canvas_0/c/0/1/0", Path.unlink, "run"),
    "moment chunk deleted": ("none", f"{STAGE}/m_1/c/0/2/0", Path.unlink, "run"),
    "gradient chunk deleted": ("none", f"{STAGE}/gradient/c/0/0/0", Path.unlink, "run"),
    "feature chunk cut": ("none", f"{STAGE}/features_conv4_2/c/0/0/0", lambda path: cut(path, 0.9), "run"),
    "style target deleted": ("none", f"{STAGE}/gram_conv3_1", shutil.rmtree, "run"),
    "style target cut": ("none", f"{STAGE}/gram_conv3_1/c/0/0", lambda path: cut(path, 0.5), "run"),
    "array deleted": ("none", f"{STAGE}/canvas_1", shutil.rmtree, "run export"),
    "array garbled": ("none", f"{STAGE}/canvas_1/zarr.json", lambda path: path.write_text("{"), "run export"),
    "array of another kind": ("none", f"{STAGE}/canvas_1/zarr.json", lambda path: path.write_text("[]"), "run export"),
    "stage deleted": ("none", STAGE, shutil.rmtree, "run export"),
    "store deleted": ("none", "store.zarr", shutil.rmtree, "run export"),
    "compressed chunk deleted": ("zstd", f"{STAGE}/canvas_1/c/1/1/0", Path.unlink, "run export"),
    "compressed chunk cut": ("zstd", f"{STAGE}/canvas_1/c/1/1/0", lambda path: cut(path, 0.5), "run export"),
    "compressed chunk garbled": (
        "zstd",
        f"{STAGE}/canvas_1/c/0/0/0",
        lambda path: path.write_bytes(b"soup"),
        "run export",
    ),
    "manifest cut": ("none", "manifest.json", lambda path: cut(path, 0.5), "run export status"),
    "manifest emptied": ("none", "manifest.json", lambda path: cut(path, 0), "run export status"),
    "manifest a list": ("none", "manifest.json", lambda path: path.write_text("[1]"), "run export status"),
    "manifest of the future": ("none", "manifest.json", change_format, "run export status"),
    "journal line flipped": ("none", "journal.jsonl", flip, "run export status"),
    "journal line garbled": ("none", "journal.jsonl", garble_first_line, "run export status"),
    "journal binary": ("none", "journal.jsonl", lambda path: path.write_bytes(bytes(range(256))), "run export status"),
    "journal emptied": ("none", "journal.jsonl", lambda path: cut(path, 0), "run"),
    "journal deleted": ("none", "journal.jsonl", Path.unlink, "run"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_state_is_told(stopped_runs, tmp_path, call, case):
    """Damage is reported, and does not get into the output."""
    codec, name, damage, commands = DAMAGES[case]
    folder = tmp_path / "run_here"
    shutil.copytree(stopped_runs[codec], folder)
    damage(folder / "run" / name)
    before = journal(folder / "run") if name != "journal.jsonl" else None
    config = folder / "config.yaml"
    for command in commands.split():
        argv = ["export", "-o", folder / "out.png"] if command == "export" else [command]
        outcome = call(*argv, "-c", config)
        assert_one_sentence(outcome, 6)
        assert str(folder / "run") in outcome.err
        assert_nothing_written(folder)
    assert before is None or journal(folder / "run") == before


def test_undamaged_copies_go_on(stopped_runs, tmp_path, call):
    """A check of the cases above: the undamaged copies can be resumed."""
    for codec in ("none", "zstd"):
        shutil.copytree(stopped_runs[codec], tmp_path / codec)
        assert call("run", "-c", tmp_path / codec / "config.yaml").code == 0


def test_changed_file_in_one_process_is_noticed(tmp_path):
    """A notebook may run, change an image and run again."""
    from pipeline import load_config, run
    from pipeline.core.errors import ConfigError

    config = write_run(tmp_path, optimizer={"max_iterations": 1})
    run(load_config(config))
    write_picture(tmp_path / "style.png", 60, 50, seed=77)
    with pytest.raises(ConfigError, match=r"styles\.0\.image"):
        run(load_config(config))
