"""The pictures of docs/feedforward.md, from configs/samples alone, by `pipeline apply` with the packaged network.

    python -m tools.feedforward.pictures out/feedforward/docs --side out/compare/side.png

`--side`: of tools.feedforward.compare. Writes JPEGs of at most 200 kB into docs/pictures, runs into FOLDER.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import pyvips

from pipeline.commands.apply import apply
from pipeline.config.apply import apply_config_of_line

ROOT = Path(__file__).parents[2]
CONTENT = ROOT / "configs" / "samples" / "landscape.jpg"
MAX_BYTES = 200_000
SHEET_PX = 640


def applied(folder: Path, size: int) -> pyvips.Image:
    """The content at a long side of `size` through the packaged network; says how long it took."""
    output = folder / f"strokes_{size}.png"
    start = time.monotonic()
    apply(apply_config_of_line("strokes", str(CONTENT), str(output), str(size)))
    click.echo(f"{size} px: {time.monotonic() - start:.1f} s")
    return pyvips.Image.new_from_file(str(output))[:3]


def save(image: pyvips.Image, name: str) -> None:
    """Write a JPEG, with the best quality that fits."""
    path = ROOT / "docs" / "pictures" / name
    for quality in range(92, 30, -4):
        data = image.jpegsave_buffer(Q=quality, optimize_coding=True, keep="none")
        if len(data) <= MAX_BYTES:
            path.write_bytes(data)
            click.echo(f"{path.relative_to(ROOT)}: {len(data):,} bytes, quality {quality}")
            return
    raise click.ClickException(f"{name} does not fit into {MAX_BYTES:,} bytes")


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--side", type=click.Path(exists=True, path_type=Path), help="side.png of tools.feedforward.compare.")
def main(folder: Path, side: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = pyvips.Image.new_from_file(str(CONTENT))
    small = applied(folder.absolute(), 512)
    reduced = content.resize(small.width / content.width, kernel="lanczos3")
    save(reduced.join(small, "horizontal", shim=8, background=255), "feedforward_512.jpg")
    large = applied(folder.absolute(), 2048)
    whole = large.resize(SHEET_PX / large.width, kernel="lanczos3")
    part = large.crop(60, 480, SHEET_PX, whole.height)
    save(whole.join(part, "horizontal", shim=8, background=255), "feedforward_2048.jpg")
    if side:
        save(pyvips.Image.new_from_file(str(side)), "feedforward_compare.jpg")


if __name__ == "__main__":
    main()
