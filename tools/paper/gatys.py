"""Additions for the experiments of Gatys et al.: their normalised network, and their α and β as config keys.

Their network is "normalised": its weights are scaled so that the mean activation of every filter over images and
positions is 1. ReLU and pooling are positively homogeneous, so features change by a factor only. Gatys et al. take the
means over ImageNet, this tool over its two input images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.core.vgg_layers import CONV_NAMES, LAYER_BY_NAME
from pipeline.network.weights import NetworkSpec
from pipeline.network.weights_file import conv_key, load_state
from tools.paper.measures import features
from tools.picture.measures import read

VGG_CHANNELS = 512  # of conv4_2


def write_normalised(network: NetworkSpec, images: Sequence[Path], long_px: int, target: Path) -> Path:
    """Write the weights of `network` with every filter scaled to a mean activation of 1 over these images."""
    assert network.source.path is not None
    means: dict[str, torch.Tensor] = {}
    for image in images:
        for name, features_CHW in features(network, read(image, long_px)).items():
            means[name] = means.get(name, 0) + features_CHW.mean((1, 2)).double() / len(images)
    state = load_state(network.source.path)
    scaled = {key: value for key, value in state.items() if key.startswith("input.")}
    before = torch.ones(3, dtype=torch.float64)
    for name in CONV_NAMES:
        key, mean = conv_key(name, set(state)), means[name]
        mean[mean == 0] = 1  # a filter that never fires
        weight, bias = state[f"{key}.weight"].double(), state[f"{key}.bias"].double()
        scaled[f"{name}.weight"] = (weight * before[None, :, None, None] / mean[:, None, None, None]).float()
        scaled[f"{name}.bias"] = (bias / mean).float()
        before = mean
    save_file(scaled, target)
    return target


def loss_keys(ratio: float, height: int, width: int, layer: str = "conv4_2") -> dict[str, Any]:
    """The config section `loss` that corresponds to α/β = `ratio` of the paper on a canvas of this size in px.

    Their content loss is a sum over channels and positions, ours a mean, hence the factor C·M (C = 512 as in VGG-19,
    also for narrower networks). Their style loss equals ours if content and style have the same size.
    """
    stride = LAYER_BY_NAME[layer].stride
    positions = (height // stride) * (width // stride)
    return {"kind": "gatys", "content_weight": ratio * VGG_CHANNELS * positions, "style_weight": 1.0}
