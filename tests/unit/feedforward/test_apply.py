"""`apply` in this process: exact in tiles, resumed after a crash at any commit, and refused where it must be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import torch

from pipeline import store
from pipeline.commands.apply import apply, apply_plan
from pipeline.commands.export import export
from pipeline.commands.run import run
from pipeline.commands.status import status
from pipeline.commands.verify.verify import verify
from pipeline.config import ApplyConfig, Config, load_config
from pipeline.core.errors import ConfigError, InputError
from pipeline.rundir import Journal, journal_path
from pipeline.store import ChunkError
from pipeline.viewer.snapshot import RunReader
from pipeline.viewer.state import run_state
from tests.support.inputs import write_image
from tests.support.networks import write_network
from tests.support.pictures import picture, write

HEIGHT, WIDTH = 45, 67


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_network(tmp_path / "net.safetensors")
    write_image(tmp_path / "content.png", HEIGHT, WIDTH)
    return tmp_path


def config(folder: Path, **keys: Any) -> ApplyConfig:
    compute = {"device": "cpu", "dtype": "float64", "threads": 1, **keys.pop("compute", {})}
    values = {"networks": "net.safetensors", "content": "content.png", "output": "out.png", "store": {"chunk_px": 16}}
    return ApplyConfig.model_validate({**values, **keys, "compute": compute}, context={"base": folder})


def canvas(work_dir: Path) -> np.ndarray:
    array = store.open_array(work_dir / "store.zarr" / "stage_0", "canvas_1")
    return array.read_window(array.rect)


def whole(folder: Path, pixels_HWC: np.ndarray, seed: int = 0, **spec: Any) -> np.ndarray:
    """The torch module's output for a whole image, 0..255."""
    network = write_network(folder / "again.safetensors", seed, **spec).double()
    image = torch.from_numpy(pixels_HWC.astype(np.float64)).permute(2, 0, 1)[None]
    with torch.no_grad():
        return network(image).clamp(0, 255)[0].permute(1, 2, 0).numpy()


def pixels_of(path: Path) -> np.ndarray:
    return pyvips.Image.new_from_file(str(path)).numpy()


@pytest.mark.parametrize(("tile_px", "workers"), [(80, 0), (48, 0), (16, 0)])
def test_the_canvas_is_the_modules_output_whatever_the_tiles(folder: Path, tile_px: int, workers: int) -> None:
    apply(config(folder, compute={"tile_px": tile_px, "workers": workers}))
    expected = whole(folder, pixels_of(folder / "content.png"))
    assert np.abs(canvas(folder / "out.run") - expected).max() < 1e-10
    assert np.array_equal(pixels_of(folder / "out.png"), np.rint(expected))


@pytest.mark.parametrize("skip", [{}, {"skip": "bicubic", "output": "linear", "norm": "batch"}])
def test_super_resolution_enlarges(folder: Path, skip: dict[str, Any]) -> None:
    spec = {"task": "super-resolution", "factor": 4, **skip}
    write_network(folder / "net.safetensors", **spec)
    apply(config(folder, size=4 * WIDTH, compute={"tile_px": 112}))
    expected = whole(folder, pixels_of(folder / "content.png"), **spec)
    assert canvas(folder / "out.run").shape == (4 * HEIGHT, 4 * WIDTH, 3)
    assert np.abs(canvas(folder / "out.run") - expected).max() < 1e-10


def test_sixteen_bits_and_alpha_pass_and_luminance_keeps_the_colours(folder: Path) -> None:
    colors = picture(HEIGHT, WIDTH, bits=16)
    alpha = np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)
    alpha[10:20] = 30000
    write(folder / "content.png", np.concatenate([colors, alpha], axis=2))
    apply(config(folder, color="luminance", output="out.tif", compute={"tile_px": 32}))
    result = pixels_of(folder / "out.tif")
    assert (result.dtype, result.shape) == (np.uint16, (HEIGHT, WIDTH, 4))
    assert np.array_equal(result[..., 3], alpha[..., 0])
    content, painted = colors[20:] / 257, canvas(folder / "out.run")[20:]
    changed = whole(folder, colors / 257)[20:] - content
    gray = (changed @ np.array([0.299, 0.587, 0.114]))[..., None]
    # the norms see the transparent rows over white, so only differences of channels can be compared
    kept = (np.minimum(content, painted).min(-1) > 1) & (painted.max(-1) < 254)
    assert kept.any() and gray.std() > 1
    assert np.abs((painted - content) - (painted - content)[..., :1])[kept].max() < 1e-3


