"""Activations that stay on the disk between the passes: the picture, what a crash leaves, and when they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.commands.apply import apply, apply_plan
from pipeline.commands.clean import clean
from pipeline.commands.verify.verify import verify
from pipeline.config import ApplyConfig
from pipeline.core.errors import ConfigError, SpaceError
from pipeline.feedforward import activations, strategy, tile_tasks
from pipeline.feedforward.spec import TransformSpec
from pipeline.rundir import Journal
from pipeline.store import ChunkError, open_array, other_slot
from tests.support.inputs import write_image
from tests.support.networks import write_network
from tests.support.pictures import picture, write

KINDS: dict[str, dict[str, Any]] = {
    "two blocks": {"blocks": 2},
    "three blocks": {"blocks": 3, "pixels": "bytes"},
    "no blocks": {"blocks": 0},
    "styles": {"blocks": 2, "styles": ("a", "b")},
    "original": {"blocks": 2, "start_padding_px": 40, "block_padding": False, "upsampling": "fractional"},
    "super-resolution": {"task": "super-resolution", "factor": 4, "blocks": 2, "norm": "instance"},
    "skip": {"task": "super-resolution", "factor": 4, "blocks": 2, "skip": "bicubic", "output": "linear"},
}


def config(folder: Path, activations: str = "store", **keys: Any) -> ApplyConfig:
    compute = {"device": "cpu", "dtype": "float64", "threads": 1, **keys.pop("compute", {})}
    store = {"chunk_px": 16, **keys.pop("store", {})}
    values = {"networks": "net.safetensors", "content": "content.png", "output": "out.png", "activations": activations}
    return ApplyConfig.model_validate({**values, "store": store, **keys, "compute": compute}, context={"base": folder})


def canvas(work_dir: Path) -> np.ndarray:
    array = open_array(work_dir / "store.zarr" / "stage_0", "canvas_1")
    return array.read_window(array.rect)


def expected(folder: Path, pixels_HWC: np.ndarray, seed: int, style: list[float], **spec: Any) -> np.ndarray:
    """The torch module's output for a whole image, 0..255."""
    network = write_network(folder / "again.safetensors", seed, **spec).double()
    image = torch.from_numpy(pixels_HWC.astype(np.float64)).permute(2, 0, 1)[None]
    with torch.no_grad():
        out = network(image, torch.tensor([style], dtype=torch.float64))
    return out.clamp(0, 255)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_is_the_whole_networks(tmp_path: Path, kind: str) -> None:
    """Otherwise a picture would depend on how it was computed: one tile, several, and ragged ones, at odd sizes."""
    spec = KINDS[kind]
    height, width = (18, 21) if "factor" in spec else (57, 75)
    write_network(tmp_path / "net.safetensors", **spec)
    pixels = picture(height, width)
    write(tmp_path / "content.png", pixels)
    several = kind == "styles"
    network = {"file": "net.safetensors", "styles": {"a": 0.25, "b": 0.75} if several else None}
    whole = expected(tmp_path, pixels, 0, [0.25, 0.75] if several else [1.0], **spec)
    factor = whole.shape[0] // height
    assert whole.std() > 1
    for tile_px in (96, 32, 16)[: 3 if kind == "three blocks" else 2]:
        name = f"out{tile_px}"
        keys = {"output": f"{name}.png", "networks": [network], "size": width * factor}
        apply(config(tmp_path, compute={"tile_px": tile_px}, **keys))
        assert np.abs(canvas(tmp_path / f"{name}.run") - whole).max() < 1e-10, tile_px
        assert [path.name for path in (tmp_path / f"{name}.run/store.zarr/stage_0").iterdir() if path.is_dir()] == [
            "canvas_1"
        ]  # nothing is left of them


