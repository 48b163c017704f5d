"""A resume with a changed config lists every changed key, with its old and new value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from pipeline.config.apply import ApplyConfig, load_apply_config
from pipeline.config.config import Config, load_config, result_fields
from pipeline.config.messages import fields_of
from pipeline.core.errors import ConfigError
from pipeline.rundir.open import Identity, refuse_changes
from pipeline.rundir.records import FORMAT, parse_manifest
from tests.support.inputs import write_config, write_image

Json = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("content", "style", "new"):
        write_image(tmp_path / f"{name}.png", 40, 40)
    return tmp_path


def manifest_of(config: Config | ApplyConfig) -> Json:
    """The manifest of a run of this config, as read from the disk, without hashes of inputs."""
    manifest = {"result_fields": result_fields(config), "inputs": {}, "config": config.model_dump(mode="json")}
    rest = {"format": FORMAT, "created": "now", "threads": 1, "stages": [{"size": [4, 4], "style_sizes": []}]}
    return dict(json.loads(json.dumps(manifest | rest)))


def changes(manifest: Json, config: Config | ApplyConfig) -> list[str]:
    try:
        refuse_changes(config, parse_manifest(manifest), Identity(result_fields(config), {}))
    except ConfigError as error:
        return [line.strip() for line in str(error).splitlines() if line.startswith("  ")]
    return []


def both_ways(folder: Path, old: Json, new: Json) -> tuple[list[str], list[str]]:
    configs = [load_config(write_config(folder, **values)) for values in (old, new)]
    return changes(manifest_of(configs[0]), configs[1]), changes(manifest_of(configs[1]), configs[0])


STYLES = [{"image": "style.png"}, {"image": "new.png"}]
STAGE = {"up_to": 512, "optimizer": {"beta1": 0.5}}
CHANGES: list[tuple[Json, Json, str, str, str]] = [
    ({}, {"color": "content"}, "color", "style", "content"),
    ({}, {"loss": {"tv_weight": 0.5}}, "loss.tv_weight", "0.0", "0.5"),
    ({}, {"network": {"pooling_scale": 2}}, "network.pooling_scale", "1.0", "2.0"),
    ({}, {"optimizer": {"average": 0.9}}, "optimizer.average", "0.0", "0.9"),
    ({"styles": STYLES}, {"styles": [STYLES[0], {**STYLES[1], "scale": 0.5}]}, "styles.1.scale", "1.0", "0.5"),
    ({}, {"styles": [{"image": "style.png", "max_size": 64}]}, "styles.0.max_size", "null", "64"),
    (
        {"stages": [{"up_to": 512, "styles": STYLES}]},
        {"stages": [{"up_to": 512, "styles": [STYLES[0], {**STYLES[1], "scale": 2}]}]},
        "stages.0.styles.1.scale", "1.0", "2.0",
    ),
    # a stage without a key has the value outside `stages`
    (
        {"stages": [STAGE]},
        {"stages": [{**STAGE, "optimizer": {"beta1": 0.5, "average": 0.9}}]},
        "stages.0.optimizer.average", "0.0", "0.9",
    ),
    (
        {"stages": [STAGE], "loss": {"tv_weight": 0.5}},
        {"stages": [{**STAGE, "loss": {"tv_weight": 0.25}}], "loss": {"tv_weight": 0.5}},
        "stages.0.loss.tv_weight", "0.5", "0.25",
    ),
    (
        {"stages": [STAGE], "loss": {"tv_weight": 0.5}},
        {"stages": [{**STAGE, "loss": {"tv_weight": 0.0}}], "loss": {"tv_weight": 0.5}},
        "stages.0.loss.tv_weight", "0.5", "0.0",
    ),
    (
        {"stages": [STAGE]},
        {"stages": [{**STAGE, "loss": {"style_weight": 3}}]},
        "stages.0.loss.style_weight", "1.0", "3.0",
    ),
    ({"styles": STYLES}, {}, "styles.1.weight", "1.0", "not given"),
    (
        {"network": {"style_layers": {"conv1_1": 0.5}}},
        {"network": {"style_layers": {"conv1_1": 0.5, "conv2_1": 0.25}}},
        "network.style_layers.conv2_1", "not given", "0.25",
    ),
    ({"stages": []}, {"stages": [{"up_to": 512}]}, "stages.0.up_to", "not given", "512"),
    ({"init": "content"}, {"init": "noise"}, "init", "content", "noise"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "key", "was", "becomes"), CHANGES, ids=[f"{case[2]} {case[4]}" for case in CHANGES]
)
def test_a_changed_key_is_listed_with_both_values(folder, old, new, key, was, becomes):
    """`color: was None, is content` would name a value that is in no config and cannot be restored."""
    there, back = both_ways(folder, old, new)
    assert there == [f"{key}: was {was}, is {becomes}"]
    assert [line.partition("; to resume")[0] for line in back] == [f"{key}: was {becomes}, is {was}"]


def test_a_picture_in_place_of_a_word_is_named(folder):
    """`init` is a word or a file: files are compared by content, but the message has to name the path."""
    there, back = both_ways(folder, {}, {"init": "new.png"})
    assert there == [f"init: was content, is {folder / 'new.png'}"]
    assert back == [
        f"init: was {folder / 'new.png'}, is content; to resume, add `init: {folder / 'new.png'}` to the config"
    ]


def test_a_run_from_before_a_key_had_its_default(folder):
    """Its manifest lacks the key: the resume would be refused, or the message would say that it was None."""
    config = load_config(write_config(folder, stages=[{"up_to": 512, "styles": STYLES}]))
    manifest = manifest_of(config)
    del manifest["config"]["color"]
    for styles in (manifest["config"]["styles"], manifest["config"]["stages"][0]["styles"]):
        for style in styles:
            del style["scale"]
    assert changes(manifest, config) == []
    changed = load_config(
        folder / "config.yaml", ["color=luminance", "styles.0.scale=0.5", "stages.0.styles.1.scale=2"]
    )
    assert changes(manifest, changed) == [
        "color: was style, is luminance",
        "stages.0.styles.1.scale: was 1.0, is 2.0",
        "styles.0.scale: was 1.0, is 0.5",
    ]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"color": "content"}, "color: was content, is style; to resume, add `color: content` to the config"),
        (
            {"optimizer": {"clip": False}},
            "optimizer.clip: was false, is true; to resume, add `clip: false` under `optimizer`",
        ),
    ],
)
def test_a_default_that_differs_from_the_run_is_named_with_the_line_to_add(folder, values, line):
    """After an update with other defaults, users who changed nothing would not know what to write."""
    assert changes(manifest_of(load_config(write_config(folder, **values))), load_config(write_config(folder))) == [
        line
    ]


def added_later(model: type[BaseModel], key: str = "") -> Iterator[tuple[str, object, object]]:
    """(key, default, value of the runs from before it) of every key of the config that was added later."""
    for name, field in fields_of(model).items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from added_later(field.annotation, f"{key}{name}.")
        elif isinstance(marks := field.json_schema_extra, dict) and "before" in marks:
            yield f"{key}{name}", field.get_default(), marks["before"]


def test_a_run_from_before_all_new_keys_resumes_with_the_lines_it_is_told(folder):
    """A changed default would be taken for what the old run did, and two images would be mixed."""
    path = folder / "defaults.yaml"  # with the program's own defaults
    path.write_text("{content: content.png, styles: [{image: style.png}], output: out.png, work_dir: run}")
    config = load_config(path)
    manifest = manifest_of(config)
    differing = {key: before for key, default, before in added_later(Config) if default != before}
    for key, _, _ in added_later(Config):
        *sections, name = key.split(".")
        section = manifest["config"]
        for part in sections:
            section = section[part]
        del section[name]
        manifest["result_fields"].pop(key, None)
    lines = changes(manifest, config)
    assert {line.split(":")[0]: "; to resume, add `" in line for line in lines} == dict.fromkeys(differing, True)
    overrides = [f"{key}={json.dumps(before)}" for key, before in differing.items()]
    assert changes(manifest, load_config(path, overrides)) == []


def optional(model: type[BaseModel], key: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key and section of the config that may be left out."""
    for name, field in fields_of(model).items():
        if not field.is_required():
            yield (*key, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from optional(field.annotation, (*key, name))


@pytest.mark.parametrize("key", list(optional(ApplyConfig)), ids=".".join)
def test_a_picture_from_before_a_key_of_apply_resumes(folder, key):
    """A new section of keys would make every unfinished picture start again, with no value that restores it."""
    for name in ("net.safetensors", "photo.png"):
        (folder / name).touch()
    path = folder / "apply.yaml"
    path.write_text("{networks: net.safetensors, content: photo.png, output: out.png, working_space: srgb}")
    config = load_apply_config(path)
    manifest = manifest_of(config) | {"command": "apply"}
    fields = {
        name: value
        for name, value in manifest["result_fields"].items()
        if not f"{name}.".startswith(".".join(key) + ".")
    }
    section = manifest["config"]
    for part in key[:-1]:
        section = section[part]
    section.pop(key[-1])
    assert changes(manifest | {"result_fields": fields}, config) == []


def test_all_entries_of_a_changed_default_are_named_together(folder):
    """A config that gives one layer has no other: a line for one layer alone would be refused again."""
    path = folder / "defaults.yaml"
    path.write_text("{content: content.png, styles: [{image: style.png}], output: out.png, work_dir: run}")
    config = load_config(path)
    manifest = manifest_of(config)
    layers = {"conv1_1": 0.2, "conv2_1": 0.3}
    manifest["config"]["network"]["style_layers"] = layers
    kept = {
        key: value for key, value in manifest["result_fields"].items() if not key.startswith("network.style_layers.")
    }
    manifest["result_fields"] = kept | {f"network.style_layers.{name}": weight for name, weight in layers.items()}
    lines = changes(manifest, config)
    assert len(lines) > 1
    assert [line.partition("; to resume, add ")[2] for line in lines if "to resume" in line] == [
        f"`style_layers: {json.dumps(layers)}` under `network`"
    ]


def test_what_a_stage_repeats_is_no_change(folder):
    """Adding a key with its default value would prevent the resume."""
    loss = {"tv_weight": 0.5}
    there, back = both_ways(
        folder,
        {"loss": loss, "stages": [STAGE]},
        {"loss": loss, "stages": [{**STAGE, "loss": {"tv_weight": 0.5, "style_weight": 1.0}}]},
    )
    assert (there, back) == ([], [])


def test_a_run_that_gave_a_stage_a_default_goes_on(folder):
    """Older runs have this key in their config but not among the result fields."""
    config = load_config(
        write_config(folder, loss={"tv_weight": 0.5}, stages=[{"up_to": 512, "loss": {"tv_weight": 0}}])
    )
    manifest = manifest_of(config)
    del manifest["result_fields"]["stages.0.loss.tv_weight"]
    assert changes(manifest, config) == []


def test_other_packaged_weights_are_named_with_the_remedy(folder):
    """After an upgrade nothing in the config has changed: the message must say what did, and how to finish the run."""
    config = load_config(write_config(folder, network={"name": "vgg19-lite"}))
    manifest = manifest_of(config) | {"inputs": {"network.weights": "a" * 64}}
    with pytest.raises(ConfigError, match=r"weights of vgg19-lite are not those .* Resume with the version that began"):
        refuse_changes(config, parse_manifest(manifest), Identity(result_fields(config), {"network.weights": "b" * 64}))


@pytest.mark.parametrize(
    "key", ["stages.x", "a." * 2000, "styles.٣.weight", f"styles.{'9' * 4900}.weight", "", "stages.0.0.0"]
)
def test_keys_of_a_foreign_manifest(folder, key):
    """An unknown key in a manifest from a stranger must be refused, without a traceback."""
    config = load_config(write_config(folder))
    manifest = manifest_of(config)
    manifest["result_fields"][key] = "x"
    (line,) = changes(manifest, config)
    assert line.endswith(": was x, is not given")
