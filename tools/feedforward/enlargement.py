"""Compare an enlargement by a network with bicubic and Lanczos on held-out pictures: PSNR, SSIM and feature loss.

    python -m tools.feedforward.enlargement net.safetensors PICTURE_OR_FOLDER… --sheet out/sheet.png

The input is made of each picture as in training: blurred (σ 1 px) and reduced, bicubic. PSNR and SSIM are of the
luminance without a margin of the factor, as the paper measures them; the feature loss is ‖φ(x) − φ(y)‖²/‖φ(y)‖² at
conv2_2 of each `--loss-network`: name one too that the network was not trained with. The lattice is that of
tools/picture, of the factor's px. Axes in names: 1 batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import numpy as np
import pyvips
import torch
import torch.nn.functional as F
from numpy import ndarray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipeline.core.tiling import Rect
from pipeline.feedforward.network import enlarged
from pipeline.feedforward.network_file import load_network
from pipeline.feedforward.photographs import SUFFIXES, lowered
from pipeline.network import find_weights
from pipeline.network.vgg import Network
from pipeline.network.weights_file import load_state
from tools.picture.measures import lattice, luminance, psnr, read

LAYER = "conv2_2"


def ssim(image_HW: ndarray, reference_HW: ndarray) -> float:
    """Structural similarity (Wang et al. 2004): windows of 11 px, σ 1.5, range 0..255."""
    at = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-at.square() / (2 * 1.5**2))
    window = window / window.sum()

    def mean(plane: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(plane, window[None, None, :, None]), window[None, None, None, :])

    x, y = (torch.from_numpy(np.asarray(plane, np.float64))[None, None] for plane in (image_HW, reference_HW))
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean())


def features(network: Network, pixels_1CHW: Tensor) -> Tensor:
    size = (pixels_1CHW.shape[2], pixels_1CHW.shape[3])
    whole = Rect(0, size[0], 0, size[1])
    (found,) = network.features(pixels_1CHW, whole, size, {LAYER}, whole)
    return found.features_1CHW


def tensor(image_HWC: ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image_HWC, np.float32)).permute(2, 0, 1)[None]


def array(pixels_1CHW: Tensor) -> ndarray:
    return pixels_1CHW[0].clamp(0, 255).round().permute(1, 2, 0).numpy()


def lanczos(small: ndarray, factor: int) -> ndarray:
    image = pyvips.Image.new_from_array(small.astype(np.float32))
    return np.clip(np.rint(image.resize(factor, kernel="lanczos3").numpy()), 0, 255)


def enlargements(path: Path, network: torch.nn.Module, factor: int) -> tuple[ndarray, dict[str, ndarray]]:
    """The picture, cut to whole steps of the factor, and what each method makes of its reduction."""
    picture = read(path)
    height, width = (side // factor * factor for side in picture.shape[:2])
    picture = np.asarray(picture[:height, :width], np.float64)
    small_1CHW = lowered(tensor(picture), factor)
    with torch.no_grad():
        ours = network(small_1CHW)
    methods = {
        "bicubic": array(enlarged(small_1CHW, factor)),
        "Lanczos": lanczos(array(small_1CHW), factor),
        "network": array(ours),
    }
    return picture, methods


def pictures_in(paths: tuple[Path, ...]) -> Iterator[Path]:
    for path in paths:
        yield from sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]


def loss_network_of(name: str) -> Network:
    """A network by its name in `network.name`, or by its file."""
    path = Path(name) if Path(name).suffix else None
    source = find_weights(name, path, 0)
    assert source.path is not None, "a network with weights"
    state = load_state(source.path)
    return Network(state, padding="replicate", pooling="average", dtype=torch.float32, device="cpu")


def measured(picture: ndarray, image: ndarray, loss_networks: Iterable[Network], margin: int) -> list[float]:
    """PSNR, SSIM, the lattice of the input's pixels, and the feature loss of each network."""
    inner = slice(margin, -margin)
    ours, theirs = (luminance(x.astype(np.float64))[inner, inner] for x in (image, picture))
    losses = []
    for network in loss_networks:
        target = features(network, tensor(picture))
        losses.append(float((features(network, tensor(image)) - target).square().sum() / target.square().sum()))
    return [psnr(ours, theirs), ssim(ours, theirs), lattice(image, margin), *losses]


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.argument("network_path", metavar="NETWORK", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("paths", metavar="PICTURE…", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--loss-network", "names", multiple=True, default=["vgg19-lite"], show_default=True, help="Name or weights file."
)
@click.option("--sheet", type=click.Path(path_type=Path), help="PNG of the first pictures: by method, original last.")
def main(network_path: Path, paths: tuple[Path, ...], names: tuple[str, ...], sheet: Path | None) -> None:
    file = load_network(network_path)
    if file.spec.task != "super-resolution":
        raise click.UsageError(f"{network_path} is a network of task {file.spec.task}, not super-resolution.")
    network, factor = file.network(), file.spec.factor
    loss_networks = [loss_network_of(name) for name in names]
    rows: dict[str, list[list[float]]] = {}
    strips: list[ndarray] = []
    for path in pictures_in(paths):
        picture, methods = enlargements(path, network, factor)
        for name, image in methods.items():
            rows.setdefault(name, []).append(measured(picture, image, loss_networks, factor))
        if len(strips) < 4:
            part = slice(0, 240), slice(0, 240)
            strips.append(np.concatenate([image[part] for image in (*methods.values(), picture)], 1))
    columns = [f"{LAYER} of {Path(name).stem}" for name in names]
    table = Table(f"×{factor}, {len(next(iter(rows.values())))} pictures", "PSNR", "SSIM", "lattice", *columns)
    for name, values in rows.items():
        decibel, *others = np.mean(values, 0)
        table.add_row(name, f"{decibel:.2f}", *(f"{value:.4f}" for value in others))
    Console().print(table)
    if sheet:
        width = min(strip.shape[1] for strip in strips)
        joined = np.concatenate([strip[:, :width] for strip in strips]).astype(np.uint8)
        pyvips.Image.new_from_array(joined, interpretation="srgb").write_to_file(str(sheet))


if __name__ == "__main__":
    main()
