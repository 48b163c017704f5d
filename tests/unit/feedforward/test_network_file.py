"""Files of networks: written and read again, those of pytorch/examples, and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.core.errors import InputError
from pipeline.feedforward.network_file import SPEC_KEY, load_network, read_network_header, save_network
from tests.support.networks import random_network, write_network


def test_a_network_is_what_was_saved_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    network = random_network(styles=("waves", "wood"))
    for name in ("a.safetensors", "b.safetensors"):
        save_network(tmp_path / name, network, {"preview": "…", "began": "2026"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    file = load_network(tmp_path / "a.safetensors")
    assert (file.spec, file.notes) == (network.spec, {"preview": "…", "began": "2026"})
    assert read_network_header(tmp_path / "a.safetensors").spec == network.spec
    image = torch.rand(1, 3, 20, 24) * 255
    with torch.no_grad():
        assert torch.equal(file.network()(image), network(image))


class Theirs(nn.Module):
    """The network of pytorch/examples' fast_neural_style, with its names."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        c1, c2, c4 = channels, 2 * channels, 4 * channels
        self.convs = nn.ModuleDict()
        self.order: list[tuple[str, str, int, int]] = []  # convolution, norm, stride, enlargement
        for conv, norm, shape, stride, up in [
            ("conv1", "in1", (3, c1, 9), 1, 1),
            ("conv2", "in2", (c1, c2, 3), 2, 1),
            ("conv3", "in3", (c2, c4, 3), 2, 1),
            *((f"res{n}.conv{m}", f"res{n}.in{m}", (c4, c4, 3), 1, 1) for n in range(1, blocks + 1) for m in (1, 2)),
            ("deconv1", "in4", (c4, c2, 3), 1, 2),
            ("deconv2", "in5", (c2, c1, 3), 1, 2),
            ("deconv3", "", (c1, 3, 9), 1, 1),
        ]:
            self.convs[f"{conv}.conv2d".replace(".", "/")] = nn.Conv2d(*shape, stride)
            if norm:
                self.convs[norm.replace(".", "/")] = nn.InstanceNorm2d(shape[1], affine=True)
            self.order.append((conv, norm, stride, up))

    def state(self) -> dict[str, Tensor]:
        return {key.removeprefix("convs.").replace("/", "."): value for key, value in self.state_dict().items()}

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm, _, up in self.order:
            skip = x if conv.startswith("res") and conv.endswith("1") else None
            if skip is not None:
                residual = skip
            if up == 2:
                x = nn.functional.interpolate(x, mode="nearest", scale_factor=2)
            layer = self.convs[f"{conv}.conv2d".replace(".", "/")]
            pad = layer.kernel_size[0] // 2
            x = layer(nn.functional.pad(x, (pad, pad, pad, pad), mode="reflect"))
            if norm:
                x = self.convs[norm.replace(".", "/")](x)
            if conv.startswith("res") and conv.endswith("2"):
                x = x + residual
            elif norm:
                x = torch.relu(x)
        return x


@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts_of_pytorch_examples_give_their_pictures(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    theirs = Theirs(8, 2)
    state = {prefix + key: value for key, value in theirs.state().items()}
    state[f"{prefix}in1.running_mean"] = torch.zeros(8)  # files of old versions have them
    torch.save(state, tmp_path / "mosaic.pth")
    file = load_network(tmp_path / "mosaic.pth")
    assert (file.spec.width, file.spec.blocks, file.spec.styles) == (0.25, 2, ("mosaic",))
    image = torch.rand(1, 3, 24, 32) * 255
    with torch.no_grad():
        # of widths that are no multiple of 4 theirs is larger: it is cut to the input's size here
        assert torch.allclose(file.network()(image), theirs(image), atol=1e-3)


def test_wrong_files_get_a_sentence(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    write_network(good)
    tensors = load_file(good)
    spec = json.dumps({"task": "style", "width": 0.125, "blocks": 1})

    def saved(name: str, state: dict[str, Tensor], notes: dict[str, str]) -> Path:
        save_file(state, tmp_path / name, notes)
        return tmp_path / name

    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-9])
    (tmp_path / "text.pth").write_text("no network")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    first = next(iter(tensors))
    cases = {
        tmp_path / "gone.safetensors": "not found",
        tmp_path / "cut.safetensors": "not a readable .safetensors file",
        tmp_path / "text.pth": "cannot be read as weights",
        tmp_path / "other.pth": "weight is no part of an image transformation network",
        saved("vgg.safetensors", {"conv1_1.weight": torch.zeros(2)}, {}): "describe no image transformation network",
        saved("wide.safetensors", tensors, {SPEC_KEY: spec.replace("0.125", "0.25")}): "where its description says",
        saved("new.safetensors", tensors, {SPEC_KEY: '{"depth": 3}'}): "is not of this version of pipeline",
        saved("nan.safetensors", {**tensors, first: tensors[first] * torch.nan}, {SPEC_KEY: spec}): "is not finite",
    }
    for path, sentence in cases.items():
        with pytest.raises(InputError, match=sentence):
            load_network(path)
