"""How to write what was most likely meant, for mistakes whose usual cause is known."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from pipeline.core.text import shown

_DECIMAL_COMMA = re.compile(r"[-+]?[0-9]*,[0-9]+")
_UNDERSCORES = re.compile(r"[-+]?[0-9]+(_[0-9]+)+")
# YAML 1.1 reads these words as true and false; here they are text, as in YAML 1.2.
_SPOKEN = {**dict.fromkeys(("yes", "on", "y"), "true"), **dict.fromkeys(("no", "off", "n"), "false")}


def hint(annotation: Any, accepts: str, value: object) -> str:
    """The hint for a value that a field of this type refuses, beginning with its separator; else empty.

    `accepts`: what the field accepts, in words.
    """
    return next((f"; {text}" for text in _hints(annotation, accepts, value)), "")


def _hints(annotation: Any, accepts: str, value: object) -> Iterator[str]:
    if isinstance(value, int | float) and "a path" in accepts:
        yield "put a name that looks like a number in quotes"
    if not isinstance(value, str):
        return
    short = shown(value, 40)
    if "number" in accepts and _DECIMAL_COMMA.fullmatch(short):
        yield f"write {short.replace(',', '.')}, with a point"
    if "number" in accepts and _UNDERSCORES.fullmatch(short):
        yield f"write {short.replace('_', '')}"
    if "true or false" in accepts and short.lower() in _SPOKEN:
        yield f"write {_SPOKEN[short.lower()]}"
    if example := _section(annotation, short):
        yield f"write {example}"
    if get_origin(annotation) is tuple and (entry := _section(get_args(annotation)[0], short)):
        yield f"write [{entry}]"


def _section(annotation: Any, text: str) -> str:
    """`text` as a section in braces: as its keys, or as the value of the first key if that is a required one."""
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return ""
    if ": " in text:
        return f"{{{text}}}"
    name, field = next(iter(annotation.model_fields.items()))
    return f"{{{name}: {text}}}" if field.is_required() else ""
