"""Parts that several test files need. What is costly is made once, what is random is seeded."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.inputs import write_config, write_image

settings.register_profile("pipeline", deadline=None, print_blob=True)
settings.load_profile("pipeline")


@pytest.fixture(scope="session")
def narrow_weights(tmp_path_factory) -> Path:
    """A .safetensors file of a network of widths 4, 8, 8, 8, 8 with random weights and biases."""
    from safetensors.torch import save_file

    from tests.support.reference import narrow_state

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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs to mount a small tmpfs: run as root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)
