"""The figures of Y.-G. Kim's paper, made again: a sheet of pictures and the numbers that go with them.

    python -m tools.paper.figures fig4      direct at full size, against coarse to fine
    python -m tools.paper.figures fig7      the size of the coarsest stage
    python -m tools.paper.figures fig8      the size of the style image
    python -m tools.paper.figures fig9      tiles without halo, tiles with Grams of their own, tiles as they should be

and the experiments of Gatys et al., on one stage of `--size` px, 256 is enough:

    python -m tools.paper.figures ratio             α/β of the losses
    python -m tools.paper.figures texture           style alone, from noise, by more and more layers
    python -m tools.paper.figures reconstruction    content alone, from noise, by one layer after the other

Every picture is a run in `--folder`, which goes on where it stopped; the sheet goes to `--pictures` and the numbers
beside it. What is not set here is as in configs/quickstart.yaml. docs/paper.md says what should be seen, and was.
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
from tools.paper.measures import content_losses, detail, drift, read, seams, style_losses
from tools.paper.stages import CONTENT, STYLE, Driven, write_config
from tools.paper.tiles import Faults

FONT = Path(pipeline.__file__).parent / "assets" / "DejaVuSans.ttf"
GAP_PX = 6
SHEET_PX = 1280  # width of a sheet
STYLE_LAYERS = tuple(NetworkConfig().style_layers)
CONTENT_LAYERS = tuple(NetworkConfig().content_layers)


@dataclass(frozen=True)
class Experiment:
    """What all figures share: inputs, where runs and sheets lie, and how large and how long it is rendered."""

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
        """A config of the quickstart's taste."""
        return {
            "content": str(self.content),
            "styles": [self.style_of(self.size)],  # a larger one would make the last stage be done twice
            "size": self.size,
            "initial_size": self.size // 4,
            "network": self.network,
            "loss": {"content_weight": 0.02},
            "optimizer": {"target_pixel_change": 5, "max_iterations": self.iterations},
            **changes,
        }

    def style_of(self, max_px: int) -> dict[str, Any]:
        """The style image, never larger than this."""
        return {"image": str(self.style), "max_size": max_px}

    def render(self, name: str, **changes: Any) -> Path:
        """The picture of such a config; not rendered again if it is there."""
        return pipeline.run(write_config(self.folder, name, self.values(**changes)), force=True)

    def spec(self, pooling: str = "max") -> NetworkSpec:
        """The network that measures: as it was trained, with max pooling."""
        weights = find_weights(self.network["name"], self.weights, 0)
        return NetworkSpec(weights, "replicate", pooling, "float32", "cpu")

    def losses(self, picture: Path, *long_px: int) -> dict[str, float]:
        """Lc and Ls against both inputs, all reduced to each of these long sides."""
        content = {one: content_losses(self.spec(), picture, self.content, one) for one in long_px}
        style = {one: style_losses(self.spec(), picture, self.style, one) for one in long_px}
        return {
            **{f"Lc at {one}": float(np.mean([content[one][layer] for layer in CONTENT_LAYERS])) for one in long_px},
            **{f"Ls at {one}": float(np.mean([style[one][layer] for layer in STYLE_LAYERS])) for one in long_px},
        }

    def finish(
        self, name: str, columns: Sequence[tuple[str, Path]], zoom: Zoom, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Write the sheet and the numbers, and print them."""
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
    """What the lower row of a sheet shows: a square around this place; all in shares of the picture's sides."""

    x: float
    y: float
    width: float


def sheet(target: Path, columns: Sequence[tuple[str, Path]], zoom: Zoom, quality: int) -> None:
    """Pictures side by side, under each the same part of it enlarged, and over each its label."""
    width = (SHEET_PX - GAP_PX * (len(columns) - 1)) // len(columns)
    made = [_column(label, path, width, zoom) for label, path in columns]
    image = pyvips.Image.arrayjoin(made, across=len(made), shim=GAP_PX, background=255, valign="high")
    image.write_to_file(str(target), Q=quality, keep="none")


def _column(label: str, path: Path, width: int, zoom: Zoom) -> Any:
    picture = pyvips.Image.new_from_file(str(path)).colourspace("srgb")[:3]
    side = min(round(zoom.width * picture.width), picture.height)
    x = min(max(0, round(zoom.x * picture.width) - side // 2), picture.width - side)
    y = min(max(0, round(zoom.y * picture.height) - side // 2), picture.height - side)
    part = picture.crop(x, y, side, side)
    part = part.resize(width / side, kernel="lanczos3" if side > width else "nearest").crop(0, 0, width, width)
    small = picture.thumbnail_image(width)
    text = pyvips.Image.text(label, font="DejaVu Sans 15", fontfile=str(FONT)).invert()
    head = text.embed(4, 4, width, 28, extend="white").copy(interpretation="b-w").colourspace("srgb")
    column = head.join(small, "vertical", shim=2, background=255, expand=True)
    return column.join(part, "vertical", shim=GAP_PX, background=255, expand=True).cast("uchar")


@click.group()
@click.option("--content", type=click.Path(path_type=Path, exists=True), default=CONTENT, show_default=True)
@click.option("--style", type=click.Path(path_type=Path, exists=True), default=STYLE, show_default=True)
@click.option("--weights", type=click.Path(path_type=Path), help="A VGG-19-shaped file; default vgg19-lite.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("out/paper"), show_default=True)
@click.option("--pictures", type=click.Path(path_type=Path), default=Path("out/paper"), show_default=True)
@click.option("--size", default=1024, show_default=True, help="Long side of every result, px.")
@click.option("--iterations", default=60, show_default=True, help="Iterations of each stage.")
@click.option("--quality", default=80, show_default=True, help="Of the sheets' JPEG.")
@click.pass_context
def main(context: click.Context, **options: Any) -> None:
    """Make a figure of the paper again."""
    context.obj = Experiment(**{**options, "folder": options["folder"].resolve()})


@main.command()
@click.pass_obj
def fig4(experiment: Experiment) -> None:
    """Optimised at full size from the start, and coarse to fine."""
    size, coarse = experiment.size, experiment.size // 4
    direct = experiment.render("fig4_direct", initial_size=size)
    fine = experiment.render("fig4_coarse_to_fine", initial_size=coarse)
    columns = [(f"direct, {size} px", direct), (f"{coarse} to {size} px", fine)]
    rows = [{"picture": label, **experiment.losses(path, coarse, size)} for label, path in columns]
    columns = [("content", experiment.content), *columns]
    experiment.finish("fig4", columns, Zoom(0.6, 0.42, 0.2), rows)


@main.command()
@click.pass_obj
def fig7(experiment: Experiment) -> None:
    """The size of the coarsest stage: the smaller, the further shapes change."""
    size, columns, rows = experiment.size, [], []
    for initial in (size // 8, size // 4, size // 2, size):
        path = experiment.render(f"fig7_{initial}", initial_size=initial)
        columns.append((f"from {initial} px", path))
        rows.append({"r0": initial, **experiment.losses(path, size // 8, size // 4, size)})
    experiment.finish("fig7", columns, Zoom(0.77, 0.75, 0.3), rows)


@main.command()
@click.pass_obj
def fig8(experiment: Experiment) -> None:
    """The size of the style image: where it stays small, detail is stronger."""
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
    """Tiles without halo, tiles with Grams of their own, both faults, and none."""
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
    """A picture rendered in such tiles, and what was measured on it; not again if it is there."""
    name = f"fig9_{label.replace(' ', '_').replace(',', '')}"
    path, known = experiment.folder / f"{name}.png", experiment.folder / f"{name}.json"
    if known.exists():
        return path, json.loads(known.read_text(encoding="utf-8"))
    values = experiment.values(
        initial_size=experiment.size // 2, compute={"tile_px": tile_px, "device": "cpu"}, store={"chunk_px": tile_px}
    )
    config = write_config(experiment.folder, name, values)
    previous = None
    with Faults(config, halo, whole_grams).engine(2) as engine:
        for plan in pipeline.plan(config).stages:
            driven = Driven(config, plan, engine, previous)
            for result in driven.to_its_end():
                last = result
            previous = driven.canvas
    picture = driven.pixels()
    image = pyvips.Image.new_from_array(np.rint(picture).astype(np.uint8), interpretation="srgb")
    image.write_to_file(str(path))
    found = seams(picture, tile_px)
    figures = {
        "border step": found.borders,
        "lattice step": found.lattice,
        "deviations": found.deviations,
        **asdict(drift(driven.stage, driven.canvas.path.name)),
        "Lc": last.content_loss,
        "Ls": last.style_loss,
    }
    known.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    shutil.rmtree(config.work_dir)
    return path, figures


def of_gatys(experiment: Experiment, **changes: Any) -> dict[str, Any]:
    """What Gatys et al. change: normalised network, average pooling, their losses, one stage, white noise to start."""
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
    """The weight of content against style, α/β (Gatys, Fig. 3)."""
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
    """Style without content: a texture of the style (Gatys, Fig. 1, style reconstructions)."""
    columns, rows = [("style", experiment.style)], []
    for count in range(1, len(STYLE_LAYERS) + 1):
        layers = dict.fromkeys(STYLE_LAYERS[:count], 1 / count)
        changes = of_gatys(experiment, network={"style_layers": layers}, loss=loss_keys(0, 16, 16))
        path = experiment.render(f"texture_{count}", content=None, **changes)
        columns.append((f"to {STYLE_LAYERS[count - 1]}", path))
        found = style_losses(experiment.spec("average"), path, experiment.style, experiment.size)
        rows.append({"layers": count, **{name: found[name] for name in STYLE_LAYERS}})
    experiment.finish("texture", columns, Zoom(0.5, 0.5, 0.4), rows)


@main.command()
@click.pass_obj
def reconstruction(experiment: Experiment) -> None:
    """Content without style: what a layer keeps of a picture (Gatys, Fig. 1, content reconstructions)."""
    columns, rows = [("content", experiment.content)], []
    aim = read(experiment.content, experiment.size)
    for layer in STYLE_LAYERS:
        loss = {"kind": "gatys", "content_weight": 1.0, "style_weight": 0.0}
        changes = of_gatys(experiment, network={"content_layers": {layer: 1.0}}, loss=loss)
        path = experiment.render(f"reconstruction_{layer}", styles=[], **changes)
        columns.append((layer, path))
        difference = read(path) - aim
        rows.append({"layer": layer, "rms, levels": float(np.sqrt(np.mean(difference**2)))})
    experiment.finish("reconstruction", columns, Zoom(0.77, 0.75, 0.4), rows)


if __name__ == "__main__":
    main()
