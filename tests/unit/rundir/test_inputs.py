"""Inputs are never overwritten: not by an export, a preview or a profile, and not by a folder around them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.core.errors import ConfigError
from pipeline.rundir import manifest_inputs, named_inputs, refuse_inputs
from pipeline.rundir.records import KeptConfig, Manifest


def config(folder: Path) -> Config:
    for name in ("c.png", "s.png", "s.mask.png", "keep.png", "i.png", "w.pth"):
        (folder / name).touch()
    values = {
        "content": "c.png",
        "styles": [{"image": "s.png", "mask": "s.mask.png"}],
        "stages": [{"up_to": 64, "styles": [{"image": "later.png"}]}],
        "loss": {"content_mask": "keep.png"},
        "init": "i.png",
        "network": {"weights": "w.pth"},
        "output": "o.png",
        "work_dir": "o.run",
    }
    return Config.model_validate(values, context={"base": folder})


def test_every_input_is_an_input(tmp_path: Path) -> None:
    """A mask takes an artist a day to draw."""
    names = {"c.png", "s.png", "s.mask.png", "later.png", "keep.png", "i.png", "w.pth"}
    inputs = list(named_inputs(config(tmp_path)))
    assert {path.name for _, path in inputs} == names
    for name in sorted(names):
        with pytest.raises(ConfigError, match="with or without --force"):
            refuse_inputs(tmp_path / name, inputs)
    refuse_inputs(tmp_path / "o.png", inputs)


def test_the_manifest_knows_them_without_the_config(tmp_path: Path) -> None:
    """`export --run` has no config."""
    known = config(tmp_path)
    manifest = Manifest.model_construct(
        config=KeptConfig.model_validate(known.model_dump(mode="json")),
        inputs=dict.fromkeys((key for key, _ in named_inputs(known)), "0" * 64),
    )
    assert dict(manifest_inputs(manifest)) == dict(named_inputs(known))


def test_links_and_folders_are_the_same_file(tmp_path: Path) -> None:
    """A folder output is replaced as a whole, with the photo in it."""
    inputs = list(named_inputs(config(tmp_path)))
    (tmp_path / "link.png").symlink_to(tmp_path / "c.png")
    (tmp_path / "hard.png").hardlink_to(tmp_path / "c.png")
    for name in ("link.png", "hard.png"):
        with pytest.raises(ConfigError, match="content"):
            refuse_inputs(tmp_path / name, inputs)
    with pytest.raises(ConfigError, match="holds it"):
        refuse_inputs(tmp_path, inputs)
    inner = tmp_path / "out.dz" / "out_files"
    inner.mkdir(parents=True)
    (inner / "c.png").touch()
    with pytest.raises(ValueError, match="a folder that holds content"):
        Config.model_validate(
            {"content": str(inner / "c.png"), "styles": [{"image": "s.png"}], "output": "out.dz"},
            context={"base": tmp_path},
        )