def test_masks_between_two_networks(folder: Path) -> None:
    write_network(folder / "other.safetensors", seed=1)
    left = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    left[:, :30] = 255
    write(folder / "left.png", left)
    pixels = pixels_of(folder / "content.png")
    both = whole(folder, pixels), whole(folder, pixels, seed=1)
    masked = [{"file": "net.safetensors", "mask": "left.png"}, {"file": "other.safetensors"}]
    apply(config(folder, networks=masked, compute={"tile_px": 32}))
    painted = canvas(folder / "out.run")
    assert np.abs(painted[:, :30] - both[0][:, :30]).max() < 1e-10
    assert np.abs(painted[:, 30:] - both[1][:, 30:]).max() < 1e-10
    apply(config(folder, networks=masked[:1], output="alone.png"))
    assert np.array_equal(canvas(folder / "alone.run")[:, 30:], pixels[:, 30:])  # black: left as it is


class KilledError(BaseException):
    """In place of a kill: nothing handles it."""


def crashed_at_every_commit(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> set[tuple[str, int, str]]:
    """Repeat `call` until it ends, with a crash before and after every commit; gives (record, iteration, when)."""
    append, crashed = Journal.append, set[tuple[str, int, str]]()

    def killed(journal: Journal, record: Any) -> None:
        for moment in ("before", "after"):
            if (key := (record.type, getattr(record, "iteration", 0), moment)) not in crashed:
                crashed.add(key)
                raise KilledError
            if moment == "before":
                append(journal, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", killed)
        for _ in range(100):
            try:
                call()
                return crashed
            except KilledError:
                continue
    raise AssertionError("it does not end")


def test_a_crash_before_or_after_any_commit_resumes_to_the_same_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(config(folder, output="once.png", compute={"tile_px": 32}))
    crashed = crashed_at_every_commit(monkeypatch, lambda: apply(config(folder, compute={"tile_px": 32})))
    # begun, prepared, 7 norms, the canvas, done, exporting, exported: before and after each
    assert len(crashed) == 2 * 13
    assert np.array_equal(canvas(folder / "out.run"), canvas(folder / "once.run"))
    assert (folder / "out.png").read_bytes() == (folder / "once.png").read_bytes()
    kinds = [record.type for record in Journal(journal_path(folder / "out.run")).read()]  # type: ignore[attr-defined]
    assert kinds.count("pass") == 8  # no pass was repeated after its commit
    assert verify(folder / "out.run").clean
    assert status(folder / "out.run")["state"] == "done"


def test_a_damaged_input_is_found_before_a_pass_reads_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Journal.append

    def killed(journal: Journal, record: Any) -> None:
        append(journal, record)
        if getattr(record, "type", "") == "pass":
            raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Journal, "append", killed)
        apply(config(folder))
    with pytest.raises(ConfigError, match="written by the last pass, which is not done"):
        export(folder / "out.run", folder / "early.png")
    assert status(folder / "out.run")["iteration"] == 1
    snapshot = RunReader(folder / "out.run").latest()
    assert not snapshot.problem and run_state(snapshot)["stages"]
    chunk = folder / "out.run" / "store.zarr" / "stage_0" / "content" / "c" / "1" / "2" / "0"
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(ChunkError, match="is not what was written there"):
        apply(config(folder))
    assert [problem.path for problem in verify(folder / "out.run").remaining] == [chunk]
    assert verify(folder / "out.run", repair=True).clean
    apply(config(folder))
    expected = whole(folder, pixels_of(folder / "content.png"))
    assert np.abs(canvas(folder / "out.run") - expected).max() < 1e-10


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="too small for the network"):
        write_network(folder / "large.safetensors", start_padding_px=40, block_padding=False)
        write_image(folder / "small.png", 30, 60)
        apply(config(folder, networks="large.safetensors", content="small.png"))
    with pytest.raises(ConfigError, match="no multiple of 4"):
        write_network(folder / "sr.safetensors", task="super-resolution", factor=4)
        apply(config(folder, networks="sr.safetensors", size=66))
    with pytest.raises(ConfigError, match="is no style of"):
        apply(config(folder, networks=[{"file": "net.safetensors", "styles": {"wood": 1.0}}]))
    with pytest.raises(ConfigError, match=r"phase: export\), but 64.00 MiB is the limit"):
        apply(config(folder, memory={"limit": "64MiB"}))
    assert not (folder / "out.run").exists() and not (folder / "out.png").exists()
    apply(config(folder))
    write_network(folder / "net.safetensors", seed=5)
    with pytest.raises(ConfigError, match=r"networks\.0\.file: the content of the file has changed"):
        apply(config(folder, output="out.tif", work_dir="out.run"))
    (folder / "apply.yaml").write_text("networks: net.safetensors\ncontent: content.png\noutput: out.png\n")
    with pytest.raises(ConfigError, match="1:1: networks: a key of `pipeline apply`"):
        load_config(folder / "apply.yaml")
    values = {"content": "content.png", "styles": [{"image": "content.png"}], "output": "out.png"}
    with pytest.raises(ConfigError, match="was begun by `pipeline apply`"):
        run(Config.model_validate({**values, "network": {"name": "random"}, "size": 64}, context={"base": folder}))


