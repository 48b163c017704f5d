"""Make the README's image from a finished quickstart: content and style, result, and a zoom into the result.

pipeline run --config configs/quickstart.yaml && python -m tools.docs.make_pictures
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pyvips

import pipeline

ROOT = Path(__file__).parents[2]
HEIGHT_PX = 576
GAP_PX = 8
ZOOM = (560, 420, 288, 288)  # x, y, width, height of the part shown at twice its size


def fitted(image: Any, height_px: int) -> Any:
    return image.resize(height_px / image.height)


@click.command()
@click.option("--config", type=click.Path(path_type=Path), default=ROOT / "configs" / "quickstart.yaml")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "pictures" / "quickstart.jpg")
def main(config: Path, output: Path) -> None:
    """Write the image of content, style, result and zoom."""
    settings = pipeline.load_config(config)
    content, style = (pyvips.Image.new_from_file(str(path)) for path in (settings.content, settings.styles[0].image))
    result = pyvips.Image.new_from_file(str(settings.output))
    half = (HEIGHT_PX - GAP_PX) / 2
    inputs = fitted(content, half).join(fitted(style, half), "vertical", expand=True, shim=GAP_PX, background=255)
    zoom = result.crop(*ZOOM).resize(HEIGHT_PX / ZOOM[3], kernel="nearest")
    row = pyvips.Image.arrayjoin([inputs], across=1)
    for part in (fitted(result, HEIGHT_PX), zoom):
        row = row.join(part, "horizontal", expand=True, shim=GAP_PX, background=255)
    output.parent.mkdir(parents=True, exist_ok=True)
    row.write_to_file(str(output), Q=88, keep="none")


if __name__ == "__main__":
    main()
