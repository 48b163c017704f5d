"""The packaged style network: its size, its provenance, and that it paints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.fields import PACKAGED_NETWORKS
from pipeline.feedforward.network_file import load_network
from pipeline.feedforward.training import weights_of
from tools.feedforward.compare import losses_of
from tools.feedforward.enlargement import array, tensor
from tools.feedforward.packaged_network import CONFIG
from tools.picture.measures import border, lattice, luminance, read

SAMPLES = Path(__file__).parents[3] / "configs" / "samples"


@pytest.fixture(scope="module")
def file():
    return load_network(PACKAGED_NETWORKS["strokes"])


def test_the_packaged_network_is_that_of_the_tool(file):
    """Its style may be published, it was trained with the config in tools, and it is small."""
    from pipeline import load_train_config

    assert PACKAGED_NETWORKS["strokes"].stat().st_size < 2_000_000
    digest = hashlib.sha256((SAMPLES / "strokes.jpg").read_bytes()).hexdigest()
    assert json.loads(file.notes["styles"]) == {"strokes": digest}
    config, trained = load_train_config(CONFIG, [f"photographs={SAMPLES}"]), json.loads(file.notes["config"])
    weights = weights_of(config)
    assert trained["network.width"] == config.network.width == file.spec.width
    assert trained["loss.kind"] == weights.kind
    for name in ("content_weight", "style_weight", "tv_weight"):
        assert trained[f"loss.{name}"] == getattr(config.loss, name)


def test_the_packaged_network_paints(file):
    """On the sample: the strokes of the style, the content still there, no lattice, no border."""
    from pipeline import load_train_config

    config = load_train_config(CONFIG, [f"photographs={SAMPLES}"])
    content = read(SAMPLES / "landscape.jpg", 256)
    with torch.no_grad():
        picture = array(file.network()(tensor(content)))
    before, after = (losses_of(config, image, content) for image in (content, picture))
    assert after.style < 0.3 * before.style
    assert after.objective < 0.5 * before.objective
    likeness = np.corrcoef(luminance(content).ravel(), luminance(picture).ravel())[0, 1]
    assert likeness > 0.4
    assert max(lattice(picture, q) for q in (2, 4, 8)) < 1.15
    rings = border(picture)
    assert 0.6 < rings["0-2 px grain"] < 1.5 and 0.6 < rings["0-2 px chroma"] < 1.5
