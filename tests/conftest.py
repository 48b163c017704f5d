"""Parts that several test files need. What is costly is made once, what is random is seeded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import settings

settings.register_profile("pipeline", deadline=None, print_blob=True)
settings.load_profile("pipeline")


def write_image(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A PNG of seeded noise over a colour gradient, so that no row or column is like another; gives its pixels."""
    import pyvips

    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 120, height)[:, None, None] + np.linspace(0, 60, width)[None, :, None] * [1, 0.5, 0]
    pixels = (ramp + rng.uniform(0, 75, (height, width, 3))).astype(np.uint8)
    pyvips.Image.new_from_array(pixels, interpretation="srgb").write_to_file(str(path))
    return pixels


def write_config(folder: Path, **values: Any) -> Path:
    """A config file of `values`, which need no content, styles or output: those default to files in `folder`."""
    config = {"content": "content.png", "styles": [{"image": "style.png"}], "output": "out.png", "work_dir": "run"}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config | values))
    return path


@pytest.fixture(scope="session")
def narrow_weights(tmp_path_factory) -> Path:
    """A .safetensors file of a network of widths 4, 8, 8, 8, 8 with random weights and biases."""
    from reference import narrow_state
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "narrow.safetensors"
    save_file(narrow_state(), path)
    return path


@pytest.fixture
def make_config(tmp_path: Path, narrow_weights: Path) -> Callable[..., Any]:
    """Makes the images and the config of a small run in tmp_path; further keys go into the config as they are."""
    from pipeline import load_config

    def make(content: tuple[int, int] = (48, 64), style: tuple[int, int] = (40, 40), **values: Any) -> Any:
        write_image(tmp_path / "content.png", *content, seed=1)
        write_image(tmp_path / "style.png", *style, seed=2)
        values.setdefault("network", {"weights": str(narrow_weights)})
        return load_config(write_config(tmp_path, **values))

    return make
