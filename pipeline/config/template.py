"""The commented config file that `pipeline init` writes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import BaseModel

from pipeline.config.config import Config
from pipeline.config.messages import expected, fields_of, placeholders
from pipeline.config.presets import with_preset
from pipeline.config.sections import StageConfig


def template(preset: str | None = None) -> str:
    """A config file with every key, its default (or its value of the preset) and its description.

    The file names are placeholders.
    """
    data = with_preset({"preset": preset}) if preset else {}
    config = Config.model_validate({**placeholders(Config), **data}, context={"base": Path()})
    values = f"their values of the preset {preset}" if preset else "their defaults"
    head = f"# All settings with {values}; those behind # follow other settings. Paths are relative to this file."
    return "\n".join([head, *_template_lines(config)]) + "\n"


def _stage_lines(stage: StageConfig) -> list[str]:
    """An entry of `stages`: the given keys only, because a default would override the value of the top level."""
    return yaml.safe_dump(stage.model_dump(mode="json", exclude_unset=True), sort_keys=False).splitlines()


def _template_lines(section: BaseModel) -> Iterator[str]:
    plain = section.model_dump(mode="json")
    for attribute, (name, field) in zip(type(section).model_fields, fields_of(type(section)).items(), strict=True):
        value = getattr(section, attribute)
        if isinstance(value, BaseModel):
            yield f"{name}:  # {field.description}"
            yield from (f"  {line}" for line in _template_lines(value))
        elif isinstance(value, tuple) and value:
            yield f"{name}:  # {field.description}; {expected(field.annotation, field.metadata)}"
            for entry in value:
                first, *others = _stage_lines(entry) if isinstance(entry, StageConfig) else _template_lines(entry)
                yield from (f"  - {first}", *(f"    {line}" for line in others))
        else:
            # A default that depends on another key is commented out: a fixed value would no longer follow that key.
            follows = "# " if field.default_factory_takes_validated_data else ""
            flow = yaml.safe_dump([plain[name]], default_flow_style=True, width=math.inf, sort_keys=False).strip()[1:-1]
            accepts = expected(field.annotation, field.metadata)
            yield f"{follows}{name}: {flow}  # {field.description}; {accepts}"
