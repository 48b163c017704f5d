"""A style network against the optimiser on the same picture and losses: both losses, seconds, side by side at 100 %.

    python -m tools.feedforward.compare tools/feedforward/strokes.yaml configs/samples/landscape.jpg out/compare

CONFIG is that of the training; the optimiser's run has its losses, layers, style size and weights, at one size, and
starts from the content. The network runs whole, without tiles. Writes network.png, optimiser.png and side.png.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import pyvips
import torch
from numpy import ndarray
from rich.console import Console
from rich.table import Table

import pipeline
from pipeline.config import TrainConfig
from pipeline.feedforward.network_file import load_network
from pipeline.feedforward.objective import Losses, TrainingObjective
from pipeline.feedforward.training import weights_of
from pipeline.network import find_weights
from pipeline.network.vgg import Network
from pipeline.network.weights_file import load_state
from tools.feedforward.enlargement import array, tensor
from tools.picture.measures import read


def optimised(config: TrainConfig, content: Path, size: int, iterations: int, folder: Path) -> tuple[ndarray, float]:
    """The picture of a run with the training's losses, and its seconds."""
    style, network, loss = config.styles[0], config.loss_network, config.loss
    output = folder / "optimiser.png"
    settings = {
        "content": content,
        "styles": [{"image": style.image, "max_size": style.size, "scale": 100.0}],
        "output": output,
        "size": size,
        "initial_size": size,
        "network": network.model_dump(),
        "loss": {
            "kind": loss.kind,
            "content_weight": loss.content_weight,
            "style_weight": loss.style_weight,
            "tv_weight": loss.tv_weight,
        },
        "optimizer": {"max_iterations": iterations},
        "compute": {"device": "cpu"},
        "export": {"metadata": "none"},
    }
    start = time.monotonic()
    pipeline.run(pipeline.Config.model_validate(settings), force=True)
    return read(output), time.monotonic() - start


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.argument("config_path", metavar="CONFIG", type=click.Path(exists=True, path_type=Path))
@click.argument("content", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--network", "network_path", type=click.Path(exists=True, path_type=Path), help="Default: the output.")
@click.option("--size", default=512, show_default=True, help="Long side in px.")
@click.option("--iterations", default=40, show_default=True, help="Of the optimiser.")
@click.option("--crop", default="96,96,320", show_default=True, help="x,y,side of the part that side.png shows.")
def main(
    config_path: Path, content: Path, folder: Path, network_path: Path | None, size: int, iterations: int, crop: str
) -> None:
    config = pipeline.load_train_config(config_path)
    content = content.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    network = load_network(network_path or config.output).network()
    picture = read(content, size)
    start = time.monotonic()
    with torch.no_grad():
        ours = array(network(tensor(picture)))
    network_s = time.monotonic() - start
    theirs, optimiser_s = optimised(config, content, size, iterations, folder.absolute())
    losses = {name: losses_of(config, image, picture) for name, image in
              {"content itself": picture, "network": ours, "optimiser": theirs}.items()}  # fmt: skip
    seconds = {"network": network_s, "optimiser": optimiser_s}
    table = Table(f"{size} px", "content loss", "style loss", "objective", "seconds")
    for name, found in losses.items():
        took = f"{seconds[name]:.1f}" if name in seconds else ""
        table.add_row(name, f"{found.content:.3f}", f"{found.style:.4f}", f"{found.objective:.3f}", took)
    Console().print(table)
    x, y, side = map(int, crop.split(","))
    parts = [image[y : y + side, x : x + side] for image in (picture, ours, theirs)]
    write(folder / "network.png", ours)
    write(folder / "side.png", np.concatenate(parts, 1))


def losses_of(config: TrainConfig, image: ndarray, content: ndarray) -> Losses:
    """The losses of the training at a whole picture."""
    source = find_weights(config.loss_network.name, config.loss_network.weights, config.seed)
    assert source.path is not None, "a network with weights"
    vgg = Network(
        load_state(source.path),
        padding=config.loss_network.padding,
        pooling=config.loss_network.pooling,
        dtype=torch.float32,
        device="cpu",
    )
    styles = [[tensor(read(style.image, style.size))] for style in config.styles]
    return TrainingObjective(vgg, weights_of(config), styles).evaluate(tensor(image), tensor(content), [0])[0]


def write(path: Path, image: ndarray) -> None:
    pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    pyvips.Image.new_from_array(pixels, interpretation="srgb").write_to_file(str(path))


if __name__ == "__main__":
    main()
