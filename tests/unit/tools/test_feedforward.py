"""The measurements of tools/feedforward, and its training pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pipeline.feedforward.photographs import lowered
from tools.feedforward import enlargement, packaged_network, training_pictures


def test_similarity_is_that_of_the_formula():
    """Of equal pictures 1; of two flat ones the luminance term alone."""
    rng = np.random.default_rng(0)
    picture = rng.uniform(0, 255, (32, 40))
    assert enlargement.ssim(picture, picture) == pytest.approx(1)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1)
    assert enlargement.ssim(np.full((20, 20), 100.0), np.full((20, 20), 120.0)) == pytest.approx(expected)
    assert enlargement.ssim(picture, rng.permutation(picture)) < 0.2


def test_the_input_of_super_resolution_is_where_its_target_is():
    """A ramp stays a ramp: blur and reduction shift nothing, at 4 and 8."""
    for factor in (4, 8):
        ramp = torch.arange(96.0).expand(1, 3, 96, 96)
        small = lowered(ramp, factor)[0, 0, 10 // factor + 2]
        centres = torch.arange(96 // factor) * factor + (factor - 1) / 2
        inner = slice(2, -2)
        assert (small - centres)[inner].abs().max() <= 0.5  # rounded to levels


def test_curve_and_pictures(tmp_path, monkeypatch):
    """The figure holds every mean; a picture depends on its number alone."""
    rows = [{"objective": 1 / step, "content": 2 / step, "style": 3 / step} for step in range(1, 251)]
    losses = tmp_path / "losses.jsonl"
    losses.write_text("\n".join(map(json.dumps, rows)))
    assert packaged_network.curve(losses).count("<polyline") == 3
    monkeypatch.setattr(training_pictures, "SIZE_PX", 96)
    training_pictures.draw_pictures(tmp_path / "a", 3, 1)
    (tmp_path / "a" / "0001.png").rename(tmp_path / "second.png")
    training_pictures.draw_pictures(tmp_path / "a", 2, 1)
    assert (tmp_path / "a" / "0001.png").read_bytes() == (tmp_path / "second.png").read_bytes()
