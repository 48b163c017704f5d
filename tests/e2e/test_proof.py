"""Proof sheets of runs: finished, half done, and without their state."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pikepdf
import pytest

from pipeline import CropSpec, ProofSpec, crop, load_config, proof, run
from pipeline.core.tiling import Rect
from tests.support.crops import SHALLOW, stopped_before
from tests.support.e2e import read_picture, write_run

SIZE_PX = (300, 240)
POINTS = [(0, 0), (150, 120), (299, 239), (200, 30)]


@pytest.fixture
def config(tmp_path) -> Path:
    """A run of stages of 120 and 300 px."""
    keys = {"initial_size": 120, "stage_ratio": 4.0, "network": SHALLOW, "optimizer": {"max_iterations": 2}}
    return write_run(tmp_path, SIZE_PX, **keys)


def sheet_of(pdf: Path) -> np.ndarray:
    with pikepdf.open(pdf) as opened:
        (page,) = opened.pages
        return np.asarray(pikepdf.PdfImage(page.Resources.XObject["/Sheet"]).as_pil_image())


def places(sheet: np.ndarray, part: np.ndarray) -> list[tuple[int, int]]:
    """Where a sheet shows exactly these pixels."""
    height, width, _ = part.shape
    starts = (sheet[: len(sheet) - height, : sheet.shape[1] - width] == part[0, 0]).all(2)
    found = zip(*np.nonzero(starts), strict=True)
    return [(y, x) for y, x in found if np.array_equal(sheet[y : y + height, x : x + width], part)]


def test_parts_of_a_finished_run_are_its_pixels_around_the_points(config, call):
    """The sheet must show what will be printed, pixel by pixel, also when only the output image is left."""
    run(load_config(config))
    picture = read_picture(config.parent / "out.png")
    at = [part for x, y in POINTS for part in ("--at", f"{x},{y}")]
    outcome = call("preview", "-c", config, "--proof", "a4", "--dpi", 72, *at)
    assert outcome.code == 0, outcome.err
    pdf = config.parent / "out.proof.pdf"
    assert outcome.out == f"{pdf}\n"
    sheet = sheet_of(pdf)
    assert sheet.shape == (842, 595, 3)
    middle = places(sheet, picture[110:130, 140:160])
    # 150,120 is in the middle of the second part, and in the others that reach that far
    assert middle and all(len(places(sheet, picture[y : y + 20, x : x + 20])) for y, x in ((0, 0), (220, 280)))
    outcome = call("preview", "-c", config, "--proof", "a4", "-o", config.parent / "sheet.png")
    assert outcome.code == 3 and "choose a name that ends in .pdf, .tif, .tiff" in outcome.err
    shutil.rmtree(config.parent / "run")
    config.write_text(config.read_text() + "preset: null\n")  # is no setting to print
    outcome = call("preview", "-c", config, "--proof", "a4", "--dpi", 72, *at)
    assert outcome.code == 0 and "the state of the run is gone" in outcome.err, outcome.err
    np.testing.assert_array_equal(sheet_of(pdf), sheet)
    assert sorted(path.name for path in (config.parent / "out.preview").iterdir()) == ["journal.jsonl", "lock"]


def test_a_proof_of_an_image_with_edges_is_cut_from_inside_them(config, call):
    """When the state is deleted, the image is all that is left; its border and marks are no part of the picture."""
    edges = ("--set", "export.border=2mm", "--set", "export.wrap=1mm", "--set", "export.marks=true")
    command = ("preview", "-c", config, "--proof", "a4", "--dpi", 72, *edges)
    assert call("run", "-c", config, *edges).code == 0
    assert call(*command).code == 0
    sheet = sheet_of(config.parent / "out.proof.pdf")
    shutil.rmtree(config.parent / "run" / "store.zarr")
    outcome = call(*command)
    assert outcome.code == 0 and "the state of the run is gone" in outcome.err, outcome.err
    np.testing.assert_array_equal(sheet_of(config.parent / "out.proof.pdf"), sheet)


def test_a_proof_before_the_run_is_done_has_the_crop(config, call):
    """A day of rendering can be spared only if the sheet shows what it will give."""
    stopped_before(config, 1)
    sheet = sheet_of(proof(load_config(config), ProofSpec([(100, 100)], dpi=72)))
    expected = read_picture(
        crop(load_config(config), CropSpec(Rect(0, 240, 0, 300)))
    )  # a sheet has room for the whole image
    assert len(places(sheet, expected)) == 1


REFUSED = [
    (["--proof", "a4", "--at", "300,0"], 3, "--at 300,0: is not inside the image, which has 300×240 px"),
    (["--proof", "a4", "--dpi", "30"], 3, "--dpi 30: a proof sheet has 72 to 720 dpi"),
    (["--proof", "a4", *(["--at", "1,1"] * 7)], 3, "a sheet has room for 6"),
    (["--proof", "a4"], 3, "there is no run of this config yet"),
    (["--proof", "a4", "--at", "1"], 2, "'1' is not x,y in whole px"),
    (["--proof", "a4", "--crop", "0,0,9,9"], 2, "--proof makes one sheet"),
    (["--at", "1,1"], 2, "--dpi and --at require --proof"),
]


@pytest.mark.parametrize(("options", "code", "message"), REFUSED)
def test_what_cannot_be_proofed_is_refused_before_it_is_rendered(config, call, monkeypatch, options, code, message):
    """A mistake must not cost the time of a crop, nor leave files."""
    monkeypatch.chdir(config.parent)
    outcome = call("preview", "-c", config, *options)
    assert outcome.code == code and message in outcome.err, outcome.err
    assert sorted(path.name for path in config.parent.iterdir()) == ["config.yaml", "content.png", "style.png"]
