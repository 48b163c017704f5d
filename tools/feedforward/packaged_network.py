"""Draw the training pictures and train the packaged style network with tools/feedforward/strokes.yaml.

    python -m tools.feedforward.packaged_network

The same command resumes a training that was stopped. The network is out/feedforward/strokes.safetensors; copy it to
pipeline/assets. --curve writes the curve of the losses as an SVG file.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from numpy import ndarray

import pipeline
from pipeline.cli.display import make_sink
from pipeline.cli.signals import stop_on_signals
from tools.feedforward.training_pictures import draw_pictures

CONFIG = Path(__file__).with_name("strokes.yaml")
NUMBER, SEED = 56, 18
SIZE_PX, MARGIN_PX = (640, 260), 40


def curve(losses: Path) -> str:
    """The losses of a training as an SVG: means over a hundredth of the steps, on a logarithmic scale."""
    rows = [json.loads(line) for line in losses.read_text().splitlines()]
    width, height = SIZE_PX
    series = {name: means([row[name] for row in rows]) for name in ("objective", "content", "style")}
    low, high = (np.log10(f(np.concatenate(list(series.values())))) for f in (np.min, np.max))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for (name, values), color in zip(series.items(), ("#222222", "#1b6ca8", "#c4501b"), strict=True):
        x = MARGIN_PX + np.linspace(0, width - 2 * MARGIN_PX, len(values))
        y = height - MARGIN_PX - (np.log10(values) - low) / (high - low) * (height - 2 * MARGIN_PX)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        label = f"{name} {values[0]:.3g} → {values[-1]:.3g}"
        place = 16 + 14 * list(series).index(name)
        parts.append(f'<text x="{width - 220}" y="{place}" font-size="12" fill="{color}">{label}</text>')
    parts.append(f'<text x="{MARGIN_PX}" y="{height - 12}" font-size="12">steps 1 to {len(rows):,}</text></svg>')
    return "\n".join(parts) + "\n"


def means(values: list[float]) -> ndarray:
    return np.array([part.mean() for part in np.array_split(np.array(values), min(100, len(values)))])


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--curve", "curve_path", type=click.Path(path_type=Path), help="SVG of the losses so far; no training.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value of the config.")
def main(curve_path: Path | None, overrides: tuple[str, ...]) -> None:
    config = pipeline.load_train_config(CONFIG, overrides)
    if curve_path:
        curve_path.write_text(curve(config.work_dir / "losses.jsonl"))
        return
    draw_pictures(config.photographs, NUMBER, SEED)
    sink = make_sink("auto")
    with stop_on_signals(sink, sink.farewell) as stop, sink:
        click.echo(pipeline.train(config, sink=sink, stop=stop))


if __name__ == "__main__":
    main()
