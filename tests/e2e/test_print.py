"""Printing, end to end: sizes on paper, edges and panels of small runs, read by Pillow and tifffile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

import pipeline
from pipeline.config import ExportConfig
from pipeline.core.image_formats import PixelKind
from tests.support.e2e import Outcome, journal, write_config, write_run


def iterations(folder: Path) -> int:
    return sum(record["type"] == "iteration" for record in journal(folder / "run"))


def done(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


def size_and_dpi(path: Path) -> tuple[tuple[int, int], float]:
    with Image.open(path) as image:
        return image.size, round(image.info["dpi"][0], 2)


def test_the_px_of_a_size_on_paper_are_what_a_resume_compares(tmp_path, call):
    """A size that is written in another way is the same picture; another resolution is not."""
    size = {"height": "10mm", "dpi": 254}
    done(call("run", "-c", write_run(tmp_path, size=size)))
    assert size_and_dpi(tmp_path / "out.png") == ((135, 100), 254)
    computed = iterations(tmp_path)

    again = done(call("run", "-c", write_config(tmp_path, size=135, export={"dpi": 254})))
    assert "already there" in again.err
    other = call("run", "-c", write_config(tmp_path, size={"height": "10mm", "dpi": 300}))
    assert other.code == 3 and "size: was 135, is 159" in other.err
    done(call("verify", "-c", write_config(tmp_path, size=size)))
    assert iterations(tmp_path) == computed


def test_dpi_and_edges_of_a_finished_run_are_an_export(tmp_path, call):
    """Hours would be rendered again for the wish of a printer."""
    done(call("run", "-c", write_run(tmp_path)))
    computed, output = iterations(tmp_path), tmp_path / "out.png"
    assert size_and_dpi(output) == ((70, 52), 300)
    with Image.open(output) as image:
        canvas = np.asarray(image)

    done(call("run", "-c", write_config(tmp_path, export={"dpi": 254})))
    assert size_and_dpi(output) == ((70, 52), 254)
    path = write_config(tmp_path, export={"dpi": 254, "bleed": "0.5mm", "border": "1mm", "wrap": {"mirror": "2mm"}})
    done(call("run", "-c", path))
    with Image.open(output) as image:
        mirrored = np.pad(canvas, [(20, 20), (20, 20), (0, 0)], mode="symmetric")
        expected = np.pad(mirrored, [(15, 15), (15, 15), (0, 0)], mode="constant", constant_values=255)
        np.testing.assert_array_equal(np.asarray(image), expected)
    assert "already there" in done(call("run", "-c", path)).err
    assert iterations(tmp_path) == computed


def test_panels_are_files_of_their_own(tmp_path, call):
    """A wall is hung from all of them; a lost one is written again without the others."""
    export: dict[str, Any] = {"dpi": 254, "panels": {"width": "3mm", "overlap": "0.5mm"}}
    path = write_run(tmp_path, output="wall.tif", export=export)
    stranger = tmp_path / "wall-2of3.tif"
    stranger.write_text("a letter")
    assert "wall-2of3.tif: exists" in call("run", "-c", path).err
    stranger.unlink()

    finished = done(call("run", "-c", path))
    assert "wall-1of3.tif" in finished.err and "wall-3of3.tif" in finished.err
    panels = [tmp_path / f"wall-{number}of3.tif" for number in (1, 2, 3)]
    assert not (tmp_path / "wall.tif").exists()
    assert [tifffile.imread(panel, key=0).shape for panel in panels] == [(52, 30, 3), (52, 30, 3), (52, 20, 3)]
    before, times = panels[1].read_bytes(), [panel.stat().st_mtime_ns for panel in panels]

    panels[1].unlink()
    done(call("run", "-c", path))
    assert panels[1].read_bytes() == before
    assert panels[0].stat().st_mtime_ns == times[0]
    status = done(call("status", "-c", path)).out
    assert "wall-3of3.tif" in status
    done(call("verify", "-c", path))


def test_a_panel_never_replaces_an_input(tmp_path, call):
    """Not even with --force: the photograph would be lost."""
    path = write_run(tmp_path, output="wall.png", export={"dpi": 254, "panels": "4mm"})
    (tmp_path / "content.png").rename(tmp_path / "wall-1of2.png")
    path = write_config(
        tmp_path, content="wall-1of2.png", output="wall.png", export={"dpi": 254, "panels": {"width": "4mm"}}
    )
    before = (tmp_path / "wall-1of2.png").read_bytes()
    refused = call("run", "-c", path, "--force")
    assert refused.code == 3 and "has the name of content" in refused.err
    assert (tmp_path / "wall-1of2.png").read_bytes() == before


def test_an_export_has_the_size_on_paper_of_the_run(tmp_path, call):
    """The picture of a coarse stage is a proof of the same size, unless another resolution is asked for."""
    path = write_run(tmp_path, size={"width": "7mm", "dpi": 254})
    done(call("run", "-c", path))
    done(call("export", "-c", path, "-o", tmp_path / "last.tif"))
    done(call("export", "-c", path, "-o", tmp_path / "first.jpg", "--stage", "1"))
    done(call("export", "-c", path, "-o", tmp_path / "other.jpg", "--dpi", "120"))
    assert size_and_dpi(tmp_path / "last.tif") == ((70, 52), 254)
    assert size_and_dpi(tmp_path / "first.jpg") == ((48, 36), 174)  # 254·48/70 = 174.2
    assert size_and_dpi(tmp_path / "other.jpg") == ((70, 52), 120)
    write_config(tmp_path, size=70, export={"dpi": 127})  # of the result, as `run` has it
    done(call("export", "-c", path, "-o", tmp_path / "coarse.jpg", "--stage", "1"))
    assert size_and_dpi(tmp_path / "coarse.jpg") == ((48, 36), 87)


def test_the_plan_says_how_large_it_prints(tmp_path, call):
    path = write_run(tmp_path, size={"width": "7mm", "dpi": 200}, initial_size=32)
    out = done(call("plan", "-c", path)).out
    table = [line.split("  ") for line in out.splitlines() if "×" in line and line.endswith(" m")]
    rows = [[cell.strip() for cell in row if cell] for row in table]
    assert rows == [
        ["200 (export)", "0.7 × 0.5", "0.9 m"],
        ["300", "0.5 × 0.3", "0.6 m"],
        ["150", "0.9 × 0.7", "1.2 m"],
        ["100", "1.4 × 1.0", "1.8 m"],
    ]


@pytest.mark.parametrize("suffix", [".tif", ".zarr"])
def test_the_edges_of_16_bits_with_alpha(tmp_path, call, suffix):
    """A transparent picture of 16 bits must not lose either where it is mirrored."""
    path = write_run(tmp_path, (71, 53), content_kind=PixelKind(16, alpha=True), output=f"out{suffix}", size=71)
    done(call("run", "-c", path))
    options = ExportConfig.model_validate({"dpi": 254, "bleed": "0.7mm", "marks": True, "panels": "5mm"})
    pipeline.export(tmp_path / "run", tmp_path / f"edges{suffix}", options=options)
    whole = pixels_of(tmp_path / f"out{suffix}")
    assert (whole.dtype, whole.shape) == (np.uint16, (53, 71, 4))
    mirrored = np.pad(whole, [(7, 7), (7, 7), (0, 0)], mode="symmetric")
    for number, columns in ((1, mirrored[:, :50]), (2, mirrored[:, 50:])):
        panel = pixels_of(tmp_path / f"edges-{number}of2{suffix}")
        np.testing.assert_array_equal(panel[80:-80, 80:-80], columns)
        assert panel[0].min() == 65535  # the margin is white, and opaque


def pixels_of(path: Path) -> np.ndarray:
    """(H, W, C) of a TIFF or an OME-Zarr."""
    if path.suffix == ".tif":
        return tifffile.imread(path, key=0)
    return np.moveaxis(np.asarray(zarr.open_array(path / "0", mode="r")), 0, 2)
