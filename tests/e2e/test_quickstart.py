"""The quickstart of the README on a small canvas: shipped config, images and network."""

import json
from pathlib import Path

import pytest

import pipeline

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    overrides = [
        f"output={folder / 'picture.png'}",
        "size=256",
        "initial_size=256",
        "optimizer.max_iterations=20",
        "store.chunk_px=128",
        "store.commit_interval=0",  # a record of each iteration
    ]
    config = pipeline.load_config(QUICKSTART, overrides)
    assert pipeline.run(config).is_file()
    lines = (config.work_dir / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["record"] for line in lines]


def test_the_quickstart_takes_on_its_style(journal):
    """With missing weights, or settings that do not fit them, a newcomer's first result would be the photograph."""
    losses = [record["style_loss"] for record in journal if record["type"] == "iteration" and record["stage"] == 0]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 3


def test_the_quickstart_needs_no_file_that_is_not_in_the_repository():
    """Without a connection or images of their own, newcomers could not render anything."""
    config = pipeline.load_config(QUICKSTART)
    root = QUICKSTART.parents[1]
    assert config.network.name == "vgg19-lite" and config.network.weights is None
    for path in (config.content, *(style.image for style in config.styles)):
        assert path.is_file() and path.is_relative_to(root)
