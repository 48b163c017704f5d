"""Whitening and colouring: the command in tiles against plain torch on whole images."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.commands.apply import apply
from pipeline.commands.run import run
from pipeline.commands.start import outlook
from pipeline.config import Config
from pipeline.core.errors import ConfigError, InputError
from pipeline.executors import Executor
from pipeline.feedforward.wct import transport
from pipeline.plan import Device
from pipeline.render.context import executor_for
from pipeline.rundir import Journal, iterations_of, journal_path, plan_on
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


def whole(
    state: dict[str, Tensor],
    content: np.ndarray,
    styles: list[tuple[float, np.ndarray]],
    levels: list[int],
    strength: float,
) -> Any:
    """Li et al.'s formulas on whole images, in float64; of several styles, each with its share, the mean moments."""
    pixels = [content, *(style for _, style in styles)]
    image, *painted = (torch.from_numpy(each).double().permute(2, 0, 1)[None] for each in pixels)
    for level in levels:
        maps = [features(state, level, picture)[0].flatten(1) for picture in (image, *painted)]
        shape = features(state, level, image).shape
        shares = [share for share, _ in styles]
        means = [maps[0].mean(1, keepdim=True)]
        means.append(sum(share * x.mean(1, keepdim=True) for share, x in zip(shares, maps[1:], strict=True)))
        squares = [maps[0] @ maps[0].T / maps[0].shape[1]]
        squares.append(sum(share * (x @ x.T) / x.shape[1] for share, x in zip(shares, maps[1:], strict=True)))
        roots = []
        for square, mean, exponent in zip(squares, means, (-0.5, 0.5), strict=True):
            variances, vectors = torch.linalg.eigh(square - mean @ mean.T)
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
    content, style = pixels_of(tmp_path / "content.png"), pixels_of(tmp_path / "style.png")
    expected = whole(state, content, [(1.0, style)], [3, 2, 1], 0.7)
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


def run_config(folder: Path, **keys: Any) -> Config:
    """A run whose only iteration moves the canvas by nothing that can be seen."""
    values = {
        "content": "content.png",
        "styles": [{"image": "style.png", "weight": 3.0}, {"image": "other.png"}],
        "output": "out.png",
        "init": "wct:wct.safetensors",
        "initial_size": WIDTH,
        "network": {"name": "random"},
        "optimizer": {"max_iterations": 1, "target_pixel_change": 1e-9},
        "compute": {"device": "cpu", "dtype": "float64", "tile_px": 32},
        "store": {"chunk_px": 16},
    }
    return Config.model_validate({**values, **keys}, context={"base": folder})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_wct(tmp_path / "wct.safetensors")
    write_image(tmp_path / "content.png", HEIGHT, WIDTH)
    write_image(tmp_path / "style.png", 40, 33, seed=4)
    write_image(tmp_path / "other.png", 38, 50, seed=5)
    return tmp_path


@pytest.mark.parametrize("compute", [{"tile_px": 80}, {"tile_px": 32}, {"tile_px": 32, "workers": 2}], ids=str)
def test_a_run_starts_with_the_moments_of_its_styles(folder: Path, compute: dict[str, Any]) -> None:
    """The start would depend on the tiles or processes, or take one style of several."""
    run(run_config(folder, compute={"device": "cpu", "dtype": "float64", **compute}))
    styles = [(0.75, pixels_of(folder / "style.png")), (0.25, pixels_of(folder / "other.png"))]
    state = load_file(folder / "wct.safetensors")
    expected = whole(state, pixels_of(folder / "content.png"), styles, [3, 2, 1], 0.6)
    assert expected.std() > 1
    assert np.abs(canvas(folder / "out.run") - expected).max() < 1e-8


def test_a_start_keeps_the_contents_colours_where_the_run_does(folder: Path) -> None:
    """With color: content the run would have to undo the style's colours, which it has no term for."""
    state = load_file(folder / "wct.safetensors")
    for level in (1, 2, 3):  # about middle grey, so that few pixels are clipped
        state[f"decoder{level}.conv1_1.weight"] *= 0.05
        state[f"decoder{level}.conv1_1.bias"] += 0.5
    save_file(state, folder / "wct.safetensors")
    run(run_config(folder, color="content"))
    changed = canvas(folder / "out.run") - pixels_of(folder / "content.png")
    inside = ((canvas(folder / "out.run") > 1) & (canvas(folder / "out.run") < 254)).all(-1)
    assert inside.any() and changed.std() > 1
    assert np.abs(changed - changed[..., :1])[inside].max() < 1e-6


