"""Reproductions of the figures of Y.-G. Kim's paper: a sheet of images and its measurements.

    python -m tools.paper.figures fig4      direct at full size against coarse to fine
    python -m tools.paper.figures fig7      the size of the coarsest stage
    python -m tools.paper.figures fig8      the size of the style image
    python -m tools.paper.figures fig9      tiles without halo, tiles with their own Grams, correct tiles

and of the experiments of Gatys et al., on one stage of `--size` px (256 is enough):

    python -m tools.paper.figures ratio             α/β of the losses
    python -m tools.paper.figures texture           style alone, from noise, with one to five layers
    python -m tools.paper.figures reconstruction    content alone, from noise, with one layer each

Every image is a run in `--folder` that can be resumed; the sheet is written to `--pictures` and the measurements to
`--folder`. Settings that are not set here are those of configs/quickstart.yaml. docs/paper.md describes the results.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyvips
from rich.console import Console
from rich.table import Table

import pipeline
from pipeline.config.sections import NetworkConfig
from pipeline.network.weights import NetworkSpec, find_weights
from pipeline.plan.sizes import fit
from tools.paper.gatys import loss_keys, write_normalised
from tools.paper.measures import content_losses, detail, drift, seams, style_losses
from tools.paper.stages import CONTENT, STYLE, Driven, write_config
from tools.paper.tiles import Faults
from tools.picture.measures import STYLE_LAYERS, read

FONT = Path(pipeline.__file__).parent / "assets" / "DejaVuSans.ttf"
GAP_PX = 6
SHEET_PX = 1280  # width of a sheet
CONTENT_LAYERS = tuple(NetworkConfig().content_layers)


@dataclass(frozen=True)
class Experiment:
    """Settings that all figures share: inputs, folders, size in px and iterations per stage."""

    content: Path
    style: Path
    weights: Path | None
    folder: Path
    pictures: Path
    size: int
    iterations: int
    quality: int

    @property
    def network(self) -> dict[str, Any]:
        chosen = {"name": "vgg19", "weights": str(self.weights)} if self.weights else {"name": "vgg19-lite"}
        return {**chosen, "pooling": "average"}

    def values(self, **changes: Any) -> dict[str, Any]:
        """The keys of a config like the quickstart's, with `changes`."""
        return {
            "content": str(self.content),
            "styles": [self.style_of(self.size)],  # a larger style would add a second stage at full size
            "size": self.size,
            "initial_size": self.size // 4,
            "network": self.network,
            "loss": {"content_weight": 0.02},
            "optimizer": {"target_pixel_change": 5, "max_iterations": self.iterations},
            **changes,
        }

    def style_of(self, max_px: int) -> dict[str, Any]:
        """The style image, limited to this long side."""
        return {"image": str(self.style), "max_size": max_px}

    def render(self, name: str, **changes: Any) -> Path:
        """The output image of such a config; it is rendered only once."""
        return pipeline.run(write_config(self.folder, name, self.values(**changes)), force=True)

    def spec(self, pooling: str = "max") -> NetworkSpec:
        """The network for measurements; max pooling, as in training, by default."""
        weights = find_weights(self.network["name"], self.weights, 0)
        return NetworkSpec(weights, "replicate", pooling, "float32", "cpu")

    def losses(self, image: Path, *long_px: int) -> dict[str, float]:
        """Lc and Ls against both inputs, with all images reduced to each of these long sides."""
        content = {side: content_losses(self.spec(), image, self.content, side) for side in long_px}
        style = {side: style_losses(self.spec(), image, self.style, side) for side in long_px}
        return {
            **{f"Lc at {side}": float(np.mean([content[side][layer] for layer in CONTENT_LAYERS])) for side in long_px},
            **{f"Ls at {side}": float(np.mean([style[side][layer] for layer in STYLE_LAYERS])) for side in long_px},
        }

    def finish(
        self, name: str, columns: Sequence[tuple[str, Path]], zoom: Zoom, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Write the sheet and the measurements, and print them."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        sheet(self.pictures / f"paper_{name}.jpg", columns, zoom, self.quality)
        (self.folder / f"{name}.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
        table = Table(title=f"{name}: {self.content.name} in the style of {self.style.name}, {self.size} px")
        for column in rows[0]:
            table.add_column(column, no_wrap=True)
        for row in rows:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
        Console(width=160).print(table)


@dataclass(frozen=True)
class Zoom:
    """The square shown in the lower row of a sheet: centre and width, as fractions of the image's sides."""

    x: float
    y: float
    width: float


def sheet(target: Path, columns: Sequence[tuple[str, Path]], zoom: Zoom, quality: int) -> None:
    """Write a sheet of images side by side, each with its label above and an enlarged part below."""
    width = (SHEET_PX - GAP_PX * (len(columns) - 1)) // len(columns)
    parts = [_column(label, path, width, zoom) for label, path in columns]
    image = pyvips.Image.arrayjoin(parts, across=len(parts), shim=GAP_PX, background=255, valign="high")
    image.write_to_file(str(target), Q=quality, keep="none")


def _column(label: str, path: Path, width: int, zoom: Zoom) -> Any:
    image = pyvips.Image.new_from_file(str(path)).colourspace("srgb")[:3]
    side = min(round(zoom.width * image.width), image.height)
    x = min(max(0, round(zoom.x * image.width) - side // 2), image.width - side)
    y = min(max(0, round(zoom.y * image.height) - side // 2), image.height - side)
    part = image.crop(x, y, side, side)
    part = part.resize(width / side, kernel="lanczos3" if side > width else "nearest").crop(0, 0, width, width)
    small = image.thumbnail_image(width)
    text = pyvips.Image.text(label, font="DejaVu Sans 15", fontfile=str(FONT)).invert()
    head = text.embed(4, 4, width, 28, extend="white").copy(interpretation="b-w").colourspace("srgb")
    column = head.join(small, "vertical", shim=2, background=255, expand=True)
    return column.join(part, "vertical", shim=GAP_PX, background=255, expand=True).cast("uchar")


@click.group()
@click.option("--content", type=click.Path(path_type=Path, exists=True), default=CONTENT, show_default=True)
@click.option("--style", type=click.Path(path_type=Path, exists=True), default=STYLE, show_default=True)
@click.option("--weights", type=click.Path(path_type=Path), help="VGG-19-shaped weights file; default: vgg19-lite.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("out/paper"), show_default=True)
@click.option("--pictures", type=click.Path(path_type=Path), default=Path("out/paper"), show_default=True)
@click.option("--size", default=1024, show_default=True, help="Long side of every result, px.")
@click.option("--iterations", default=60, show_default=True, help="Iterations of each stage.")
@click.option("--quality", default=80, show_default=True, help="JPEG quality of the sheets.")
@click.pass_context
def main(context: click.Context, **options: Any) -> None:
    """Reproduce a figure of the paper."""
    context.obj = Experiment(**{**options, "folder": options["folder"].resolve()})


@main.command()
@click.pass_obj
def fig4(experiment: Experiment) -> None:
    """Compare optimising at full size directly with coarse to fine."""
    size, coarse = experiment.size, experiment.size // 4
    direct = experiment.render("fig4_direct", initial_size=size)
    fine = experiment.render("fig4_coarse_to_fine", initial_size=coarse)
    columns = [(f"direct, {size} px", direct), (f"{coarse} to {size} px", fine)]
    rows = [{"image": label, **experiment.losses(path, coarse, size)} for label, path in columns]
    columns = [("content", experiment.content), *columns]
    experiment.finish("fig4", columns, Zoom(0.6, 0.42, 0.2), rows)


@main.command()
@click.pass_obj
def fig7(experiment: Experiment) -> None:
    """Vary the size of the coarsest stage: the smaller, the further shapes change."""
    size, columns, rows = experiment.size, [], []
    for initial in (size // 8, size // 4, size // 2, size):
        path = experiment.render(f"fig7_{initial}", initial_size=initial)
        columns.append((f"from {initial} px", path))
        rows.append({"r0": initial, **experiment.losses(path, size // 8, size // 4, size)})
    experiment.finish("fig7", columns, Zoom(0.77, 0.75, 0.3), rows)


@main.command()
@click.pass_obj
def fig8(experiment: Experiment) -> None:
    """Vary the size of the style image: a small style gives stronger detail."""
    size, columns, rows = experiment.size, [], []
    initial = size // 8
    for limit in (size, size // 4, size // 8):
        path = experiment.render(f"fig8_{limit}", initial_size=initial, styles=[experiment.style_of(limit)])
        columns.append((f"style of at most {limit} px", path))
        row = {"style": limit, **experiment.losses(path, initial, size), "detail": detail(read(path))}
        rows.append(row)
    experiment.finish("fig8", columns, Zoom(0.5, 0.45, 0.3), rows)


@main.command()
@click.option("--tile", "tile_px", default=256, show_default=True, help="Side of a tile, px.")
@click.pass_obj
def fig9(experiment: Experiment, tile_px: int) -> None:
    """Compare tiles without halo, with their own Grams, with both faults and with none."""
    columns, rows = [], []
    for label, halo, whole_grams in (
        ("no halo, own Grams", False, False),
        ("no halo", False, True),
        ("own Grams", True, False),
        ("as it should be", True, True),
    ):
        path, figures = tiled(experiment, label, halo, whole_grams, tile_px)
        columns.append((label, path))
        rows.append({"tiles": label, **figures})
    experiment.finish("fig9", columns, Zoom(0.5, 1 / 3, tile_px / experiment.size), rows)


def tiled(
    experiment: Experiment, label: str, halo: bool, whole_grams: bool, tile_px: int
) -> tuple[Path, dict[str, Any]]:
    """An image rendered in such tiles and its measurements; it is rendered only once."""
    name = f"fig9_{label.replace(' ', '_').replace(',', '')}"
    path, measurements = experiment.folder / f"{name}.png", experiment.folder / f"{name}.json"
    if measurements.exists():
        return path, json.loads(measurements.read_text(encoding="utf-8"))
    values = experiment.values(
        initial_size=experiment.size // 2, compute={"tile_px": tile_px, "device": "cpu"}, store={"chunk_px": tile_px}
    )
    config = write_config(experiment.folder, name, values)
    previous = None
    with Faults(config, halo, whole_grams).executor(2) as executor:
        for plan in pipeline.plan(config).stages:
            driven = Driven(config, plan, executor, previous)
            for result in driven.to_its_end():
                last = result
            previous = driven.canvas
    pixels = driven.pixels()
    image = pyvips.Image.new_from_array(np.rint(pixels).astype(np.uint8), interpretation="srgb")
    image.write_to_file(str(path))
    steps = seams(pixels, tile_px)
    figures = {
        "border step": steps.borders,
        "lattice step": steps.lattice,
        "deviations": steps.deviations,
        **asdict(drift(driven.stage, driven.canvas.path.name)),
        "Lc": last.content_loss,
        "Ls": last.style_loss,
    }
    measurements.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    shutil.rmtree(config.work_dir)
    return path, figures


def of_gatys(experiment: Experiment, **changes: Any) -> dict[str, Any]:
    """The settings of Gatys et al.: normalised network, average pooling, their losses, one stage, white noise."""
    experiment.folder.mkdir(parents=True, exist_ok=True)
    weights = experiment.folder / f"normalised_{experiment.size}.safetensors"
    if not weights.exists():
        inputs = [experiment.content, experiment.style]
        write_normalised(experiment.spec("average"), inputs, experiment.size, weights)
    network = {"name": "vgg19", "weights": str(weights), "pooling": "average", **changes.pop("network", {})}
    optimizer = {"target_pixel_change": 12.8, "max_iterations": experiment.iterations}
    return {"initial_size": experiment.size, "init": "noise", "network": network, "optimizer": optimizer, **changes}


@main.command()
@click.pass_obj
def ratio(experiment: Experiment) -> None:
    """Vary the weight of content against style, α/β (Gatys, Fig. 3)."""
    height, width = fit(read(experiment.content).shape[:2], experiment.size)
    columns, rows = [], []
    for power in (-3, -4, -5, -6):
        loss = loss_keys(10.0**power, height, width)
        path = experiment.render(f"ratio_{-power}", **of_gatys(experiment, loss=loss))
        columns.append((f"α/β = 1e{power}", path))
        figures = experiment.losses(path, experiment.size)
        rows.append({"α/β": f"1e{power}", "content_weight": loss["content_weight"], **figures})
    experiment.finish("ratio", columns, Zoom(0.77, 0.75, 0.4), rows)


@main.command()
@click.pass_obj
def texture(experiment: Experiment) -> None:
    """Render textures: style without content (Gatys, Fig. 1, style reconstructions)."""
    columns, rows = [("style", experiment.style)], []
    for count in range(1, len(STYLE_LAYERS) + 1):
        layers = dict.fromkeys(STYLE_LAYERS[:count], 1 / count)
        changes = of_gatys(experiment, network={"style_layers": layers}, loss=loss_keys(0, 16, 16))
        path = experiment.render(f"texture_{count}", content=None, **changes)
        columns.append((f"to {STYLE_LAYERS[count - 1]}", path))
        losses = style_losses(experiment.spec("average"), path, experiment.style, experiment.size)
        rows.append({"layers": count, **{name: losses[name] for name in STYLE_LAYERS}})
    experiment.finish("texture", columns, Zoom(0.5, 0.5, 0.4), rows)


@main.command()
@click.pass_obj
def reconstruction(experiment: Experiment) -> None:
    """Render the content from the features of one layer (Gatys, Fig. 1, content reconstructions)."""
    columns, rows = [("content", experiment.content)], []
    target = read(experiment.content, experiment.size)
    for layer in STYLE_LAYERS:
        loss = {"kind": "gatys", "content_weight": 1.0, "style_weight": 0.0}
        changes = of_gatys(experiment, network={"content_layers": {layer: 1.0}}, loss=loss)
        path = experiment.render(f"reconstruction_{layer}", styles=[], **changes)
        columns.append((layer, path))
        difference = read(path) - target
        rows.append({"layer": layer, "rms, levels": float(np.sqrt(np.mean(difference**2)))})
    experiment.finish("reconstruction", columns, Zoom(0.77, 0.75, 0.4), rows)


if __name__ == "__main__":
    main()
