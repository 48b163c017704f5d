"""The factor behind a pooling with which a network that was trained with max pooling sees the magnitudes it knows.

Per pooling layer RMS(max)/RMS(kind), both of the same map: that of the network with max pooling. Their geometric mean
is the value for `network.pooling_scale`. Last the RMS at conv5_1 of a whole network with that pooling, relative to max
pooling, without the factor and with it.

    python -m tools.picture.pooling_scale --weights vgg19-16x.safetensors --images photographs/
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pipeline.core.vgg_layers import AFTER_POOLING, CONV_NAMES
from pipeline.network.pooling import Pooling
from pipeline.network.weights import NetworkSpec, find_weights
from tools.paper import measures

KINDS = ("average", "tent", "l2")
POOLED = tuple(CONV_NAMES[CONV_NAMES.index(name) - 1] for name in AFTER_POOLING)


def factors_of(weights: Path | None, padding: str, photographs: list[np.ndarray]) -> Iterator[tuple[str, list[float]]]:
    """Per kind the factor at every pooling, their geometric mean, and the RMS at conv5_1 without and with that mean."""
    spec = NetworkSpec(find_weights("vgg19-lite", weights, 0), padding, "max", "float32", "cpu")
    maps = [measures.features(spec, photograph) for photograph in photographs]
    trained = rms([features["conv5_1"] for features in maps])
    for kind in KINDS:
        factors = []
        for name in POOLED:
            largest, other = (
                rms([pooled(features[name], pooling, padding) for features in maps]) for pooling in ("max", kind)
            )
            factors.append(largest / other)
        mean = float(np.exp(np.mean(np.log(factors))))
        relative = [
            rms([measures.features(network, photograph)["conv5_1"] for photograph in photographs]) / trained
            for network in (replace(spec, pooling=kind), replace(spec, pooling=kind, pooling_scale=mean))
        ]
        yield kind, [*factors, mean, *relative]


def pooled(features_CHW: torch.Tensor, pooling: str, padding: str) -> torch.Tensor:
    """A whole map, pooled."""
    rows, columns = (slice(0, side // 2 * 2) for side in features_CHW.shape[1:])
    return Pooling(pooling, padding).forward(features_CHW[None], (rows, columns), with_tape=False).features_1CHW


def rms(maps: list[torch.Tensor]) -> float:
    """Root mean square over all values of some maps."""
    return float(np.sqrt(sum(float(m.double().square().sum()) for m in maps) / sum(m.numel() for m in maps)))


@click.command()
@click.option("--weights", type=click.Path(path_type=Path, exists=True), help="Weights file; default: vgg19-lite's.")
@click.option("--images", required=True, type=click.Path(path_type=Path, exists=True), help="Folder of photographs.")
@click.option("--count", default=10, show_default=True, help="Number of photographs, evenly over the names.")
@click.option("--long-px", default=320, show_default=True, help="Long side of a photograph.")
@click.option("--padding", default="replicate", show_default=True, help="As network.padding.")
def main(weights: Path | None, images: Path, count: int, long_px: int, padding: str) -> None:
    """Print the factors of every pooling."""
    paths = sorted(images.glob("*.jpg"))
    photographs = [measures.read(path, long_px) for path in paths[:: max(1, len(paths) // count)][:count]]
    table = Table()
    for column in ("pooling", *POOLED, "geometric mean", "conv5_1 at 1", "conv5_1 at the mean"):
        table.add_column(column)
    for kind, values in factors_of(weights, padding, photographs):
        table.add_row(kind, *(f"{value:.2f}" for value in values))
    Console().print(table)


if __name__ == "__main__":
    main()
