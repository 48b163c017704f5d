"""Texts of configs: of a command line, `pipeline run content.jpg style.jpg other.jpg:0.5 -o out.png`, and of a preview.

Paths in them are relative to their folder, so that a project can be moved as a whole.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.config import Config, config_of, paths_of
from pipeline.config.overrides import override
from pipeline.config.template import template
from pipeline.config.yaml_reader import CommandLineText, Document, Key, Place, plain_value, read
from pipeline.core.text import shown

_WEIGHTED = re.compile(r"(.+):([-+]?[0-9.,][0-9.,eE+-]*)")
_MAX_UP = 2  # folders above the config's to which a relative path leads; from farther away it is written in full


@dataclass(frozen=True)
class OneLine:
    """The images and options of a command line, as typed. A style may end in `:weight`."""

    content: str
    styles: tuple[str, ...]
    output: str
    size: str | None = None
    dpi: str | None = None
    preset: str | None = None
    overrides: tuple[str, ...] = ()


def config_and_text(line: OneLine, *, folder: Path | None = None, full: bool = False) -> tuple[Config, str]:
    """The config of a command line, and the text of a config file that says the same in `folder`.

    `folder`: by default that of the output. `full`: with every key.

    Raises ConfigError with every problem, each with the argument or option that causes it.
    """
    document = document_of(line)
    given = copy.deepcopy(document.data)
    config = config_of(document, Path.cwd(), check_inputs=True)
    assert isinstance(given, dict)  # else the config would have been refused
    for key, path in paths_of(config):
        _replace_at(given, key, _beside(path, folder or config.output.parent))
    return config, template(given=_plain_data(given), full=full)


def document_of(line: OneLine) -> Document:
    """The data of a command line, each value with the argument that it comes from as its place."""
    document = Document("the command line", {})
    places = [_place(0, line.content), *(_place(1 + index, text) for index, text in enumerate(line.styles))]
    document.put(["content"], CommandLineText(line.content), places[0])
    document.put(["styles"], [_style(text) for text in line.styles], places[1])
    for index, place in enumerate(places[1:]):
        for name in ("image", "weight"):
            document.values["styles", index, name] = document.keys["styles", index, name] = place
    last = len(places)
    document.put(["output"], CommandLineText(line.output), _place(last, f"-o {line.output}"))
    for option, key, text in (("--size", "size", line.size), ("--dpi", "export.dpi", line.dpi)):
        if text is not None:
            document.put(key.split("."), _value(text), _place(last + 1, f"{option} {text}"))
    if line.preset is not None:
        document.put(["preset"], line.preset, _place(last + 2, f"--preset {line.preset}"))
    for number, setting in enumerate(line.overrides):
        override(document, number, setting)
    return document


def _place(number: int, text: str) -> Place:
    return Place(1 + number, 0, shown(text))


def _value(text: str) -> object:
    value = plain_value(text.strip())
    return CommandLineText(value) if isinstance(value, str) else value


def _style(text: str) -> dict[str, object]:
    """The style of an argument. A file whose whole name is the text comes first."""
    match = None if os.path.lexists(text) else _WEIGHTED.fullmatch(text)
    if match is None:
        return {"image": CommandLineText(text)}
    return {"image": CommandLineText(match[1]), "weight": _value(match[2])}


def _replace_at(data: Any, key: Key, text: str) -> None:
    """Set the value at `key` if it was given."""
    for part in key[:-1]:
        inside = isinstance(data, Mapping) or (isinstance(data, list) and part in range(len(data)))
        data = (data.get(part) if isinstance(data, Mapping) else data[part]) if inside else None
    if isinstance(data, dict) and data.get(key[-1]) is not None:
        data[key[-1]] = text


def _beside(path: Path, folder: Path) -> str:
    """`path` as it is written in a config in `folder`."""
    relative = os.path.relpath(path, folder)
    return str(path) if relative.split("/")[: _MAX_UP + 1] == [".."] * (_MAX_UP + 1) else relative


def _plain_data(data: Any) -> Any:
    """The data with plain text in place of text that is marked as from the command line."""
    if isinstance(data, dict):
        return {name: _plain_data(value) for name, value in data.items()}
    if isinstance(data, list):
        return [_plain_data(value) for value in data]
    return str(data) if isinstance(data, str) else data


def variation_text(path: Path, settings: Sequence[str]) -> str:
    """The YAML of the config at `path` with these `key=value`, with relative paths that start at its folder.

    Raises ConfigError like load_config.
    """
    document = read(path)
    for number, setting in enumerate(settings):
        override(document, number, setting)
    given, folder = copy.deepcopy(document.data), Path.cwd() / path.parent
    for key, file in paths_of(config_of(document, folder)):
        _replace_at(given, key, _beside(file, folder))
    return yaml.safe_dump(_plain_data(given), sort_keys=False, allow_unicode=True)
