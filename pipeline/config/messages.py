"""Turns pydantic's validation errors into sentences, generated from the models: expected, found, did you mean."""

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

from pipeline.config.hints import hint
from pipeline.config.yaml_reader import Document, Key, Problem, dotted
from pipeline.core.text import shown

_M = TypeVar("_M", bound=BaseModel)
_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
_LIMITS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}", "multiple_of": "a multiple of {}"}


@dataclass(frozen=True)
class Expected:
    """Annotates a type with a description of its values, where none can be generated from the type."""

    text: str


@dataclass(frozen=True)
class Conflict:
    """Values that are valid one by one and contradict each other: their keys (the message is placed at the first)."""

    keys: tuple[Key, ...]
    text: str

    def __str__(self) -> str:
        return f"{dotted(self.keys[0])}: {self.text}"


class ConflictsError(ValueError):
    """Raised by the validator of a model, with all conflicts."""

    def __init__(self, conflicts: Iterable[Conflict]) -> None:
        self.conflicts = tuple(conflicts)
        super().__init__("; ".join(map(str, self.conflicts)))


def allowed(name: str, names: Sequence[str]) -> str:
    """The accepted names, and the one that is closest to `name`."""
    close = difflib.get_close_matches(name[:80], names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"allowed: {', '.join(names)}{hint}"


def expected(annotation: Any, metadata: Sequence[object] = ()) -> str:
    """What a field of this type accepts, in words."""
    if get_origin(annotation) is Annotated:
        base, *marks = get_args(annotation)
        return expected(base, [*metadata, *marks])
    for mark in metadata:
        if isinstance(mark, Expected):
            return mark.text
    if get_origin(annotation):
        return _expected_generic(get_origin(annotation), get_args(annotation), metadata)
    if issubclass(annotation, BaseModel):
        return f"a section with {', '.join(fields_of(annotation))}"
    return " ".join([_PLAIN[annotation], ", ".join(_limits(metadata))]).strip()


def _expected_generic(origin: Any, inner: Sequence[Any], metadata: Sequence[object]) -> str:
    if origin in (Union, types.UnionType):
        return " or ".join(expected(member) for member in inner)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else str(inner[0])
    if origin is tuple:
        if inner[-1] is not Ellipsis:
            return f"a list of {len(inner)}, each {expected(inner[0])}"
        max_length = next((mark.max_length for mark in metadata if isinstance(mark, MaxLen)), None)
        return "a list" + (f" with at most {max_length} entries" if max_length else "")
    assert origin is dict, origin
    return f"a mapping of each name to {expected(inner[1])}"


def _limits(metadata: Sequence[object]) -> Iterator[str]:
    for mark in metadata:
        if isinstance(mark, FieldInfo):
            yield from _limits(mark.metadata)
        for name, words in _LIMITS.items():
            if (limit := getattr(mark, name, None)) is not None:
                yield words.format(limit if isinstance(limit, int) else f"{limit:g}")


def _written(value: object) -> str:
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


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model by key, which is a field's alias if its name cannot be an attribute of Python (`for`)."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def placeholders(model: type[BaseModel]) -> dict[str, Any]:
    """The example of every key of `model` that has one."""
    return {name: field.examples[0] for name, field in model.model_fields.items() if field.examples}


def validate(model: type[_M], document: Document, base: Path) -> _M | None:
    """`document` as a `model` whose relative paths start at `base`; None if it is invalid.

    Adds every error to `document.problems`.
    """
    context = {"base": base}
    try:
        return model.model_validate(document.data, context=context)
    except ValidationError as error:
        faults = _faults(error, model, document)
        conflicts = _conflicts(error)
    if faults:
        # Pydantic checks for conflicts only if every value is valid, so validate again with the invalid ones replaced.
        try:
            model.model_validate(_repaired(model, document.data, faults), context=context)
        except ValidationError as error:
            conflicts = [conflict for conflict in _conflicts(error) if not _touches(conflict, faults)]
    for conflict in conflicts:
        key = conflict.keys[0]
        document.problems.append(Problem(document.place(key), dotted(key), conflict.text))
    document.problems += faults.values()
    return None


def faults_in(error: ValidationError, model: type[BaseModel]) -> str:
    """Every fault of data that does not come from a file of the user, on one line."""
    faults = [f"{fault.key}: {fault.text}" for fault in _faults(error, model, Document("")).values()]
    return shown("; ".join([*map(str, _conflicts(error)), *faults]), 500)


def _conflicts(error: ValidationError) -> list[Conflict]:
    causes = [detail.get("ctx", {}).get("error") for detail in error.errors(include_url=False)]
    return [conflict for cause in causes if isinstance(cause, ConflictsError) for conflict in cause.conflicts]


def _repaired(model: type[BaseModel], data: object, faults: Iterable[Key]) -> dict[str, Any]:
    """`data` with the default, or the example, in place of every invalid value."""
    repaired: Any = copy.deepcopy(data)
    for key in faults:
        section = repaired
        *outer, last = itertools.takewhile(lambda part: isinstance(part, str), key)  # a list is replaced as a whole
        for name in outer:
            if not isinstance(inner := section.get(name, {}), dict):  # a section that is written as one of its values
                last = name
                break
            section = inner
        section.pop(last, None)
    required = {name: value for name, value in placeholders(model).items() if model.model_fields[name].is_required()}
    return {**required, **repaired}


def _touches(conflict: Conflict, faults: Iterable[Key]) -> bool:
    """Whether a conflict involves an invalid value, and so may disappear once that value is corrected."""
    pairs = itertools.product(conflict.keys, faults)
    return any(key[: len(fault)] == fault[: len(key)] for key, fault in pairs)


def _faults(error: ValidationError, model: type[BaseModel], document: Document) -> dict[Key, Problem]:
    """The errors of single values, one problem per key, each at its place in `document`."""
    specific: dict[Key, Problem] = {}
    general: dict[Key, Problem] = {}
    for detail in error.errors(include_url=False):
        key, parent, field = _resolve(model, detail["loc"])
        kind, cause = detail["type"], detail.get("ctx", {}).get("error")
        place = document.place(key)
        if kind == "missing":
            text = f"missing; expected {expected(field.annotation, field.metadata)} ({field.description})"
            specific[key] = Problem(place, dotted(key), text)
        elif kind == "extra_forbidden":
            text = f"unknown key; {allowed(str(key[-1]), tuple(fields_of(parent)))}"
            if str(key[-1]).isdecimal():
                text = "unknown key; a comma separates keys here, so a decimal number needs a point, such as 0.5"
            specific[key] = Problem(document.place(key, of_name=True), dotted(key), text)
        elif kind == "value_error" and not isinstance(cause, ConflictsError):
            specific[key] = Problem(place, dotted(key), str(cause))
        elif kind not in ("value_error", "default_factory_not_called"):  # the latter's cause is a fault of its own
            general[key] = Problem(place, dotted(key), _mismatch(field, detail["input"]))
    # Prefer the specific sentences: pydantic also reports the other members of a union, and a list whose only entry is
    # invalid.
    reported = {key[:length] for key in specific | general for length in range(len(key))} | specific.keys()
    return specific | {key: problem for key, problem in general.items() if key not in reported}


def _mismatch(field: FieldInfo, value: object) -> str:
    accepts = expected(field.annotation, field.metadata)
    text = f"expected {accepts}, found {_written(value)}"
    annotation = _not_null(field.annotation)
    names = [str(name) for name in get_args(annotation)] if get_origin(annotation) is Literal else []
    offered = [name for name in names if name in accepts]  # an accepted name may be left out of what is expected
    close = difflib.get_close_matches(value[:80], offered, n=1) if isinstance(value, str) else []
    return f"{text}; did you mean {close[0]!r}?" if close else text + hint(annotation, accepts, value)


def _not_null(annotation: Any) -> Any:
    """The type that a key accepts beside null; the annotation itself if it is not such a pair."""
    members = [member for member in get_args(annotation) if member is not types.NoneType]
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return members[0] if is_union and len(members) == 1 else annotation


def _model_named(name: str, members: Sequence[Any]) -> type[BaseModel] | None:
    """The section of this name among the members of a union."""
    types_ = (get_args(member)[0] if get_origin(member) is Annotated else member for member in members)
    models = (member for member in types_ if isinstance(member, type) and issubclass(member, BaseModel))
    return next((model for model in models if model.__name__ == name), None)


def field_at(model: type[BaseModel], key: Key) -> FieldInfo:
    """The field of `model` that a key names; a field of type None if there is no such key."""
    return _resolve(model, key)[2]


def _resolve(model: type[BaseModel], location: Sequence[str | int]) -> tuple[Key, type[BaseModel], FieldInfo]:
    """The config key of a pydantic location, the model around it, and its field (or the type of the list's entry).

    Pydantic appends names of union members and of dict keys, which are not part of the config key.
    """
    field = FieldInfo(annotation=model)
    parent = model
    key: Key = ()
    for depth, part in enumerate(location):
        annotation = _not_null(field.annotation)
        inner = get_args(annotation)
        is_last = depth == len(location) - 1  # then the union as a whole says what it accepts
        if not is_last and (member := _model_named(str(part), inner)) is not None:
            field = FieldInfo(annotation=member)
            continue
        if get_origin(annotation) is tuple and isinstance(part, int):
            field = FieldInfo.from_annotation(inner[0])
        elif get_origin(annotation) is dict and part != "[key]":
            field = FieldInfo.from_annotation(inner[1])
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            parent = annotation
            field = fields_of(annotation).get(str(part), FieldInfo(annotation=types.NoneType))
        else:
            break
        key = (*key, part)
    return key, parent, field
