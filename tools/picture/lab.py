"""Render every pair of content and style with every setting; show them side by side, with their numbers.

    python -m tools.picture.make_styles out/styles --sketch PHOTOGRAPH
    python -m tools.picture.lab tools/picture/pairs.yaml out/lab --images PHOTOGRAPHS --images out/styles

The lab file has these keys; paths are searched in the folders of --images, then beside the lab file:

    base: {...}                config keys of every run
    settings:                  by name: config keys that override those of `base`, nested like a config. The key
      wide: {loss: {...}}      `style` overrides the style's entry, e.g. {scale: 0.5}
    pairs:                     by name: content, style, and maybe size and crops
      harbour: {content: a.jpg, style: b.png}
    judge: weights.safetensors the network of the distances; default the packaged one. Choose another than the runs'
    identity: true             adds each style as the content of itself, with the PSNR of the result
    crops: [[0.5, 0.5]]        centres of the crops, as fractions of width and height
    cell_px: 400               side of a cell of the sheets

OUT/PAIR/SETTING/ holds each run. A finished result is reused while the values and input files that determine it are
the same (a change of the program is not noticed: --fresh), and a stopped run is resumed. OUT gets PAIR.jpg,
measures.json and index.html. docs/picture.md explains the numbers.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyvips
import yaml
from rich.console import Console
from rich.table import Table

import pipeline
from pipeline.config.config import Config
from pipeline.core.cancel import NEVER
from pipeline.core.errors import PipelineError
from pipeline.images.sheet import text_image
from pipeline.network.weights import NetworkSpec, WeightsSource, find_weights
from pipeline.rundir.open import identity
from tools.docs.make_controls import merged
from tools.picture import measures

STOPPED = 75  # the program's exit code of a run that can be resumed
GAP_PX, TEXT_PX = 8, 15
Keys = dict[str, Any]
Numbers = dict[str, float]


@dataclass(frozen=True)
class Column:
    """One picture of a sheet, at the size at which it is measured."""

    name: str
    pixels: np.ndarray
    numbers: Numbers


@dataclass(frozen=True)
class Pair:
    """A content and a style; `keys`: further config keys. With the style as content, the PSNR is measured."""

    name: str
    content: Path
    style: Path
    keys: Keys
    crops: Sequence[tuple[float, float]]


class Lab:
    """The lab file, with its paths resolved; raises ClickException if it is wrong."""

    def __init__(self, path: Path, images: Sequence[Path]):
        self._folders = [*images, path.parent]
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
        self.base: Keys = keys.pop("base", {})
        self.settings: dict[str, Keys] = {name: value or {} for name, value in keys.pop("settings").items()}
        self.judge = self.found(judge) if (judge := keys.pop("judge", None)) else None
        self.cell_px: int = keys.pop("cell_px", 400)
        crops = keys.pop("crops", [[0.5, 0.5]])
        self.pairs = [self._pair(name, dict(entry), crops) for name, entry in keys.pop("pairs").items()]
        if keys.pop("identity", False):
            styles = dict.fromkeys(pair.style for pair in self.pairs)
            self.pairs += [Pair(f"identity_{style.stem}", style, style, {}, crops) for style in styles]
        if keys:
            raise click.ClickException(f"{path}: unknown keys {', '.join(keys)}")
        for name in (*self.settings, *(pair.name for pair in self.pairs)):
            if not re.fullmatch(r"[\w.-]+", name):
                raise click.ClickException(f"{path}: {name!r} is no name of a folder")

    def _pair(self, name: str, entry: Keys, crops: Any) -> Pair:
        content, style = (self.found(entry.pop(key)) for key in ("content", "style"))
        crops = entry.pop("crops", crops)
        return Pair(name, content, style, entry, crops)

    def found(self, name: str) -> Path:
        """The file of this name in the folders of images, or beside the lab file."""
        for folder in self._folders:
            if (folder / name).is_file():
                return (folder / name).resolve()
        raise click.ClickException(f"{name}: in none of {', '.join(map(str, self._folders))}")

    def config(self, pair: Pair, setting: str, folder: Path) -> Config:
        """Write the config of one run to `folder`, and load it. Raises ConfigError."""
        keys = merged(merged(self.base, self.settings[setting]), pair.keys)
        style = {"image": str(pair.style), **keys.pop("style", {})}
        if weights := keys.get("network", {}).get("weights"):
            keys["network"]["weights"] = str(self.found(weights))
        keys = {"content": str(pair.content), "styles": [style], "output": "out.png", **keys}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
        return pipeline.load_config(path)


def render(config: Config, folder: Path, fresh: bool) -> bool:
    """Render, resume or reuse the result of a config; whether it is there. Exits if the run was stopped."""
    weights = find_weights(config.network.name, config.network.weights, config.seed)
    now = json.dumps(asdict(identity(config, weights, NEVER)), sort_keys=True, default=str)
    known = folder / "identity.json"
    if fresh or not known.exists() or known.read_text(encoding="utf-8") != now:
        known.unlink(missing_ok=True)
        config.output.unlink(missing_ok=True)
        shutil.rmtree(config.work_dir, ignore_errors=True)
        known.write_text(now, encoding="utf-8")
    if config.output.exists():
        return True
    command = [sys.executable, "-m", "pipeline", "run", "-c", str(folder / "config.yaml"), "--log-format", "plain"]
    code = subprocess.run(command, check=False).returncode
    if code == STOPPED:
        raise SystemExit(STOPPED)
    return code == 0


class Judge:
    """The network of the distances, and the moments of the styles that were measured with it."""

    def __init__(self, path: Path | None, device: str):
        self.name = path.name if path else "vgg19-lite"
        self.source: WeightsSource = find_weights("vgg19" if path else "vgg19-lite", path, 0)
        self.network = NetworkSpec(self.source, "replicate", "max", "float32", device)
        self._styles: dict[tuple[Path, int], tuple[np.ndarray, dict[str, measures.Moments]]] = {}

    def style(self, path: Path, long_px: int) -> tuple[np.ndarray, dict[str, measures.Moments]]:
        if (path, long_px) not in self._styles:
            pixels = measures.read(path, long_px)
            self._styles[path, long_px] = pixels, measures.moments(self.network, pixels)
        return self._styles[path, long_px]

    def numbers(self, image: np.ndarray, content: np.ndarray, style: tuple[np.ndarray, Any]) -> Numbers:
        """All measures of an image, by name and unit."""
        pixels, moments = style
        distances = measures.layer_distances(measures.moments(self.network, image), moments)
        means = [np.mean([distances[f"{kind} {name}"] for name in moments]) for kind in ("W2", "Gram")]
        return {
            **{f"grain {name}, levels": value for name, value in measures.grain(image).items()},
            "specks, ‰": measures.specks(image),
            **{f"lattice {q} px": measures.lattice(image, q) for q in measures.LATTICE_PX},
            **{f"power {name}, dB": value for name, value in measures.spectrum_ratio(image, pixels).items()},
            **{f"border {name}": value for name, value in measures.border(image).items()},
            **{f"edges {name}": value for name, value in measures.edges(image, content).items()},
            "W2 mean": float(means[0]),
            "Gram mean": float(means[1]),
            **distances,
        }


class Sheet:
    """The pictures of a pair in columns: whole, at 100 % and at 400 %."""

    def __init__(self, columns: Sequence[Column], crops: Sequence[tuple[float, float]], cell_px: int):
        self._columns, self._crops, self._cell_px = columns, crops, cell_px

    def write(self, path: Path) -> None:
        rows = [[self._text(column.name) for column in self._columns], list(map(self._whole, self._columns))]
        rows.append([self._text(self._caption(column.numbers)) for column in self._columns])
        for centre in self._crops:
            for zoom in (1, 4):
                rows.append([self._text(f"{zoom * 100} %")])
                rows.append([self._crop(column, centre, zoom) for column in self._columns])
        sheet = pyvips.Image.arrayjoin([self._row(row) for row in rows[:1]], across=1)
        for row in rows[1:]:
            sheet = sheet.join(self._row(row), "vertical", expand=True, shim=GAP_PX, background=255)
        sheet.embed(GAP_PX, GAP_PX, sheet.width + 2 * GAP_PX, sheet.height + 2 * GAP_PX, extend="white").jpegsave(
            str(path), Q=93, subsample_mode="off", keep="none"
        )

    def _row(self, cells: Sequence[Any]) -> Any:
        options = {"hspacing": self._cell_px, "background": 255, "shim": GAP_PX}
        return pyvips.Image.arrayjoin(list(cells), across=len(cells), **options)

    def _text(self, text: str) -> Any:
        return text_image(tuple(("", line) for line in text.split("\n")), TEXT_PX, self._cell_px)

    @staticmethod
    def _caption(numbers: Numbers) -> str:
        grain = " / ".join(f"{numbers[f'grain {plane}, levels']:.1f}" for plane in ("Y", "R-G", "B-Y"))
        edges = " / ".join(f"{numbers[f'edges at {side} px']:.2f}" for side in measures.EDGE_SIDES_PX)
        text = f"grain Y / R-G / B-Y {grain}\nW2 {numbers['W2 mean']:.3f}   specks {numbers['specks, ‰']:.1f} ‰"
        psnr = f"   PSNR {numbers['PSNR, dB']:.1f} dB" if "PSNR, dB" in numbers else ""
        return f"{text}\nedges {edges}{psnr}"

    def _whole(self, column: Column) -> Any:
        image = _image(column.pixels)
        return image.thumbnail_image(self._cell_px, height=self._cell_px)

    def _crop(self, column: Column, centre: tuple[float, float], zoom: int) -> Any:
        image, side = _image(column.pixels), self._cell_px // zoom
        width, height = min(side, image.width), min(side, image.height)
        x, y = (
            min(max(0, round(part * whole - shown / 2)), whole - shown)
            for part, whole, shown in ((centre[0], image.width, width), (centre[1], image.height, height))
        )
        return image.crop(x, y, width, height).resize(zoom, kernel="nearest")


def _image(pixels: np.ndarray) -> Any:
    return pyvips.Image.new_from_array(np.rint(pixels).clip(0, 255).astype(np.uint8), interpretation="srgb")


@dataclass(frozen=True)
class Session:
    """One call of the tool."""

    lab: Lab
    out: Path
    judge: Judge
    fresh: bool

    @cached_property
    def configs(self) -> dict[tuple[str, str], Config]:
        """The configs of all runs, so that a wrong one is found before anything is rendered."""
        return {
            (pair.name, setting): self.lab.config(pair, setting, self.out / pair.name / setting)
            for pair in self.lab.pairs
            for setting in self.lab.settings
        }

    def optimised_by_judge(self) -> bool:
        """Whether a run has the network that measures it."""
        networks = [(config.network.name, config.network.weights, config.seed) for config in self.configs.values()]
        return any(find_weights(*each).sha256 == self.judge.source.sha256 for each in dict.fromkeys(networks))

    def columns(self, pair: Pair) -> list[Column]:
        """Style, content and the results of the settings, with their numbers; renders what is missing."""
        results = []
        for setting in self.lab.settings:
            config = self.configs[pair.name, setting]
            click.echo(f"{pair.name} / {setting}")
            if render(config, self.out / pair.name / setting, self.fresh):
                results.append((setting, config))
            else:
                click.echo(f"{pair.name} / {setting} failed", err=True)
        columns: list[Column] = []
        for setting, config in results:
            last = pipeline.plan(config).stages[-1]
            style = self.judge.style(pair.style, max(last.style_sizes[0]))
            content = measures.read(pair.content, max(last.size), enlarge=True)
            shown = {setting: measures.read(config.output)}
            if not columns:  # the inputs, as they are in the first setting's last stage
                shown = {"style": style[0], "content": content} | shown
            for name, pixels in shown.items():
                numbers = self.judge.numbers(pixels, content, style)
                if pair.content == pair.style and name == setting:
                    numbers["PSNR, dB"] = measures.psnr(pixels, content)
                columns.append(Column(name, pixels, numbers))
        return columns


def table_rows(numbers: Mapping[str, Numbers]) -> list[list[str]]:
    """One row for each measure, with the values of all pictures."""
    names = dict.fromkeys(name for values in numbers.values() for name in values)
    return [[name, *(f"{values[name]:.3g}" if name in values else "" for values in numbers.values())] for name in names]


def print_table(pair: str, numbers: Mapping[str, Numbers]) -> None:
    table = Table(title=pair)
    for name in ("", *numbers):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in table_rows(numbers):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 400).print(table)


def write_page(path: Path, title: str, found: Mapping[str, Mapping[str, Numbers]]) -> None:
    """A page with the sheets and the tables, which needs no other files than the sheets beside it."""
    parts = [f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>body{{font:14px sans-serif}}"]
    parts.append(
        "td,th{padding:1px 10px;text-align:right}td:first-child{text-align:left}tr:hover{background:#eee}</style>"
    )
    parts.append(f"<h1>{escape(title)}</h1>")
    for pair, numbers in found.items():
        name = escape(pair)
        parts.append(f'<h2 id="{name}">{name}</h2><p><a href="{name}.jpg"><img src="{name}.jpg" alt="{name}"></a></p>')
        rows = [["", *numbers], *table_rows(numbers)]
        cells = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in rows)
        parts.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
    path.write_text("\n".join(parts), encoding="utf-8")


@click.command(help=__doc__.split("\n", 1)[0])
@click.argument("lab_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--images", multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--only", multiple=True, metavar="PAIR", help="Pairs to render; all by default.")
@click.option("--judge", type=click.Path(exists=True, path_type=Path), help="Overrides the lab file's.")
@click.option("--device", default="cpu", show_default=True, help="Device of the measuring network.")
@click.option("--fresh", is_flag=True, help="Render anew, for instance after a change of the program.")
def main(
    lab_file: Path, out: Path, images: Sequence[Path], only: Sequence[str], judge: Path | None, device: str, fresh: bool
) -> None:
    lab = Lab(lab_file, images)
    if unknown := set(only) - {pair.name for pair in lab.pairs}:
        raise click.ClickException(f"no pair is called {', '.join(sorted(unknown))}")
    lab.pairs = [pair for pair in lab.pairs if not only or pair.name in only]
    try:
        session = Session(lab, out.resolve(), Judge(judge or lab.judge, device), fresh)
        if session.optimised_by_judge():
            click.echo("some runs have the measuring network as their own, which flatters their distances", err=True)
        found: dict[str, dict[str, Numbers]] = {}
        if only and (out / "measures.json").exists():
            found = json.loads((out / "measures.json").read_text(encoding="utf-8"))
        complete = True
        for pair in lab.pairs:
            columns = session.columns(pair)
            complete &= len(columns) == len(lab.settings) + 2
            if columns:
                Sheet(columns, pair.crops, lab.cell_px).write(out / f"{pair.name}.jpg")
                found[pair.name] = {column.name: column.numbers for column in columns}
                print_table(pair.name, found[pair.name])
                (out / "measures.json").write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
                write_page(out / "index.html", f"{lab_file.stem}, judged by {session.judge.name}", found)
    except PipelineError as error:
        raise click.ClickException(str(error)) from error
    if not complete:
        raise click.ClickException("some runs failed")


if __name__ == "__main__":
    main()
