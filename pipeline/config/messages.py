"""What pydantic finds wrong, in sentences made from the models themselves: wanted, found, allowed, did you mean."""

from __future__ import annotations

import copy
import difflib
import itertools
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import MaxLen
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pipeline.config.yaml_reader import Document, Key, Problem, dotted
from pipeline.core.text import shown

_M = TypeVar("_M", bound=BaseModel)
_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
_LIMITS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}", "multiple_of": "a multiple of {}"}


@dataclass(frozen=True)
class Wanted:
    """Marks a type with the words for what it takes, where the words cannot be made from the type."""

    text: str


@dataclass(frozen=True)
class Conflict:
    """Values that are right one by one and wrong together: their keys, the first being where to say so, and why."""

    keys: tuple[Key, ...]
    text: str


class ConflictsError(ValueError):
    """Raised by a model's own check, with all it found."""

    def __init__(self, conflicts: Iterable[Conflict]) -> None:
        self.conflicts = tuple(conflicts)
        super().__init__("; ".join(f"{dotted(one.keys[0])}: {one.text}" for one in self.conflicts))


def allowed(found: str, names: Sequence[str]) -> str:
    """The accepted names, and the one that was probably meant."""
    close = difflib.get_close_matches(found[:80], names, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"allowed: {', '.join(names)}{meant}"


def wanted(annotation: Any, metadata: Sequence[object] = ()) -> str:
    """What a field of this type takes, in words."""
    if get_origin(annotation) is Annotated:
        base, *marks = get_args(annotation)
        return wanted(base, [*metadata, *marks])
    for mark in metadata:
        if isinstance(mark, Wanted):
            return mark.text
    if get_origin(annotation):
        return _wanted_generic(get_origin(annotation), get_args(annotation), metadata)
    if issubclass(annotation, BaseModel):
        return f"a section with {', '.join(annotation.model_fields)}"
    return " ".join([_PLAIN[annotation], ", ".join(_limits(metadata))]).strip()


def _wanted_generic(origin: Any, inner: Sequence[Any], metadata: Sequence[object]) -> str:
    if origin in (Union, types.UnionType):
        return " or ".join(wanted(member) for member in inner)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else str(inner[0])
    if origin is tuple:
        if inner[-1] is not Ellipsis:
            return f"a list of {len(inner)}, each {wanted(inner[0])}"
        most = next((mark.max_length for mark in metadata if isinstance(mark, MaxLen)), None)
        return "a list" + (f" with at most {most} entries" if most else "")
    assert origin is dict, origin
    return f"a mapping of each name to {wanted(inner[1])}"


def _limits(metadata: Sequence[object]) -> Iterator[str]:
    for mark in metadata:
        if isinstance(mark, FieldInfo):
            yield from _limits(mark.metadata)
        else:
            limits = {name: getattr(mark, name) for name in _LIMITS if hasattr(mark, name)}
            yield from (
                _LIMITS[name].format(limit if isinstance(limit, int) else f"{limit:g}")
                for name, limit in limits.items()
            )


def found(value: object) -> str:
    """A value as the user wrote it."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"the text '{shown(value)}'" if isinstance(value, str) else shown(str(value))


def placeholders(model: type[BaseModel]) -> dict[str, Any]:
    """The example of every key of `model` that has one."""
    return {name: field.examples[0] for name, field in model.model_fields.items() if field.examples}


def validate(model: type[_M], document: Document, base: Path) -> _M | None:
    """`document` as a `model` whose relative paths start at `base`; None, and `document.problems` added, if wrong."""
    context = {"base": base}
    try:
        return model.model_validate(document.data, context=context)
    except ValidationError as error:
        faults = _explain(error, model, document)
        conflicts = _conflicts(error)
    if faults:
        # Pydantic looks for conflicts only where every value is right, so look again with the wrong ones put right.
        try:
            model.model_validate(_repaired(model, document.data, faults), context=context)
        except ValidationError as error:
            conflicts = [one for one in _conflicts(error) if not _touches(one, faults)]
    for one in conflicts:
        document.problems.append(Problem(document.place_of_value(one.keys[0]), dotted(one.keys[0]), one.text))
    document.problems += faults.values()
    return None


def faults_in(error: ValidationError, model: type[BaseModel]) -> str:
    """Everything that pydantic found wrong with data that no file of the user's holds, on one line."""
    conflicts = [f"{dotted(one.keys[0])}: {one.text}" for one in _conflicts(error)]
    faults = [f"{one.key}: {one.text}" for one in _explain(error, model, Document("")).values()]
    return shown("; ".join(conflicts + faults), 500)


def _conflicts(error: ValidationError) -> list[Conflict]:
    causes = [detail.get("ctx", {}).get("error") for detail in error.errors(include_url=False)]
    return [one for cause in causes if isinstance(cause, ConflictsError) for one in cause.conflicts]


def _repaired(model: type[BaseModel], data: object, faults: Iterable[Key]) -> dict[str, Any]:
    """`data` with the default, or the example, in place of every wrong value."""
    repaired: Any = copy.deepcopy(data)
    for key in faults:
        inner = repaired
        names = list(itertools.takewhile(lambda part: isinstance(part, str), key))  # a list is replaced as a whole
        for name in names[:-1]:
            inner = inner.get(name, {})
        inner.pop(names[-1], None)
    required = {name: value for name, value in placeholders(model).items() if model.model_fields[name].is_required()}
    return {**required, **repaired}


def _touches(conflict: Conflict, faults: Iterable[Key]) -> bool:
    """Whether the conflict is about a value that was wrong by itself, so that it may be gone once that is mended."""
    pairs = itertools.product(conflict.keys, faults)
    return any(key[: len(fault)] == fault[: len(key)] for key, fault in pairs)


def _explain(error: ValidationError, model: type[BaseModel], document: Document) -> dict[Key, Problem]:
    """What is wrong with single values, one problem per key, each at its place in `document`."""
    specific: dict[Key, Problem] = {}
    general: dict[Key, Problem] = {}
    for detail in error.errors(include_url=False):
        key, parent, inside = _resolve(model, detail["loc"])
        kind, cause = detail["type"], detail.get("ctx", {}).get("error")
        place = document.place_of_value(key)
        if kind == "missing":
            text = f"missing; {wanted(inside.annotation, inside.metadata)} is wanted: {inside.description}"
            specific[key] = Problem(place, dotted(key), text)
        elif kind == "extra_forbidden":
            text = f"unknown key; {allowed(str(key[-1]), tuple(parent.model_fields))}"
            specific[key] = Problem(document.place_of_key(key), dotted(key), text)
        elif kind == "value_error" and not isinstance(cause, ConflictsError):
            specific[key] = Problem(place, dotted(key), str(cause))
        elif kind not in ("value_error", "default_factory_not_called"):  # the latter's cause has its own problem
            general[key] = Problem(place, dotted(key), _mismatch(inside, detail["input"]))
    # A sentence of our own says more than what pydantic adds for other members of a union, or for a list left
    # without a good entry.
    said = {key[:length] for key in specific | general for length in range(len(key))} | specific.keys()
    return specific | {key: problem for key, problem in general.items() if key not in said}


def _mismatch(field: FieldInfo, value: object) -> str:
    text = f"{wanted(field.annotation, field.metadata)} is wanted, found {found(value)}"
    names = [str(name) for name in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []
    close = difflib.get_close_matches(value[:80], names, n=1) if isinstance(value, str) else []
    return f"{text}; did you mean {close[0]!r}?" if close else text


def _not_null(annotation: Any) -> Any:
    """The type that a key takes beside null; the type itself if it takes more, or no null."""
    members = [member for member in get_args(annotation) if member is not types.NoneType]
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return members[0] if is_union and len(members) == 1 else annotation


def field_at(model: type[BaseModel], key: Key) -> FieldInfo:
    """The field of `model` that a key names; one that takes nothing where there is none."""
    return _resolve(model, key)[2]


def _resolve(model: type[BaseModel], location: Sequence[str | int]) -> tuple[Key, type[BaseModel], FieldInfo]:
    """The config key of a pydantic location, the model around it and the field (or the type of a list's entry) there.

    Pydantic appends its own names for union members and dict keys; they are no part of the key.
    """
    field = FieldInfo(annotation=model)
    parent = model
    key: Key = ()
    for part in location:
        annotation = _not_null(field.annotation)
        inner = get_args(annotation)
        if get_origin(annotation) is tuple and isinstance(part, int):
            field = FieldInfo.from_annotation(inner[0])
        elif get_origin(annotation) is dict and part != "[key]":
            field = FieldInfo.from_annotation(inner[1])
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            parent = annotation
            field = annotation.model_fields.get(str(part), FieldInfo(annotation=types.NoneType))
        else:
            break
        key = (*key, part)
    return key, parent, field
