"""Open every kind of output in independent readers, and print the table of docs/print.md, "Readers".

The outputs are made by the command line, from a wide-gamut 16-bit TIFF that states 300 dpi and has an artist, a
copyright, a description and keywords. The table says what each reader finds. It needs `pip install -e ".[readers]"`,
exiftool (Debian: libimage-exiftool-perl) and pdfinfo (poppler-utils); a reader that is missing is named in the table.

python -m tools.print.readers --update docs/print.md
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import numpy as np
import pyvips
import yaml

from tools.print.opening import READERS, Finding, missing

CONTENT_PX, OUTPUT_PX = (320, 240), 640
CMYK_PROFILE = "cmyk.icc"
BEGIN, END = "<!-- made by tools.print.readers: begin -->", "<!-- end -->"
TAGS = {
    "EXIF:Artist": "A. Painter",
    "EXIF:Copyright": "© 2026 A. Painter",
    "IPTC:Caption-Abstract": "Harbour at dusk",
    "IPTC:Keywords": "harbour",
    "XMP-dc:Title": "Harbour",
    "EXIF:GPSLatitude": "43.3",
}


@dataclass(frozen=True)
class Output:
    """An output of a command; `{folder}` in its options is where all files are."""

    label: str
    name: str
    options: tuple[str, ...] = ()
    command: Literal["run", "export", "preview"] = "export"


OUTPUTS = (
    Output("TIFF, `for: print`", "print.tif", ("--for", "print")),
    Output("TIFF, `for: viewer`", "viewer.tif"),
    Output("TIFF, `levels: subifds`", "subifds.tif", ("--levels", "subifds")),
    Output("TIFF, `bleed: 5mm`", "picture.tif", command="run"),
    Output(
        "TIFF, `profile: content`, `metadata: keep-gps`",
        "wide.tif",
        ("--profile", "content", "--metadata", "keep-gps"),
    ),
    Output(
        "TIFF, `for: print`, `profile:` CMYK", "cmyk.tif", ("--for", "print", "--profile", f"{{folder}}/{CMYK_PROFILE}")
    ),
    Output("PNG", "picture.png"),
    Output("JPEG", "picture.jpg"),
    Output("DeepZoom", "picture.dz"),
    Output("OME-Zarr", "picture.zarr"),
    Output("proof sheet, PDF", "proof.pdf", command="preview"),
    Output("proof sheet, TIFF", "proof.tif", command="preview"),
)


def pipeline(*arguments: object) -> None:
    """Run a command of the program; its messages are shown if it fails."""
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)}\n{done.stderr}")


def make_inputs(folder: Path) -> Path:
    """Write content, style and config; returns the config."""
    width, height = CONTENT_PX
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(0).normal(0, 2000, (height, width, 3))
    ramps = np.stack([x / width, y / height, 1 - x / width], -1) * 60000 + 2000
    pixels = np.clip(ramps + noise, 0, 65535).astype(np.uint16)
    content = pyvips.Image.new_from_array(pixels, interpretation="rgb16").copy(xres=300 / 25.4, yres=300 / 25.4)
    content.set_type(pyvips.GValue.blob_type, "icc-profile-data", pyvips.Operation.call("profile_load", "p3"))
    content.tiffsave(str(folder / "content.tif"), resunit="inch")
    pyvips.Image.new_from_array(np.roll(pixels >> 8, 99, 1).astype(np.uint8), interpretation="srgb").write_to_file(
        str(folder / "style.png")
    )
    (folder / CMYK_PROFILE).write_bytes(pyvips.Operation.call("profile_load", "cmyk"))
    if not missing("exiftool"):
        tags = [f"-{name}={value}" for name, value in TAGS.items()]
        subprocess.run(["exiftool", "-q", "-overwrite_original", *tags, str(folder / "content.tif")], check=True)
    config = {
        "content": "content.tif",
        "styles": [{"image": "style.png"}],
        "output": "picture.tif",
        "size": OUTPUT_PX,
        "initial_size": OUTPUT_PX,
        "network": {"name": "vgg19-lite"},
        "optimizer": {"max_iterations": 1},
        "export": {"bleed": "5mm"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def make_outputs(folder: Path, settings: tuple[str, ...]) -> None:
    """Run the config once, and write every output from its canvas."""
    config = make_inputs(folder)
    values = [part for setting in settings for part in ("--set", setting)]
    pipeline("run", "-c", config, *values)
    for output in OUTPUTS:
        path = folder / output.name
        if output.command == "preview":
            pipeline("preview", "-c", config, *values, "--proof", "a4", "-o", path)
        elif output.command == "export":
            options = (option.format(folder=folder) for option in output.options)
            pipeline("export", "-c", config, *values, "-o", path, "--set", "export.bleed=0mm", *options)


def rows_of(folder: Path) -> list[tuple[str, ...]]:
    """A row for each output and each reader that opens it."""
    rows = []
    for output in OUTPUTS:
        for name, reader in READERS.items():
            if output.name.endswith(reader.suffixes):
                found = found_by(name, reader.open, folder / output.name)
                rows.append((output.label, name, *found))
    return rows


def found_by(name: str, read: Callable[[Path], Finding], path: Path) -> tuple[str, ...]:
    """What a reader finds, in the order of the table's columns."""
    if package := missing(name):
        return (f"not installed ({package})", "", "", "", "")
    try:
        return tuple(read(path))
    except Exception as error:  # what a reader refuses is a result
        return (f"refused: {type(error).__name__}: {error}"[:120], "", "", "", "")


def table(rows: list[tuple[str, ...]]) -> str:
    """The rows as a Markdown table."""
    head = ("output", "reader", *(name.replace("_", " ") for name in Finding._fields))
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') or '–' for cell in line)} |\n" for line in lines)


@click.command()
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a value of the config.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Keep the outputs in this empty folder.")
@click.option("--update", type=click.Path(path_type=Path, exists=True), help="Replace the table in this document.")
def main(settings: tuple[str, ...], folder: Path | None, update: Path | None) -> None:
    """Make the outputs, open them in every reader, and print the table."""
    with tempfile.TemporaryDirectory() as temporary:
        at = folder or Path(temporary)
        make_outputs(at, settings)
        text = table(rows_of(at))
    click.echo(text)
    if update is not None:
        document = update.read_text(encoding="utf-8")
        pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
        changed, count = pattern.subn(lambda _match: f"{BEGIN}\n{text}{END}", document)
        if count != 1:
            raise click.ClickException(f"{update}: has {count} places for the table, between {BEGIN} and {END}")
        update.write_text(changed, encoding="utf-8")


if __name__ == "__main__":
    main()