def test_commands_take_the_config_of_apply_and_a_run_whose_content_is_gone(folder: Path, call: Any) -> None:
    """A user who keeps the config and not the photo could not export again, nor look at the picture."""
    text = "networks: net.safetensors\ncontent: content.png\noutput: out.png\nstore: {chunk_px: 16}\n"
    (folder / "apply.yaml").write_text(text + "compute: {device: cpu, threads: 1}\n")
    assert call("apply", "-c", folder / "apply.yaml").code == 0
    (folder / "content.png").unlink()
    for command in (["status"], ["clean", "--dry-run"], ["export", "-o", folder / "copy.png"]):
        outcome = call(*command, "-c", folder / "apply.yaml")
        assert outcome.code == 0, outcome
    assert (folder / "copy.png").exists()
    outcome = call("view", "--allow-crops", "-c", folder / "apply.yaml")
    assert (outcome.code, "--allow-crops is for runs" in outcome.err) == (2, True), outcome


def test_the_plan_counts_what_is_there(folder: Path) -> None:
    planned = apply_plan(config(folder, compute={"tile_px": 32}))
    assert planned.stage.max_iterations == len(planned.norms) + 1 == 8
    apply(config(folder, compute={"tile_px": 32}))
    kept = sum(file.stat().st_size for file in (folder / "out.run").glob("store.zarr/stage_0/canvas_1/c/*/*/*"))
    assert kept == planned.stage.kept_bytes


@pytest.mark.parametrize("tile_px", [80, 32])
def test_a_run_starts_from_the_networks_picture(folder: Path, tile_px: int) -> None:
    values = {
        "content": "content.png",
        "styles": [{"image": "content.png"}],
        "output": "out.png",
        "init": "apply:net.safetensors",
        "initial_size": WIDTH,
        "network": {"name": "random"},
        "optimizer": {"max_iterations": 1, "target_pixel_change": 1e-9},
        "compute": {"device": "cpu", "dtype": "float64", "tile_px": tile_px},
        "store": {"chunk_px": 16},
    }
    config = Config.model_validate(values, context={"base": folder})
    run(config)
    painted = store.open_array(folder / "out.run" / "store.zarr" / "stage_0", "canvas_1")
    expected = whole(folder, pixels_of(folder / "content.png"))
    assert np.abs(painted.read_window(painted.rect) - expected).max() < 1e-8
    write_network(folder / "net.safetensors", seed=5)
    with pytest.raises(ConfigError, match=r"init\.apply: the content of the file has changed"):
        run(config.model_copy(update={"output": folder / "out.tif"}))
