"""Generated inputs of small runs: images of seeded noise, config files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml


def write_image(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Write a PNG of seeded noise over a colour gradient, so that no rows or columns are equal; returns (H, W, 3)."""
    import pyvips

    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 120, height)[:, None, None] + np.linspace(0, 60, width)[None, :, None] * [1, 0.5, 0]
    pixels = (ramp + rng.uniform(0, 75, (height, width, 3))).astype(np.uint8)
    pyvips.Image.new_from_array(pixels, interpretation="srgb").write_to_file(str(path))
    return pixels


# The settings of the small runs whose subject is not a setting: the paper's stages and losses, with few iterations in
# mind. The program's defaults are chosen for pictures, and change when better ones are found.
PLAIN: dict[str, Any] = {
    "initial_size": 512,
    "stage_ratio": 2.0,
    "style_stages": True,
    "dequantize": False,
    "init_noise": 0.0,
    "network": {
        "padding": "replicate",
        "pooling": "max",
        "style_layers": {f"conv{block}_1": 0.2 for block in range(1, 6)},
    },
    "loss": {"kind": "normalized", "content_weight": 0.05, "tv_weight": 0.0, "tv_kind": "squared"},
    "optimizer": {"max_iterations": 60, "coarse_iterations": 1.0, "target_pixel_change": 12.8, "color_space": "rgb"},
}


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over those of PLAIN, section by section."""
    sections = {
        name: {**base, **values[name]} for name, base in PLAIN.items() if isinstance(base, dict) and name in values
    }
    return {**PLAIN, **values, **sections}


def write_config(folder: Path, **values: Any) -> Path:
    """Write a config of `values` over PLAIN; content, styles, output and work_dir default to names in `folder`."""
    config = {"content": "content.png", "styles": [{"image": "style.png"}], "output": "out.png", "work_dir": "run"}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config | plain(values)))
    return path
