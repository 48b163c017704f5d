"""Whitening and colouring: the command in tiles against plain torch on whole images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pipeline.commands.apply import apply
from pipeline.core.errors import ConfigError
from pipeline.feedforward.wct import transport
from tests.support.inputs import write_image
from tests.support.networks import write_network, write_wct
from tests.unit.feedforward.test_apply import canvas, config, pixels_of

HEIGHT, WIDTH = 45, 67


def conv(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight, bias = state[f"{name}.weight"].double(), state[f"{name}.bias"].double()
    side = weight.shape[2] // 2
    return F.conv2d(F.pad(x, (side,) * 4, mode="reflect") if side else x, weight, bias)


def features(state: dict[str, Tensor], level: int, pixels: Tensor) -> Tensor:
    x = conv(state, f"encoder{level}.input", pixels / 255)
    for block in range(1, level + 1):
        if block > 1:
            x = F.max_pool2d(x, 2, ceil_mode=True)
        for number in range(1, 2 if block == level else (3, 3, 5, 5)[block - 1]):
            x = F.relu(conv(state, f"encoder{level}.conv{block}_{number}", x))
    return x


def decoded(state: dict[str, Tensor], level: int, x: Tensor) -> Tensor:
    for block in range(level, 0, -1):
        for number in range(1 if block == level else (2, 2, 4, 4)[block - 1], 0, -1):
            x = conv(state, f"decoder{level}.conv{block}_{number}", x)
            x = x if (block, number) == (1, 1) else F.relu(x)
        if block > 1:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
    return x * 255


def whole(state: dict[str, Tensor], content: np.ndarray, style: np.ndarray, levels: list[int], strength: float) -> Any:
    """Li et al.'s formulas on whole images, in float64."""
    image, painted = (torch.from_numpy(pixels).double().permute(2, 0, 1)[None] for pixels in (content, style))
    for level in levels:
        maps = [features(state, level, picture)[0].flatten(1) for picture in (image, painted)]
        shape = features(state, level, image).shape
        means = [x.mean(1, keepdim=True) for x in maps]
        roots = []
        for x, mean, exponent in zip(maps, means, (-0.5, 0.5), strict=True):
            variances, vectors = torch.linalg.eigh((x - mean) @ (x - mean).T / x.shape[1])
            power = torch.where(variances > 1e-5 * variances.max(), variances.clamp(min=1e-300) ** exponent, 0.0)
            roots.append((vectors * power) @ vectors.T)
        x = strength * (roots[1] @ roots[0] @ (maps[0] - means[0]) + means[1]) + (1 - strength) * maps[0]
        image = decoded(state, level, x.reshape(shape))[:, :, : image.shape[2], : image.shape[3]].clamp(0, 255)
    return image[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("tile_px", [80, 48, 16])
def test_tiles_give_what_plain_torch_gives_for_whole_images(tmp_path: Path, tile_px: int) -> None:
    write_wct(tmp_path / "wct.safetensors")
    write_image(tmp_path / "content.png", HEIGHT, WIDTH)
    write_image(tmp_path / "style.png", 40, 33, seed=4)
    wct = {"levels": [3, 2, 1], "strength": 0.7}
    apply(config(tmp_path, networks="wct.safetensors", style="style.png", wct=wct, compute={"tile_px": tile_px}))
    state = load_file(tmp_path / "wct.safetensors")
    pictures = pixels_of(tmp_path / "content.png"), pixels_of(tmp_path / "style.png")
    expected = whole(state, *pictures, [3, 2, 1], 0.7)
    assert expected.std() > 1
    assert np.abs(canvas(tmp_path / "out.run") - expected).max() < 1e-10


def test_transport_gives_the_content_the_styles_moments() -> None:
    rng = np.random.default_rng(0)
    grams = []
    for scale in (1.0, 3.0):
        x = rng.normal(scale, scale, (5, 500)) * rng.uniform(0.5, 2, (5, 1))
        grams.append(np.vstack([x, np.ones(500)]) @ np.vstack([x, np.ones(500)]).T)
    step = transport(grams[0], grams[1], 1.0)
    affine = np.block([[step.matrix_CC, step.bias_C[:, None]], [np.zeros((1, 5)), np.ones((1, 1))]])
    assert np.allclose(affine @ grams[0] @ affine.T, grams[1], rtol=1e-9)


def test_what_is_refused(tmp_path: Path) -> None:
    write_wct(tmp_path / "wct.safetensors")
    write_network(tmp_path / "net.safetensors")
    write_image(tmp_path / "content.png", HEIGHT, WIDTH)
    for keys, sentence in [
        ({"networks": "wct.safetensors"}, "style: missing"),
        ({"networks": "wct.safetensors", "style": "content.png"}, r"has no level 5, but 3, 2, 1"),
        ({"networks": "net.safetensors", "style": "content.png"}, "has its style in it"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            apply(config(tmp_path, **keys))
