"""Generated inputs of small runs: images of seeded noise, config files."""

from __future__ import annotations

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


def write_config(folder: Path, **values: Any) -> Path:
    """Write a config of `values`; content, styles, output and work_dir default to names in `folder`."""
    config = {"content": "content.png", "styles": [{"image": "style.png"}], "output": "out.png", "work_dir": "run"}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config | values))
    return path