def test_two_networks_keep_their_own(tmp_path: Path) -> None:
    """Otherwise the second network would overwrite what the first one's pixels are made of."""
    write_network(tmp_path / "net.safetensors", blocks=2)
    write_network(tmp_path / "other.safetensors", seed=1, blocks=1, width=0.25)
    pixels = picture(45, 67)
    write(tmp_path / "content.png", pixels)
    left = np.zeros((45, 67, 3), np.uint8)
    left[:, :30] = 255
    write(tmp_path / "left.png", left)
    masked = [{"file": "net.safetensors", "mask": "left.png"}, {"file": "other.safetensors"}]
    apply(config(tmp_path, networks=masked, compute={"tile_px": 32}))
    painted = canvas(tmp_path / "out.run")
    for part, seed, spec in ((np.s_[:, :30], 0, {"blocks": 2}), (np.s_[:, 30:], 1, {"blocks": 1, "width": 0.25})):
        assert np.abs(painted[part] - expected(tmp_path, pixels, seed, [1.0], **spec)[part]).max() < 1e-10
    apply(config(tmp_path, networks=masked[:1], output="alone.png"))
    assert np.array_equal(canvas(tmp_path / "alone.run")[:, 30:], pixels[:, 30:])  # black: left as it is
    apply(config(tmp_path, output="gray.png", color="luminance"))
    apply(config(tmp_path, "recompute", output="again.png", color="luminance"))
    assert np.abs(canvas(tmp_path / "gray.run") - canvas(tmp_path / "again.run")).max() < 1e-10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_network(tmp_path / "net.safetensors", blocks=2)
    write_image(tmp_path / "content.png", 57, 75)
    return tmp_path


class KilledError(BaseException):
    """In place of a kill: nothing handles it."""


def test_a_crash_in_the_middle_of_any_pass_resumes_to_the_same_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a pass could have overwritten what its repetition reads, and the picture would be wrong."""
    small = {"tile_px": 32}
    apply(config(folder, output="once.png", compute=small))
    task, crashed = tile_tasks.moments_task, set()

    def killed(spec: Any) -> Any:
        if spec.tile.index == 3 and spec.norm not in crashed:
            crashed.add(spec.norm)
            raise KilledError
        return task(spec)

    with monkeypatch.context() as patch:
        patch.setattr(tile_tasks, "moments_task", killed)
        for _ in _until_it_ends(config(folder, compute=small)):
            assert not verify(folder / "out.run").found
    assert len(crashed) == 9
    assert np.array_equal(canvas(folder / "out.run"), canvas(folder / "once.run"))
    assert (folder / "out.png").read_bytes() == (folder / "once.png").read_bytes()
    assert verify(folder / "out.run").clean


def _until_it_ends(settings: ApplyConfig) -> Iterator[None]:
    while True:
        try:
            apply(settings)
            return
        except KilledError:
            yield


def stopped_after(folder: Path, monkeypatch: pytest.MonkeyPatch, passes: int, **keys: Any) -> None:
    append = Journal.append

    def killed(journal: Journal, record: Any) -> None:
        append(journal, record)
        if getattr(record, "type", "") == "pass" and record.iteration + 1 == passes:
            raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Journal, "append", killed)
        apply(config(folder, **keys))


def test_damage_is_found_and_computed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a flipped bit on the disk would spread through all later passes into the picture."""
    stopped_after(folder, monkeypatch, 4)
    stage = folder / "out.run" / "store.zarr" / "stage_0"
    for name in ("activations_0_0", "activations_0_1", "skip_0_0", "skip_0_1"):
        chunk = stage / name / "c" / "1" / "1" / "0"
        data = bytearray(chunk.read_bytes())
        data[5] ^= 1
        chunk.write_bytes(data)
    found = {problem.array for problem in verify(folder / "out.run").found}
    assert found == {"activations_0_1", "skip_0_1"}  # the other slots are written before they are read
    with pytest.raises(ChunkError, match="is not what was written there"):
        apply(config(folder))
    assert verify(folder / "out.run", repair=True).clean
    apply(config(folder))
    apply(config(folder, output="once.png"))
    assert np.array_equal(canvas(folder / "out.run"), canvas(folder / "once.run"))


