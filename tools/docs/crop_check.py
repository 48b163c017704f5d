"""The distance between `pipeline preview --crop` and the same part of the finished output image.

    python -m tools.docs.crop_check
    python -m tools.docs.crop_check --masks

The tool stops a run of the samples before its last stage, renders a corner as a crop (once normally, and once without
the whole image's Gram matrices), and finishes the run. It prints the distance of both from the run's pixels and writes
docs/pictures/controls_crop.jpg. Renders in --folder are reused. `--masks` uses two styles, one of them only in the sky,
and a content mask of the house; it writes masks.jpg to --folder.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyvips
import yaml

import pipeline
from pipeline.commands.preview.whole_image import WholeImage, WholeImageEstimate
from pipeline.core.errors import Stopped
from pipeline.core.events import StageStarted
from pipeline.core.tiling import Rect
from pipeline.network.weights import NetworkSpec, find_weights
from tools.docs.make_controls import GAP_PX, ROOT, SAMPLES, draw_masks, labelled, save
from tools.picture.measures import STYLE_LAYERS, gram_distance, moments, psnr

LAST = 2
CONFIG: dict[str, Any] = {
    "content": str(SAMPLES / "landscape.jpg"),
    "styles": [{"image": str(SAMPLES / "strokes.jpg"), "max_size": 768}],
    "output": "out.png",
    "size": 768,
    "initial_size": 192,
    "network": {"name": "vgg19-lite", "pooling": "average"},
    "loss": {"content_weight": 0.02},
    "optimizer": {"target_pixel_change": 5, "max_iterations": 30},
    "store": {"chunk_px": 128},
    "compute": {"device": "cpu"},
}
STYLES = [{**CONFIG["styles"][0], "mask": "sky.png"}, {"image": "dots.png"}]
MASKED = {**CONFIG, "styles": STYLES, "loss": {"content_weight": 0.3, "content_mask": "house.png"}}


def stopped(path: Path) -> None:
    """Render all stages except the last, or resume a run that was interrupted while it did."""
    stop = threading.Event()

    def sink(event: Any) -> None:
        if isinstance(event, StageStarted) and event.stage == LAST:
            stop.set()

    try:
        pipeline.run(pipeline.load_config(path, [f"work_dir={path.parent / 'stopped'}"]), sink=sink, stop=stop)
    except Stopped:
        click.echo("stopped before the last stage")


def _no_estimate(_whole: WholeImage, stage: Any, _region: Any) -> WholeImageEstimate:
    return WholeImageEstimate({}, dict.fromkeys(stage.layer_use.content_layers, 1.0))


def cropped(path: Path, rect: Rect, name: str, alone: bool) -> np.ndarray:
    """The crop, or what a crop would be that knows nothing of the whole picture."""
    estimate: Any = WholeImage.estimate
    if alone:
        WholeImage.estimate = _no_estimate  # type: ignore[method-assign]
    try:
        config = pipeline.load_config(path, [f"work_dir={path.parent / 'stopped'}"])
        return pixels_of(pipeline.crop(config, pipeline.CropSpec(rect, output=path.parent / f"{name}.png")))
    finally:
        WholeImage.estimate = estimate


def finished(path: Path) -> np.ndarray:
    """The pixels of the finished run."""
    if not (path.parent / "whole").exists():
        shutil.copytree(path.parent / "stopped", path.parent / "whole")
    return pixels_of(pipeline.run(pipeline.load_config(path, [f"work_dir={path.parent / 'whole'}"])))


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(pyvips.Image.new_from_file(str(path)).numpy())


def report(name: str, pixels: np.ndarray, real: np.ndarray) -> None:
    network = NetworkSpec(find_weights("vgg19-lite", None, 0), "replicate", "average", "float32", "cpu", 1)
    ours, theirs = moments(network, pixels), moments(network, real)
    text = " ".join(f"{gram_distance(ours[layer], theirs[layer]) ** 0.5:.3f}" for layer in STYLE_LAYERS)
    click.echo(f"{name}: PSNR {psnr(pixels, real):.1f} dB; ‖G − G_run‖/‖G_run‖ at {STYLE_LAYERS}: {text}")


@click.command()
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "out" / "crop_check")
@click.option("--rect", nargs=4, type=int, default=(648, 480, 120, 96), show_default=True, help="x y width height")
@click.option("--masks", is_flag=True, help="Use two styles with masks and a content mask.")
def main(folder: Path, rect: tuple[int, int, int, int], masks: bool) -> None:
    """Measure the distances and draw the figure."""
    folder = folder.resolve() / ("masks" if masks else "plain")
    draw_masks(folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(MASKED if masks else CONFIG), encoding="utf-8")
    x, y, width, height = rect
    part = Rect(y, y + height, x, x + width)
    stopped(path)
    with_whole, alone = (cropped(path, part, name, name == "alone") for name in ("crop", "alone"))
    real = finished(path)[part.y0 : part.y1, part.x0 : part.x1]
    report("crop", with_whole, real)
    report("region alone", alone, real)
    shown = [("the run", real), ("--crop", with_whole), ("the region alone", alone)]
    row, *others = [
        labelled(pyvips.Image.new_from_array(pixels, interpretation="srgb"), name) for name, pixels in shown
    ]
    for other in others:
        row = row.join(other, "horizontal", expand=True, shim=GAP_PX, background=255)
    save(row, folder.with_name("masks.jpg") if masks else ROOT / "docs" / "pictures" / "controls_crop.jpg")


if __name__ == "__main__":
    main()
