"""How far the Grams and the gradient in each `compute.dtype` are from float64, and what each costs.

One picture, one style, a canvas half way between the picture and noise: style targets, content features, Grams, seeds
and gradient are all computed in the dtype, as a stage of one tile computes them; the reference is the same in float64.

    relative error      ‖found − float64‖ / ‖float64‖
    angle               between the two gradients, in degrees

    python -m tools.bench.dtypes --device cuda:0 --json dtypes.json
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyvips
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipeline.config.sections import LossConfig, NetworkConfig
from pipeline.core.tiling import Rect
from pipeline.losses import objective
from pipeline.losses.objective import Gram
from pipeline.network.cache import get_network
from pipeline.network.vgg import FeatureMap, Network, Step
from pipeline.network.weights import NetworkSpec, find_weights
from tools.bench.runs import machine, make_picture, make_weights, synchronised

STYLE, CONTENT = NetworkConfig().style_layers, NetworkConfig().content_layers
DTYPES = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class Found:
    """What one dtype finds. Axes: C channels, H rows, W columns."""

    grams_CC: Mapping[str, Gram]
    style_loss: float
    content_loss: float
    gradient_HWC: np.ndarray[Any, np.dtype[np.float64]]
    seconds: float


@dataclass(frozen=True)
class Row:
    """Relative errors of one dtype, the angle in degrees, and seconds and device bytes per pixel."""

    dtype: str
    grams: Mapping[str, float]
    style_loss: float
    content_loss: float
    gradient: float
    angle: float
    seconds_per_px: float
    bytes_per_px: float


class Problem:
    """The pictures on a device, and what a network makes of them."""

    def __init__(self, pictures: list[np.ndarray], device: str) -> None:
        self.pictures, self.device = pictures, device

    def solve(self, network: Network, dtype: str) -> Found:
        """Grams, losses and gradient of the canvas."""
        content, style, canvas = (
            torch.from_numpy(one).to(self.device, torch.float64 if dtype == "float64" else torch.float32)
            for one in self.pictures
        )
        with torch.no_grad():
            targets = {name: objective.gram_sum(x[0]) / x[0, 0].numel() for name, x in features(network, style, STYLE)}
            wanted = dict(features(network, content, CONTENT))
            start = synchronised(self.device)
            found = self._gradient(network, canvas, targets, wanted)
            return Found(*found, synchronised(self.device) - start)

    def _gradient(
        self, network: Network, canvas: Tensor, targets: Mapping[str, Gram], wanted: Mapping[str, Tensor]
    ) -> tuple[dict[str, Gram], float, float, np.ndarray]:
        height, width, _ = canvas.shape
        settings, terms, grams = LossConfig(), {}, {}
        way: list[Step] = []
        for name, x in features(network, canvas, {**STYLE, **CONTENT}, way):
            if name in STYLE:
                positions = x[0, 0].numel()
                factor = height * width * settings.style_weight
                target = objective.StyleTarget(settings.kind, targets[name], positions, STYLE[name], factor)
                grams[name] = objective.gram_sum(x[0])
                terms[name] = target.term(grams[name])
        squares: dict[str, float] = {}

        def seed(found: FeatureMap) -> Tensor | None:
            name, x = found.layer.name, found.features_1CHW
            if name in terms:
                return objective.style_seed(x, terms[name].seed_CC)
            if name not in CONTENT:
                return None
            scale = CONTENT[name] / objective.energy(wanted[name][0])
            difference = x - wanted[name]
            squares[name] = scale * float(objective.squares(difference[0]))
            return (2 * height * width * settings.content_weight * scale * difference).to(x)

        gradient = network.gradient(way, seed)[0].permute(1, 2, 0).double().cpu().numpy()
        return grams, sum(term.loss for term in terms.values()), sum(squares.values()), gradient


def features(
    network: Network, picture_HWC: Tensor, names: Mapping[str, float], way: list[Step] | None = None
) -> list[tuple[str, Tensor]]:
    """(layer, features) of a whole picture."""
    height, width, _ = picture_HWC.shape
    whole = Rect(0, height, 0, width)
    pixels_1CHW = picture_HWC.permute(2, 0, 1)[None]
    found = network.features(pixels_1CHW, whole, (height, width), set(names), whole, way)
    return [(one.layer.name, one.features_1CHW) for one in found]


def relative(found: Any, wanted: Any) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def angle(one: np.ndarray, other: np.ndarray) -> float:
    """Degrees between two gradients."""
    cosine = float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))
    return math.degrees(math.acos(min(1.0, cosine)))


def measure(problem: Problem, weights: Path, dtype: str, wanted: Found) -> Row:
    """One line of the table."""
    network = get_network(NetworkSpec(find_weights("vgg19", weights, 0), "replicate", "max", dtype, problem.device))
    problem.solve(network, dtype)  # compiles and chooses kernels
    on_gpu = problem.device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    found = [problem.solve(network, dtype) for _ in range(3)]
    after = torch.cuda.max_memory_allocated() if on_gpu else 0
    pixels = found[0].gradient_HWC.size / 3
    return Row(
        dtype,
        {name: relative(gram, wanted.grams_CC[name]) for name, gram in found[0].grams_CC.items()},
        found[0].style_loss / wanted.style_loss - 1,
        found[0].content_loss / wanted.content_loss - 1,
        relative(found[0].gradient_HWC, wanted.gradient_HWC),
        angle(found[0].gradient_HWC, wanted.gradient_HWC),
        sorted(one.seconds for one in found)[1] / pixels,
        (after - before) / pixels,
    )


def pictures(folder: Path, content: Path | None, style: Path | None, size: int) -> list[np.ndarray]:
    """Content, style, and the content mixed with noise: (H, W, 3) float64 of 0..255."""
    found = []
    for seed, path in enumerate((content, style)):
        picture = pyvips.Image.thumbnail(str(path or make_picture(folder / f"{seed}.png", size, size, seed)), size)
        found.append(picture.colourspace("srgb")[:3].numpy().astype(np.float64))
    noise = np.random.default_rng(0).uniform(0, 255, found[0].shape)
    return [*found, (found[0] + noise) / 2]


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--size", default=1024, show_default=True, help="Long side of the pictures, px.")
@click.option("--dtype", "dtypes", multiple=True, default=DTYPES, show_default=True)
@click.option("--content", type=click.Path(path_type=Path), help="A picture; default one made up.")
@click.option("--style", type=click.Path(path_type=Path), help="A picture; default one made up.")
@click.option("--weights", type=click.Path(path_type=Path), help="A weights file; default random of VGG-19's widths.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here too.")
def main(
    device: str,
    size: int,
    dtypes: tuple[str, ...],
    content: Path | None,
    style: Path | None,
    weights: Path | None,
    json_path: Path | None,
) -> None:
    """Print the errors of every dtype against float64."""
    with tempfile.TemporaryDirectory() as name:
        weights = weights or make_weights(Path(name) / "random.safetensors")
        problem = Problem(pictures(Path(name), content, style, size), device)
        source = find_weights("vgg19", weights, 0)
        exact = get_network(NetworkSpec(source, "replicate", "max", "float64", device))
        wanted = problem.solve(exact, "float64")
        rows = [measure(problem, weights, dtype, wanted) for dtype in dtypes]
    table = Table(title=f"relative errors against float64, {size} px, {machine(device)['gpu']}")
    for column in ("dtype", *STYLE, "Ls", "Lc", "gradient", "angle °", "ns/px", "B/px"):
        table.add_column(column, justify="right")
    for row in rows:
        errors = [*(row.grams[layer] for layer in STYLE), row.style_loss, row.content_loss, row.gradient]
        cost = (f"{row.angle:.3f}", f"{row.seconds_per_px * 1e9:.1f}", f"{row.bytes_per_px:.0f}")
        table.add_row(row.dtype, *(f"{error:.1e}" for error in errors), *cost)
    Console(width=160).print(table)
    if json_path:
        json_path.write_text(json.dumps({"machine": machine(device), "rows": [asdict(row) for row in rows]}), "utf-8")


if __name__ == "__main__":
    main()