def test_a_run_keeps_its_choice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a resumed run would not find what its next pass begins at."""
    monkeypatch.setattr(strategy, "_LEAST_GAIN", {"cpu": 0})
    stopped_after(folder, monkeypatch, 5, activations="auto")
    assert apply_plan(config(folder, "auto")).keeps
    monkeypatch.setattr(strategy, "_LEAST_GAIN", {"cpu": 1e9})
    assert apply_plan(config(folder, "auto")).keeps
    with pytest.raises(ConfigError, match="activations: was auto, is recompute"):
        apply(config(folder, "recompute"))
    for _ in ("resumes", "does nothing"):
        apply(config(folder, "auto"))
    assert not apply_plan(config(folder, "auto", output="new.png")).keeps
    stopped_after(folder, monkeypatch, 5, activations="auto", output="new.png")
    monkeypatch.setattr(strategy, "_LEAST_GAIN", {"cpu": 0})
    assert not apply_plan(config(folder, "auto", output="new.png")).keeps
    apply(config(folder, "auto", output="new.png"))
    assert np.abs(canvas(folder / "new.run") - canvas(folder / "out.run")).max() < 1e-10
    clean(folder / "new.run")
    assert not (folder / "new.run" / "store.zarr").exists()


def test_the_plan_says_what_is_kept_and_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a disk would fill up, or a picture take five times as long, and nobody would know why."""
    monkeypatch.setattr(strategy, "_LEAST_GAIN", {"cpu": 0})
    kept = apply_plan(config(folder, "auto"))
    (note,) = (note for note in kept.plan.notes if note.startswith("activations: "))
    assert "of disk space: " in note and "times less to compute" in note
    again = apply_plan(config(folder, "recompute"))
    assert kept.plan.flop < again.plan.flop
    added = sum(array.stored_bytes for name, array in kept.arrays.items() if other_slot(name))
    assert kept.plan.disk_bytes == again.plan.disk_bytes + added > again.plan.disk_bytes
    stored = folder / "out.run" / "store.zarr" / "stage_0"
    stopped_after(folder, monkeypatch, 1)
    on_disk = {name: sum(file.stat().st_size for file in stored.glob(f"{name}/c/*/*/*")) for name in kept.arrays}
    assert on_disk == {name: array.stored_bytes for name, array in kept.arrays.items()}

    def note_of(**keys: Any) -> str:
        return apply_plan(config(folder, "auto", output="other.png", **keys)).plan.notes[0]

    with monkeypatch.context() as patch:
        patch.setattr(strategy, "free_space", lambda _folder: added)
        assert "more than half of the" in note_of()
    with monkeypatch.context() as patch:
        patch.setattr(strategy, "_LEAST_GAIN", {"cpu": 1e9})
        assert "operations per byte" in note_of()
    with pytest.raises(SpaceError, match="still needs"):
        limits = {"max_result_pixels": 10**12}
        apply(config(folder, output="huge.png", size=200_000, limits=limits, store={"chunk_px": 512}))
    assert not (folder / "huge.run").exists()


def test_networks_without_passes_have_none(folder: Path) -> None:
    """Otherwise a key that changes nothing would be taken without a word."""
    write_network(folder / "batch.safetensors", norm="batch")
    assert not apply_plan(config(folder, "auto", networks="batch.safetensors")).keeps
    with pytest.raises(ConfigError, match="activations: store is for networks with instance norm"):
        apply(config(folder, networks="batch.safetensors"))


def test_half_the_numbers_are_close_but_not_exact(folder: Path) -> None:
    """Otherwise `bfloat16` would be either no saving or another picture."""
    for form in ("store", "bfloat16"):
        codec = {"codec": "lz4" if form == "bfloat16" else "none"}
        apply(config(folder, form, output=f"{form}.png", compute={"dtype": "float32"}, store=codec))
    difference = np.abs(canvas(folder / "store.run") - canvas(folder / "bfloat16.run"))
    assert 0 < difference.max() < 8 and difference.mean() < 0.5
    halved = [apply_plan(config(folder, form, compute={"dtype": "float32"})) for form in ("store", "bfloat16")]
    sizes = [sum(a.stored_bytes for name, a in one.arrays.items() if other_slot(name)) for one in halved]
    assert sizes[1] * 2 == sizes[0]
    assert "approximate" in halved[1].plan.notes[0]


@pytest.mark.parametrize("blocks", [0, 1, 5])
def test_no_pass_overwrites_what_it_or_a_later_one_reads(blocks: int) -> None:
    """Otherwise a killed pass could not be repeated."""
    spec, valid = TransformSpec(blocks=blocks), set()
    for step in activations.steps_of(spec, 0, (64, 64), keeps=True):
        read = {name for name in (step.origin and step.origin.array, step.origin and step.origin.skip) if name}
        assert read <= valid and not read & set(step.written)
        valid -= {other_slot(name) for name in step.written}
        valid |= set(step.written)
