"""tools/print/readers.py: its table must say what the readers find, and which of them are missing."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from tools.print import opening, readers


def test_the_table_says_what_is_found_and_replaces_the_old_one(tmp_path: Path, monkeypatch) -> None:
    """A wrong or an old table tells a user that a program can open what it cannot."""
    # Pillow comes with the package; the others are as on a machine without them
    present = {name: opening.READERS[name]._replace(needs=f"no-{name}") for name in opening.READERS}
    present["Pillow"] = opening.READERS["Pillow"]
    monkeypatch.setattr(opening, "READERS", present)
    monkeypatch.setattr(readers, "READERS", present)
    monkeypatch.setattr(readers, "OUTPUT_PX", 320)
    slow = ("picture.dz", "subifds.tif", "wide.tif", "picture.jpg", "proof.pdf")  # further exports of the same run
    monkeypatch.setattr(readers, "OUTPUTS", [output for output in readers.OUTPUTS if output.name not in slow])
    document = tmp_path / "print.md"
    document.write_text(f"before\n{readers.BEGIN}\nold\n{readers.END}\nafter\n")
    result = CliRunner().invoke(readers.main, ["--update", str(document)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    rows = [tuple(cell.strip() for cell in line.strip("|\n").split("|")) for line in text.splitlines() if "|" in line]
    found = {row[0]: row for row in rows if row[1] == "Pillow"}
    assert found["TIFF, `for: print`"][2:4] == ("320×240 RGB", "1")
    assert found["TIFF, `for: viewer`"][2:4] == ("320×240 RGB", "2")
    assert found["TIFF, `bleed: 5mm`"][2] == "438×358 RGB"  # 59 px of 300 dpi on each side
    assert found["TIFF, `for: print`, `profile:` CMYK"][2] == "320×240 CMYK"
    assert found["PNG"][6] == "Software, XMP"  # the content has no texts without exiftool
    assert found["proof sheet, TIFF"][2:6] == ("1240×1754 RGB", "1", "150", "sRGB")
    assert ("OME-Zarr", "ome-zarr-models", "not installed (no-ome-zarr-models)", *["–"] * 4) in rows
