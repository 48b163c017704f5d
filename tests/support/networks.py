"""Small image transformation networks with random weights, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.feedforward.network import TransformNetwork
from pipeline.feedforward.network_file import save_network
from pipeline.feedforward.spec import TransformSpec


def random_network(seed: int = 0, **spec: Any) -> TransformNetwork:
    """A network in evaluation mode whose norms are no identities."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = TransformNetwork(TransformSpec(**{"width": 0.125, "blocks": 1, **spec}))
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if ".norm." in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return network.eval()


def write_wct(path: Path, seed: int = 0, levels: int = 3) -> None:
    """A file of encoder-decoder pairs with random weights and few channels."""
    generator = torch.Generator().manual_seed(seed)
    widths = {1: 4, 2: 6, 3: 8}
    state: dict[str, torch.Tensor] = {}

    def conv(name: str, before: int, after: int, side: int = 3) -> None:
        weight = torch.randn(after, before, side, side, generator=generator) * (2 / (side * side * before)) ** 0.5
        state[f"{name}.weight"] = weight
        state[f"{name}.bias"] = torch.randn(after, generator=generator) * 0.1

    for level in range(1, levels + 1):
        names = [
            f"conv{block}_{number}" for block in range(1, level) for number in range(1, (2, 2, 4, 4)[block - 1] + 1)
        ]
        names.append(f"conv{level}_1")
        channels = [3, *(widths[int(name[4])] for name in names)]
        conv(f"encoder{level}.input", 3, 3, 1)
        for name, before, after in zip(names, channels, channels[1:], strict=False):
            conv(f"encoder{level}.{name}", before, after)
            conv(f"decoder{level}.{name}", after, before)
    save_file(state, path)


def write_network(path: Path, seed: int = 0, **spec: Any) -> TransformNetwork:
    """The network whose file is written to `path`."""
    network = random_network(seed, **spec)
    save_network(path, network, {})
    return network