def test_a_cluster_is_asked_for_the_file_of_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with another file under this name would start its tiles in another look."""
    asked: list[tuple[Path, str]] = []

    def recording(config: Config, device: Device, files: list[tuple[Path, str]], *rest: Any) -> Executor:
        asked.extend(files)
        return executor_for(config, device, files, *rest)

    monkeypatch.setattr("pipeline.commands.run.executor_for", recording)
    run(run_config(folder))
    path = folder / "wct.safetensors"
    assert asked == [(path, hashlib.sha256(path.read_bytes()).hexdigest())]


def test_a_run_with_another_start_is_refused(folder: Path) -> None:
    """A resume would mix two pictures."""
    run(run_config(folder))
    for keys in ({"init": "content"}, {"init": {"apply": "wct.safetensors"}}):
        with pytest.raises(ConfigError, match="init"):
            run(run_config(folder, **keys, optimizer={"max_iterations": 1}))
    write_wct(folder / "wct.safetensors", seed=1)
    with pytest.raises(ConfigError, match=r"init\.wct: the content of the file has changed"):
        run(run_config(folder, output="out.tif", work_dir="out.run"))


def test_a_start_that_cannot_be_made_is_refused(folder: Path) -> None:
    """The run would begin somewhere else than the config says."""
    write_network(folder / "net.safetensors")
    masked = [{"image": "style.png", "mask": "content.png"}]
    for keys, sentence in [
        ({"styles": masked}, "init: gives the whole picture the look of all styles, and they have masks"),
        ({"styles": [], "loss": {"style_weight": 0.0}}, "and there are none"),
        ({"content": None, "size": 64, "loss": {"content_weight": 0.0}}, "init: there is no content"),
    ]:
        with pytest.raises((ConfigError, InputError, ValueError), match=sentence):
            run(run_config(folder, **keys))


@pytest.mark.parametrize(
    ("init", "sentence"),
    [
        ("wct:net.safetensors", r"init\.wct: .*net\.safetensors has no encoder-decoder pairs"),
        ("apply:wct.safetensors", r"init\.apply: .*wct\.safetensors"),
        ("apply:content.png", r"init\.apply: .*content\.png"),
        ("apply:enlarging.safetensors", r"init\.apply: .*enlarging\.safetensors enlarges its input"),
    ],
)
def test_a_start_with_a_file_of_another_kind_is_refused_before_the_run(folder: Path, init: str, sentence: str) -> None:
    """Accepted by `plan`, a run in the evening would end in its first stage, and leave a folder behind."""
    write_network(folder / "net.safetensors")
    write_network(folder / "enlarging.safetensors", task="super-resolution", factor=4)
    config = run_config(folder, init=init)
    with pytest.raises((ConfigError, InputError), match=sentence):
        run(config)
    assert not config.work_dir.exists()
    assert re.search(f"is refused: {sentence}", outlook(config, plan_on(config, Device("cpu", "CPU", 0))))


SHARED = Path(__file__).parents[4] / "shared" / "weights" / "wct-16x.safetensors"


@pytest.mark.skipif(not SHARED.exists(), reason="needs the pairs of Collaborative Distillation")
def test_the_published_pairs_begin_nearer_to_the_style(tmp_path: Path) -> None:
    """With another meaning of a layer the start would be noise, and cost iterations instead of saving them."""
    samples = Path(__file__).parents[3] / "configs" / "samples"
    begun = {}
    for name, init in (("content", "content"), ("wct", f"wct:{SHARED}")):
        keys = {"content": str(samples / "landscape.jpg"), "styles": [{"image": str(samples / "strokes.jpg")}]}
        keys |= {"init": init, "initial_size": 160, "size": 160, "network": {"name": "vgg19-lite"}}
        keys |= {"compute": {"device": "cpu"}, "output": f"{name}.png"}
        run(run_config(tmp_path, **keys))
        begun[name] = iterations_of(Journal(journal_path(tmp_path / f"{name}.run")).read())[0].objective
    assert begun["wct"] < 0.6 * begun["content"]


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
