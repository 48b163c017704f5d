"""What a state in 16 bits changes in a picture: the last objective, and the distance to the float one.

Every picture is rendered in float, compact, and in float again in other tiles: that one is the control, because a run
of another rounding ends in another picture of the same quality. Wanted: the objective within 1 % of float's, and
pictures that cannot be told apart. `--pictures` keeps float, compact and control side by side. `--repeats` renders all
of them several times, from style weights a millionth apart, which is rounding too: their means can be compared, and
their deviations say how much of a difference is the optimiser's own.

    python -m tools.bench.compact --pictures compact/ --json compact.json
    python -m tools.bench.compact --pair bridge.jpg portrait.jpg --size 512
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyvips
from rich.console import Console
from rich.table import Table

import pipeline
from pipeline.core.events import Event, IterationDone

SAMPLES = Path(__file__).parents[2] / "configs" / "samples"
SMOOTH = {
    "network": {"name": "vgg19-lite", "pooling": "average"},
    "loss": {"content_weight": 0.02},
    "optimizer": {"target_pixel_change": 5.0},
}
PROGRAM = {"network": {"name": "vgg19-lite"}}
# How each of the three is computed; the control's tiles are half as large.
WAYS = {"float": ("float", 1), "compact": ("compact", 1), "control": ("float", 2)}


@dataclass(frozen=True)
class Row:
    """Mean objectives of the last iteration as shares of float's, and PSNR in dB against the float picture.

    `deviations`: of a single render, as a share of float's mean, by way.
    """

    name: str
    size: int
    iterations: int
    repeats: int
    objective: float
    compact: float
    control: float
    deviations: dict[str, float]
    compact_db: float
    control_db: float


def cases(pairs: tuple[tuple[Path, Path], ...]) -> list[tuple[str, Path, Path, dict[str, Any]]]:
    """(name, content, style, sections of the config)."""
    landscape, strokes = SAMPLES / "landscape.jpg", SAMPLES / "strokes.jpg"
    found = [
        ("samples, smooth", landscape, strokes, SMOOTH),
        ("samples, defaults", landscape, strokes, PROGRAM),
        ("samples exchanged, defaults", strokes, landscape, PROGRAM),
    ]
    return [(f"{one.stem} in {other.stem}", one, other, PROGRAM) for one, other in pairs] or found


def render(folder: Path, content: Path, style: Path, sections: dict[str, Any], way: str, size: int) -> float:
    """The objective of the last iteration; the picture is `<way>.png` in the folder."""
    state, parts = WAYS[way]
    config = folder / f"{way}.json"
    keys = {
        "content": str(content.absolute()),
        "styles": [{"image": str(style.absolute())}],
        "output": f"{way}.png",
        "work_dir": f"{way}.run",
        "size": size,
        "initial_size": size // 2,
        "store": {"state_dtype": state, "chunk_px": 64},
        "compute": {"device": "cpu", "tile_px": -(-size // parts // 64) * 64},
    }
    config.write_text(json.dumps({**keys, **sections}), encoding="utf-8")
    objectives: list[float] = []

    def sink(event: Event) -> None:
        if isinstance(event, IterationDone):
            objectives.append(event.objective)

    pipeline.run(pipeline.load_config(config), sink=sink)
    return objectives[-1]


def psnr_db(one: Path, other: Path) -> float:
    """Peak signal-to-noise ratio of two pictures of 8 bits."""
    difference = np.subtract(*(pyvips.Image.new_from_file(str(path)).numpy().astype(float) for path in (one, other)))
    mean_square = np.mean(np.square(difference))
    return float(10 * np.log10(255**2 / mean_square)) if mean_square else float("inf")


def measure(
    name: str, content: Path, style: Path, sections: dict[str, Any], size: int, iterations: int, repeats: int
) -> Row:
    """Render one picture in all ways, and keep the first three beside each other in the working folder."""
    optimizer = {**sections.get("optimizer", {}), "max_iterations": iterations}
    with contextlib.ExitStack() as folders:
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in reversed(range(repeats)):  # the last folder is that of the first
            folder = Path(folders.enter_context(tempfile.TemporaryDirectory()))
            loss = {**sections.get("loss", {}), "style_weight": 1 + number * 1e-6}
            for way, objectives in found.items():
                keys = {**sections, "optimizer": optimizer, "loss": loss}
                objectives.append(render(folder, content, style, keys, way, size))
        means = {way: statistics.fmean(objectives) for way, objectives in found.items()}
        shown = [pyvips.Image.new_from_file(str(folder / f"{way}.png")) for way in WAYS]
        pyvips.Image.arrayjoin(shown, across=len(shown), shim=8).write_to_file(f"{name}.png")
        return Row(
            name,
            size,
            iterations,
            repeats,
            means["float"],
            *(means[way] / means["float"] for way in ("compact", "control")),
            {way: statistics.pstdev(objectives) / means["float"] for way, objectives in found.items()},
            *(psnr_db(folder / "float.png", folder / f"{way}.png") for way in ("compact", "control")),
        )


@click.command()
@click.option("--size", default=256, show_default=True, help="Long side, px; the first stage has half of it.")
@click.option("--iterations", default=60, show_default=True, help="Of each stage.")
@click.option("--repeats", default=1, show_default=True, help="Renders of each.")
@click.option(
    "--pair", "pairs", multiple=True, type=(click.Path(path_type=Path), click.Path(path_type=Path)), help="Other ones."
)
@click.option("--pictures", type=click.Path(path_type=Path), help="Keep the pictures in this folder.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here too.")
def main(
    size: int,
    iterations: int,
    repeats: int,
    pairs: tuple[tuple[Path, Path], ...],
    pictures: Path | None,
    json_path: Path | None,
) -> None:
    """Print objectives and distances of pictures in float and in 16 bits."""
    rows = []
    table = Table(title=f"{size} px, {iterations} iterations a stage, against float")
    for column in ("picture", "objective", "compact", "control", "deviations", "compact dB", "control dB"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as scratch:
        kept = pictures or Path(scratch)
        kept.mkdir(parents=True, exist_ok=True)
        for name, content, style, sections in cases(pairs):
            rows.append(row := measure(str(kept / name), content, style, sections, size, iterations, repeats))
            shares = f"{row.objective:.5g}", f"{row.compact:.4f}", f"{row.control:.4f}"
            spread = ", ".join(f"{share:.4f}" for share in row.deviations.values())
            table.add_row(name, *shares, spread, f"{row.compact_db:.1f}", f"{row.control_db:.1f}")
    Console().print(table)
    if json_path:
        json_path.write_text(json.dumps([{**asdict(row), "name": Path(row.name).name} for row in rows], indent=2))


if __name__ == "__main__":
    main()
