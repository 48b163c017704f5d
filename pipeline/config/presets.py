"""Presets: named settings for a kind of picture, under the keys that a config gives itself.

They are YAML files in assets/presets, which `configs/presets` links to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.presets import PRESETS

_FOLDER = Path(__file__).parents[1] / "assets" / "presets"
# Mappings that are one value: their entries belong together.
_WHOLE = {"style_layers", "content_layers"}


def with_preset(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config's data, with the values of its `preset` for the keys that it does not give."""
    name = data.get("preset")
    if not isinstance(name, str) or name not in PRESETS:  # validation reports an unknown name
        return dict(data)
    return _merged(yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")), data)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**under, **over}
    for name in under.keys() & over.keys() - _WHOLE:
        if isinstance(under[name], Mapping) and isinstance(over[name], Mapping):
            merged[name] = _merged(under[name], over[name])
    return merged
