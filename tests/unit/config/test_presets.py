"""Presets: a config's own keys come before those of its preset, and every preset is a valid config."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config.config import load_config
from pipeline.config.presets import with_preset
from pipeline.config.template import template
from pipeline.core.errors import ConfigError
from pipeline.core.presets import PRESETS

FILES = Path(__file__).parents[3] / "configs" / "presets"


def write_config(folder: Path, **keys) -> Path:
    """A config file of these keys alone, besides content, style and output."""
    path = folder / "config.yaml"
    path.write_text(
        yaml.safe_dump({"content": "c.png", "styles": [{"image": "s.png"}], "output": "o.png", **keys}), "utf-8"
    )
    return path


def values(config) -> dict:
    return config.model_dump(mode="json", exclude={"preset"})


def test_every_name_has_a_file_and_every_file_a_name():
    """A name without its file would be refused with a traceback."""
    assert {path.stem for path in FILES.glob("*.yaml")} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_and_gives_its_values(tmp_path, name):
    """`preset: portrait` alone, with the user's files, must run with the values of the file that documents it."""
    config = load_config(write_config(tmp_path, preset=name, **({"content": None} if name == "texture" else {})))
    given = yaml.safe_load((FILES / f"{name}.yaml").read_text())
    for key, value in given.items():
        found = config.model_dump(mode="json")[key]
        if key == "stages":
            assert [stage["up_to"] for stage in found] == [stage["up_to"] for stage in value]
        else:
            assert {inner: found[inner] for inner in value} == value if isinstance(value, dict) else found == value


def test_keys_of_the_config_and_of_the_command_line_come_first(tmp_path):
    """A preset is where an artist starts from: what they set themselves stays."""
    own = {"conv1_1": 1.0}
    path = write_config(tmp_path, preset="paper", loss={"content_weight": 0.5}, network={"style_layers": own})
    config = load_config(path, ["optimizer.beta1=0.8"])
    assert (config.loss.content_weight, config.loss.style_weight) == (0.5, 1.0)
    assert (config.optimizer.beta1, config.optimizer.clip) == (0.8, False)
    assert config.network.style_layers == own  # layers are one value: the preset's are not added to them
    assert load_config(path, ["preset=portrait"]).optimizer.clip


def test_an_unknown_preset_is_refused_with_the_names(tmp_path):
    with pytest.raises(ConfigError, match=r"preset: expected one of painterly, .*did you mean 'portrait'"):
        load_config(write_config(tmp_path, preset="portrat"))


@pytest.mark.parametrize("name", PRESETS)
def test_init_writes_the_values_of_a_preset(tmp_path, name):
    """The file that `pipeline init --preset` writes must render what `preset:` renders."""
    written = yaml.safe_load(template(name))
    assert written["preset"] == name
    (tmp_path / "written.yaml").write_text(yaml.safe_dump(written))
    needed = {key: written[key] for key in ("content", "styles", "output")}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump({"preset": name, **needed}))
    assert values(load_config(tmp_path / "written.yaml")) == values(load_config(tmp_path / "short.yaml"))


def test_data_that_is_not_a_preset_is_left_to_validation():
    assert with_preset({"preset": ["a"]}) == {"preset": ["a"]}
    assert with_preset({"preset": "paper", "loss": 3})["loss"] == 3
