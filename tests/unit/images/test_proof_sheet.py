"""Proof sheets: the scale on paper, which is their purpose, and the pixels of the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pikepdf
import pytest
import pyvips

from pipeline.core.cancel import NEVER
from pipeline.images.proof_sheet import ProofSheet, write_proof
from pipeline.images.sheet import text_image

MM = 150 / 25.4  # px


def drawn(parts: int, dpi: float = 150, paper: str = "a4", settings: str = "seed 3") -> tuple[ProofSheet, np.ndarray]:
    sheet = ProofSheet(paper, dpi, parts, "out.tif", settings)
    noise = np.random.default_rng(0).integers(0, 256, (*sheet.size, 3)).astype(np.uint8)
    return sheet, sheet.draw([(noise[: cell.height, : cell.width], f"part {i}") for i, cell in enumerate(sheet.cells)])


@pytest.mark.parametrize(("parts", "dpi", "paper"), [(1, 150, "a4"), (3, 72, "letter"), (6, 300, "a4"), (4, 100, "a3")])
def test_parts_are_on_the_sheet_pixel_by_pixel(parts: int, dpi: float, paper: str) -> None:
    """A part that is resized, or covered by a caption or a ruler, does not show what will be printed."""
    sheet, pixels = drawn(parts, dpi, paper, settings="loss.style_weight 1, " * 200)
    noise = np.random.default_rng(0).integers(0, 256, (*sheet.size, 3)).astype(np.uint8)
    assert len(sheet.cells) == parts
    for cell in sheet.cells:
        assert np.array_equal(pixels[cell.y0 : cell.y1, cell.x0 : cell.x1], noise[: cell.height, : cell.width])
        assert min(cell.height, cell.width) > 40 / 25.4 * dpi


def test_rulers_have_a_line_every_millimetre() -> None:
    """A sheet that the printer scaled would be taken for one at the scale of the print."""
    _, pixels = drawn(1)
    height = len(pixels)
    below, left = height - round(6 * MM), round(6 * MM)
    for line, length in ((pixels[below - 3, :, 0], 180), (pixels[::-1, left + 2, 0], 270)):
        dark = np.flatnonzero(line == 0)
        marks = dark[np.flatnonzero(np.diff(dark, prepend=-9) > 1)]
        assert np.abs(marks - (marks[0] + np.arange(len(marks)) * MM)).max() <= 1
        assert len(marks) > length
        assert abs(marks[100] - marks[0] - 100 * MM) <= 1  # 10 cm


def test_pdf_page_is_exactly_a4_with_the_sheet_at_its_dpi(tmp_path: Path) -> None:
    """A page of another size, or an image scaled to it, is printed at another scale."""
    sheet, pixels = drawn(2)
    write_proof(pixels, tmp_path / "a.pdf", sheet, NEVER, lambda _file: None)
    with pikepdf.open(tmp_path / "a.pdf") as pdf:
        (page,) = pdf.pages
        assert [float(edge) for edge in page.mediabox] == pytest.approx(
            [0, 0, 210 / 25.4 * 72, 297 / 25.4 * 72], abs=1e-3
        )
        operands = pikepdf.parse_content_stream(page)[1].operands
        width, _, _, height, x, y = map(float, operands)
        image = pikepdf.PdfImage(page.Resources.XObject["/Sheet"])
        assert (image.width / width * 72, image.height / height * 72) == pytest.approx((150, 150), abs=0.01)
        assert x == 0 and y + height == pytest.approx(297 / 25.4 * 72, abs=1e-3)
        assert np.array_equal(np.asarray(image.as_pil_image()), pixels)
        assert image.icc.profile.profile_description.startswith("sRGB")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pdf"]


def test_tiff_states_its_dpi(tmp_path: Path) -> None:
    """Without it a program prints the sheet at any size."""
    sheet, pixels = drawn(1)
    write_proof(pixels, tmp_path / "a.tif", sheet, NEVER, lambda _file: None)
    image = pyvips.Image.new_from_file(str(tmp_path / "a.tif"))
    assert image.xres * 25.4 == pytest.approx(150) and image.get("resolution-unit") == "in"
    assert np.array_equal(image.numpy(), pixels)


def test_patches_are_the_primaries_and_greys() -> None:
    """A patch of a wrong colour would be blamed on the printer."""
    _, pixels = drawn(1)
    row = pixels[len(pixels) - round(26 * MM)]
    for colour in ([0, 0, 0], [128, 128, 128], [255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 255, 255], [255, 255, 0]):
        assert (row == colour).all(1).sum() > 5 * MM, colour


def test_a_number_is_not_broken_over_two_lines() -> None:
    """A weight of 0.25 that is printed as 0. and 25 is read as another weight."""
    whole = text_image([("", "weight 0.25")], 20)
    first, word = (text_image([("", text)], 20, whole.width - 20) for text in ("weight 0.25", "weight"))
    line = first.numpy()[: word.height, : word.width]
    assert first.height == 2 * word.height
    assert np.array_equal(line, word.numpy()) and (first.numpy()[: word.height, word.width :] == 255).all()
