"""Fixtures that several test files share, and the choice between the short part of the suite and all of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Two pytest workers with a pool of threads each would wait for each other's threads on the same cores. Set before numpy
# and torch are imported, and inherited by the processes that tests start (all but those of `user_environment`).
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.inputs import write_config, write_image

settings.register_profile("pipeline", deadline=None, print_blob=True)
settings.load_profile("pipeline")

SHORT = "not e2e and not fault"
MARKER_OF_FOLDER = {"e2e": "e2e", "faults": "fault"}


def pytest_configure(config: pytest.Config) -> None:
    """Without a path and without -m, the command runs the short part of the suite."""
    if not config.option.markexpr and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.option.markexpr = SHORT


def pytest_report_header(config: pytest.Config) -> str | None:
    if config.option.markexpr != SHORT:
        return None
    return 'short part; the whole programs and the injected faults run with: python -m pytest -m "e2e or fault"'


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test by its folder, but for those that are marked quick."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in MARKER_OF_FOLDER and item.get_closest_marker("quick") is None:
            item.add_marker(MARKER_OF_FOLDER[folder])


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
    """Writes the images and the config of a small run to tmp_path; further keywords become keys of the config."""
    from pipeline import load_config

    def make(content: tuple[int, int] = (48, 64), style: tuple[int, int] = (40, 40), **values: Any) -> Any:
        write_image(tmp_path / "content.png", *content, seed=1)
        write_image(tmp_path / "style.png", *style, seed=2)
        values.setdefault("network", {"weights": str(narrow_weights)})
        return load_config(write_config(tmp_path, **values))

    return make


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a command line in this process: `call("plan", "-c", path)`."""
    from tests.support.e2e import make_call

    return make_call(capfd, monkeypatch)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts commands in processes of their own."""
    from tests.support.e2e import Nursery

    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of 800 KiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs to mount a small tmpfs: run as root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)
