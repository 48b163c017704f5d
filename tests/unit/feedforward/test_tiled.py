"""Tiles against the whole image through the torch module: statistics of every norm, and pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.tiling import Rect, Tile
from pipeline.feedforward import activations, geometry, tiled
from pipeline.feedforward.network import padded
from pipeline.feedforward.network_file import TransformFile
from pipeline.feedforward.tiled import Moments, Statistics, TiledNetwork
from tests.support.networks import random_network

FLOAT64 = {"dtype": torch.float64}
KINDS = {
    "instance": {},
    "batch": {"norm": "batch"},
    "none": {"norm": "none", "output": "linear"},
    "bytes": {"pixels": "bytes", "output": "linear"},
    "styles": {"styles": ("a", "b")},
    "original": {"start_padding_px": 40, "block_padding": False, "upsampling": "fractional"},
    "super-resolution": {"task": "super-resolution", "factor": 4},
    "skip": {"task": "super-resolution", "factor": 4, "norm": "batch", "skip": "bicubic", "output": "linear"},
    "skip, instance": {"task": "super-resolution", "factor": 8, "skip": "bicubic", "output": "linear"},
}


def in_tiles(file: TransformFile, image: torch.Tensor, rects: list[Rect], style: list[float]) -> torch.Tensor:
    """The output of a network, tile by tile."""
    spec, size = file.spec, (image.shape[2], image.shape[3])
    network = TiledNetwork(file, style, torch.float64, "cpu")
    tiles = [Tile(0, rect, size[0] * spec.factor, size[1] * spec.factor) for rect in rects]
    known: dict[str, Statistics] = {}

    def pixels(window: geometry.Window) -> torch.Tensor:
        return image[:, :, window.pixels.y0 : window.pixels.y1, window.pixels.x0 : window.pixels.x1]

    for conv in spec.measured_norms():
        step = activations.step_of(spec, 0, size, conv, keeps=False)
        total: Moments | None = None
        for tile in tiles:
            wanted = activations.wanted(spec, size, step, tile)
            if wanted.area:
                window = activations.window(spec, size, step, wanted)
                part = tiled.moments_of(network.before_norm(window, network.input(pixels(window)), known, conv))
                total = part if total is None else total.plus(part)
        assert total is not None
        known[conv.name] = total.statistics()
    out = torch.full((1, 3, size[0] * spec.factor, size[1] * spec.factor), torch.nan, **FLOAT64)
    for rect in rects:
        window = geometry.window(spec, size, spec.layers, rect)
        read = geometry.enlarged_from(rect, size, spec.factor)
        small = image[:, :, read.y0 : read.y1, read.x0 : read.x1]
        skip = tiled.enlarged_part(small, read, rect, spec.factor)
        y = network.output(window, network.input(pixels(window)), known, skip)
        out[:, :, rect.y0 : rect.y1, rect.x0 : rect.x1] = y
    return out


def cut(height: int, width: int, tile_px: int) -> list[Rect]:
    return [
        Rect(y, min(y + tile_px, height), x, min(x + tile_px, width))
        for y in range(0, height, tile_px)
        for x in range(0, width, tile_px)
    ]


def check(kind: str, height: int, width: int, tiles_px: list[int], seed: int = 0) -> None:
    network = random_network(seed, **KINDS[kind]).double()
    file, factor = TransformFile(network.spec, network.state_dict()), network.spec.factor
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed), **FLOAT64) * 255
    style = [0.25, 0.75] if kind == "styles" else [1.0]
    with torch.no_grad():
        whole = network(image, torch.tensor([style], **FLOAT64))
        assert whole.shape[2:] == (height * factor, width * factor)
        assert whole.std() > 0.1  # a picture, not a constant
        for tile_px in tiles_px:
            parts = in_tiles(file, image, cut(height * factor, width * factor, tile_px), style)
            assert (parts - whole).abs().max() < 1e-10, (kind, tile_px)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_give_the_whole_image(kind: str) -> None:
    """One tile, four, six, and ragged ones, at odd sizes."""
    height, width = {"original": (43, 51)}.get(kind, (11, 15) if "factor" in KINDS[kind] else (37, 51))
    check(kind, height, width, [64, 26, 20])


@given(
    st.sampled_from(["instance", "batch", "original"]), st.integers(41, 56), st.integers(41, 56), st.integers(17, 60)
)
@settings(max_examples=4, deadline=None)
def test_any_size_in_any_tiles(kind: str, height: int, width: int, tile_px: int) -> None:
    check(kind, height, width, [tile_px], seed=height)


def test_the_least_side_is_the_least_that_torch_can_pad() -> None:
    for kind, keys in KINDS.items():
        network = random_network(**keys)
        least = network.spec.least_side_px()
        network(torch.zeros(1, 3, least, least))
        if kind != "none":
            with pytest.raises(RuntimeError):
                network(torch.zeros(1, 3, least - 1, least - 1))


def test_padding_by_concatenation_is_torchs_reflection() -> None:
    image = torch.rand(2, 3, 7, 9)
    assert torch.equal(padded(image, 4, "reflect"), F.pad(image, (4, 4, 4, 4), mode="reflect"))
