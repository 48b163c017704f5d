"""Small image transformation networks with random weights, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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


def write_network(path: Path, seed: int = 0, **spec: Any) -> TransformNetwork:
    """The network whose file is written to `path`."""
    network = random_network(seed, **spec)
    save_network(path, network, {})
    return network
