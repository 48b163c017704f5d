"""The commented config file that `pipeline init` writes, and `pipeline run` beside the output of its images.

Comments stand above their keys, in lines that fit into a narrow terminal.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from pipeline.config.config import Config
from pipeline.config.messages import expected, placeholders
from pipeline.config.presets import with_preset
from pipeline.config.sections import StageConfig
from pipeline.config.yaml_reader import Document, Place, parse

_COLUMNS = 60
# The keys that people change, and those of a style.
_SHORT: dict[str, Any] = {
    **dict.fromkeys(("preset", "content", "output", "size", "initial_size", "color")),
    "styles": {"image": None, "weight": None},
    "network": {"name": None},
    "loss": {"content_weight": None},
    "optimizer": {"max_iterations": None},
}
Keys = Mapping[str, Any] | None  # the keys to write beside those given, by section; None: all


def template(preset: str | None = None, given: Mapping[str, Any] | None = None, *, full: bool = True) -> str:
    """A config file: the keys that people change, or with `full` every key, each with its description.

    `given`: plain data of a config. All other values are those of the preset, or the defaults; without `given` the file
    names are placeholders.
    """
    own = {**(given or {}), **({"preset": preset} if preset else {})}
    config = Config.model_validate({**placeholders(Config), **with_preset(own)}, context={"base": Path()})
    name = own.get("preset")
    values = f"values of the preset {name}" if name else "defaults"
    which = "All settings" if full else "The settings that people change (pipeline init --full writes all)"
    head = f"{which}; those that are not yours have the {values}. A line behind # has no effect. Paths are relative "
    lines = _lines(config, None if full else _SHORT, own)
    return "\n".join([*_comment(f"{head}to this file."), *lines]) + "\n"


def _comment(text: str, columns: int = _COLUMNS) -> Iterator[str]:
    for line in textwrap.wrap(text, columns - 2, break_long_words=False, break_on_hyphens=False):
        yield f"# {line}"


def _lines(section: BaseModel, keys: Keys, given: Mapping[str, Any], columns: int = _COLUMNS) -> Iterator[str]:
    plain = section.model_dump(mode="json", by_alias=False)
    for name, field in type(section).model_fields.items():
        key, value = field.alias or name, getattr(section, name)
        if keys is not None and key not in keys and key not in given:
            continue
        inner, own = None if keys is None else keys.get(key) or {}, given.get(key)
        is_section = isinstance(value, BaseModel)
        always_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        accepts = "" if always_section else f"; {expected(field.annotation, field.metadata)}"
        if columns == _COLUMNS:
            yield ""
        yield from _comment(f"{field.description}{accepts}", columns)
        if is_section and own is not None and not isinstance(own, Mapping):  # a section that is written as one value
            yield f"{key}: {_flow(own)}"
        elif is_section:
            yield f"{key}:"
            yield from (f"  {line}" for line in _lines(value, inner, own or {}, columns - 2))
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            yield f"{key}:"
            yield from _entries(value, inner, own, columns - 4)
        else:
            # A default that depends on another key is commented out: a fixed value would no longer follow that key.
            follows = field.default_factory_takes_validated_data and name not in section.model_fields_set
            yield f"{'# ' if follows else ''}{key}: {_flow(plain[name])}"


def _entries(entries: Sequence[BaseModel], keys: Keys, given: Any, columns: int) -> Iterator[str]:
    """The entries of a list of sections. Only the first has comments."""
    for number, entry in enumerate(entries):
        own = given[number] if isinstance(given, list) else {}
        lines = _stage_lines(entry) if isinstance(entry, StageConfig) else _lines(entry, keys, own, columns)
        yield from _entry([line for line in lines if not (number and line.startswith("#"))])


def _entry(lines: list[str]) -> Iterator[str]:
    """Lines as an entry of a list: the dash stands before its first key, and comments above."""
    first = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    for index, line in enumerate(lines):
        yield f"  {'- ' if index == first else '  '}{line}"


def _stage_lines(stage: StageConfig) -> list[str]:
    """An entry of `stages`: the given keys only, because a default would override the value of the top level."""
    return yaml.safe_dump(stage.model_dump(mode="json", exclude_unset=True), sort_keys=False).splitlines()


def _flow(value: object) -> str:
    """A value on one line, as this program reads it: PyYAML leaves text such as 1e3 without quotes."""
    text = yaml.safe_dump([value], default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True).strip()
    document = Document("")
    parse(text, document, lambda _mark: Place(1, 1, ""), str)
    return text[1:-1] if document.data == [value] else json.dumps(value, ensure_ascii=False)
