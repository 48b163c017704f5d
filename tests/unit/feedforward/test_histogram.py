"""`match_histogram`: an enlargement in the histogram of its content, whatever the tiles, and after any crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.commands.apply import apply, apply_plan
from pipeline.core.errors import ConfigError
from pipeline.feedforward.histogram import _BINS, _curve
from tests.support.networks import write_network, write_wct
from tests.support.pictures import picture, write
from tests.unit.feedforward.test_apply import canvas, config, crashed_at_every_commit, pixels_of, whole

HEIGHT, WIDTH = 45, 67
SPEC: dict[str, Any] = {"task": "super-resolution", "factor": 4, "norm": "batch"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_network(tmp_path / "net.safetensors", **SPEC)
    write(tmp_path / "content.png", picture(HEIGHT, WIDTH))
    return tmp_path


def enlarge(folder: Path, name: str, **compute: Any) -> np.ndarray:
    apply(config(folder, output=name, match_histogram=True, compute={"tile_px": 112, **compute}))
    return canvas((folder / name).with_suffix(".run"))


def reference(enlarged: np.ndarray, content: np.ndarray, level: float) -> np.ndarray:
    """By ranks: the pixel with a share p of the others below it gets the content's value of that share.

    A level of the content is spread evenly over its width, `level`.
    """
    result = np.empty_like(enlarged)
    for channel in range(3):
        own, other = enlarged[..., channel].reshape(-1), np.sort(content[..., channel].reshape(-1))
        order = np.argsort(own, kind="stable")
        values, first, counts = np.unique(other, return_index=True, return_counts=True)
        at = (np.arange(own.size) + 0.5) / own.size * other.size
        index = np.searchsorted(first, at, side="right") - 1
        within = (at - first[index]) / counts[index] - 0.5
        matched = np.empty(own.size)
        matched[order] = (values[index] + level * within).clip(0, 255)
        result[..., channel] = matched.reshape(enlarged.shape[:2])
    return result


@pytest.mark.parametrize("bits", [8, 16])
def test_the_enlargement_has_the_contents_histogram(folder: Path, bits: int) -> None:
    """A network that was trained for detail drifts in colour and contrast, which the paper corrects so."""
    pixels = picture(HEIGHT, WIDTH, bits=bits)
    write(folder / "content.png", pixels)
    levels = (pixels / np.float32(1 if bits == 8 else 257)).astype(np.float32)  # as the store reads it
    result = enlarge(folder, "out.tif")
    before = whole(folder, levels, **SPEC)
    expected = reference(before, levels, 1 if bits == 8 else 1 / 257)
    # pixels that lie in one step of 1/257 level get one value, where the ranks have several
    assert np.abs(result - expected).mean() < 0.05
    for channel in range(3):
        shares = [np.sort(image[..., channel].reshape(-1)) for image in (levels, result, before)]
        at = np.linspace(0.01, 0.99, 99)
        wanted, reached, drifted = (np.quantile(share, at) for share in shares)
        assert np.abs(reached - wanted).max() < 2 < np.abs(drifted - wanted).max()
        order = np.argsort(before[..., channel].reshape(-1))
        assert (np.diff(result[..., channel].reshape(-1)[order]) >= -1e-5).all()


def test_tiles_and_processes_do_not_change_the_histogram(folder: Path) -> None:
    """Counted tile by tile, the picture would have a seam at each tile."""
    results = [enlarge(folder, f"{index}.tif", tile_px=tile_px) for index, tile_px in enumerate((288, 112))]
    # float64: the network's output differs by 1e-10 between tiles, and then T by as much
    assert all(np.abs(result - results[0]).max() < 1e-2 for result in results)
    assert np.array_equal(enlarge(folder, "2.tif", workers=2), results[1])


def test_a_picture_in_the_contents_histogram_stays_as_it_is() -> None:
    """Matching would add banding to a picture that needs nothing."""
    counts = np.random.default_rng(0).integers(1, 100, _BINS)
    assert np.abs(_curve(counts, counts, 1) - np.arange(_BINS) / 257).max() < 0.001


def test_a_crash_at_any_commit_resumes_to_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matched twice, a picture would have another histogram."""
    once = enlarge(folder, "once.tif")
    crashed = crashed_at_every_commit(monkeypatch, lambda: enlarge(folder, "out.tif"))
    assert sum(kind == "pass" for kind, *_ in crashed) == 4  # the network's picture, and the match
    assert np.array_equal(canvas(folder / "out.run"), once)
    assert np.array_equal(pixels_of(folder / "out.tif"), pixels_of(folder / "once.tif"))


def test_it_is_for_enlargements(folder: Path) -> None:
    """A style would lose its colours."""
    write_network(folder / "style.safetensors")
    write_wct(folder / "wct.safetensors")
    for network in ("style.safetensors", "wct.safetensors"):
        with pytest.raises(ConfigError, match="match_histogram: is for networks of super-resolution"):
            apply_plan(config(folder, networks=network, match_histogram=True))
    enlarge(folder, "out.tif")
    with pytest.raises(ConfigError, match="match_histogram"):
        apply(config(folder, output="out.tif", compute={"tile_px": 112}))
