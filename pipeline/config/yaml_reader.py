"""Reads YAML as plain data with the position of every key and value, for error messages.

A deliberate subset of YAML: scalars follow the 1.2 core schema (`1e-3` is a number and `no` is text), and anchors,
aliases and tags are refused, because they can hide what a config contains. Problems are collected, never raised.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.errors import MISPLACED, storage_error
from pipeline.core.text import shown

Key = tuple[str | int, ...]
# The template has 4 KB and 80 values. A file within these limits is parsed within a second, whatever it contains.
MAX_FILE_BYTES = 2**16
MAX_DEPTH = 20
MAX_VALUES = 5000
# About one screen of a terminal.
MAX_PROBLEMS = 40
NO_COMMENTS = "an option has no comments; put text with a # in quotes of its own"
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **{sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
}
# An escape can name half of a surrogate pair, which cannot be encoded.
_SURROGATE = re.compile("[\ud800-\udfff]")
# Longer numbers are read as text: no setting needs them, and Python refuses to convert or print very long ones.
_MAX_NUMBER_CHARS = 40


@dataclass(frozen=True, order=True)
class Place:
    """A position: line and column from 1, or column 0 for a command-line option. Sorts in reading order."""

    line: int
    column: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.column else self.source


@dataclass(frozen=True, order=True)
class Problem:
    """One error in a config, as one line of text."""

    place: Place
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.place), self.key, self.text) if part)


def problem_lines(problems: Iterable[Problem]) -> str:
    """The problems sorted by place, one per line. The last line counts those beyond MAX_PROBLEMS."""
    lines = sorted(set(problems))
    if (more := len(lines) - MAX_PROBLEMS) > 0:
        lines[MAX_PROBLEMS:] = [Problem(lines[MAX_PROBLEMS].place, "", f"{more} more problems from here on")]
    return "\n".join(map(str, lines))


class CommandLineText(str):
    """Text from `--set`: a path in it is relative to the current folder, not to that of the config file."""

    __slots__ = ()


def dotted(key: Key) -> str:
    """A key as it is written in `--set`."""
    return shown(".".join(str(part) for part in key))


def undotted(text: str) -> Key:
    """The inverse of `dotted`: parts that are numbers are list indices."""
    return tuple(int(part) if re.fullmatch("[0-9]{1,4}", part) else part for part in text.split("."))


@dataclass
class Document:
    """Plain data, the places of its keys and values, and the problems found so far."""

    source: str
    data: object = None
    readable: bool = True
    values: dict[Key, Place] = field(default_factory=dict)
    keys: dict[Key, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, key: Key, *, of_name: bool = False) -> Place:
        """Place of the value (or the name) at `key`, or of the nearest enclosing section that is in the file."""
        places = self.keys if of_name else self.values
        while key and key not in places:
            key = key[:-1]
        return places.get(key, Place(1, 1, self.source))

    def fail(self, text: str, line: int = 1, column: int = 1) -> None:
        """Add a problem that leaves the document without data."""
        self.readable = False
        self.problems.append(Problem(Place(line, column, self.source), "", text))

    def put(self, parts: Sequence[str], value: object, place: Place) -> None:
        """Set the value at the key of these parts, creating the sections above it; problems are placed at `place`."""
        if not isinstance(self.data, dict):
            self.data = {}
        container: Any = self.data
        path: Key = ()
        for depth, part in enumerate(parts, start=1):
            index = self._index(container, part, path, place)
            if index is None:
                return
            path = (*path, index)
            is_last = depth == len(parts)
            if is_last or (isinstance(container, dict) and container.get(part) is None):
                container[index] = value if is_last else {}
                self._forget(path)
                self.values[path] = self.keys[path] = place
            container = container[index]

    def _index(self, container: object, part: str, path: Key, place: Place) -> str | int | None:
        """`part` as an index of `container`; None, with a problem added, if there is no such entry."""
        if isinstance(container, dict):
            return part
        if isinstance(container, list) and part.isascii() and part.isdigit() and int(part[:9]) < len(container):
            return int(part[:9])
        if isinstance(container, list):
            text = f"there is no entry {shown(part)}; the list has {len(container)}, counted from 0"
        else:
            text = f"this is a single value, so it has no {shown(part)} inside"
        self.problems.append(Problem(place, dotted(path), text))
        return None

    def _forget(self, path: Key) -> None:
        for places in (self.values, self.keys):
            for key in [key for key in places if key[: len(path)] == path]:
                del places[key]


def read(path: Path) -> Document:
    """The YAML file at `path`. If it cannot be read or parsed, the `Document` has problems and no data.

    Raises StorageError if the disk fails.
    """
    document = Document(shown(str(path), 4096))
    raw = _read_bytes(path, document)
    if not document.readable:
        return document
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        document.fail("not UTF-8 text; save the file as UTF-8", *_position_after(raw[: error.start].decode()))
        return document
    parse(text, document, lambda mark: Place(mark.line + 1, mark.column + 1, document.source), str)
    if document.readable and document.data is None:
        document.fail("the config is empty; `pipeline init` writes one to start from")
    elif document.readable and not isinstance(document.data, dict):
        document.fail("the top level must consist of `key: value` lines")
    return document


def _read_bytes(path: Path, document: Document) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        document.fail("no such file; `pipeline init` writes a config to start from")
    except IsADirectoryError:
        document.fail("a folder; give the config file in it")
    except OSError as error:
        if error.errno not in MISPLACED:
            raise storage_error(path, error) from error
        document.fail(f"cannot be read: {error.strerror}")
    except ValueError as error:  # e.g. a NUL in the path
        document.fail(f"cannot be read: {error}")
    else:
        if len(raw) <= MAX_FILE_BYTES:
            return raw
        document.fail(f"larger than {MAX_FILE_BYTES} bytes, so probably not a config file; is it an image?")
    return b""


Locate = Callable[[Any], Place]  # of a PyYAML mark


def parse(
    text: str, document: Document, locate: Locate, as_text: type[str], loader_type: type[Loader] | None = None
) -> yaml.Node | None:
    """Fill `document` from YAML `text`, and return its nodes.

    It becomes unreadable only if the text cannot be parsed at all.
    """
    loader = node = None
    try:
        loader = (loader_type or Loader)(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        character = chr(error.character)
        document.fail(f"the character {character!r} is not allowed in YAML", *_position_after(text[: error.position]))
    except yaml.MarkedYAMLError as error:
        place = locate(error.problem_mark or error.context_mark)
        document.fail(_syntax(error), place.line, place.column)
    except (ValueError, OverflowError):  # PyYAML does not catch these for invalid escapes such as "\U99999999"
        place = locate(loader.get_mark()) if loader else Place(1, 1, document.source)
        document.fail("not valid YAML: an invalid character escape or number", place.line, place.column)
    else:
        for mark, reason in loader.refused:
            document.problems.append(Problem(locate(mark), "", reason))
        document.data = _Builder(document, locate, as_text).build(node, ())
    return node


def plain_value(text: str) -> object:
    """The value of text without quotes: null, true, false, a number, or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) <= _MAX_NUMBER_CHARS and _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if len(text) <= _MAX_NUMBER_CHARS and _FLOAT.fullmatch(text):
        return float(text)
    return text


def _position_after(text: str) -> tuple[int, int]:
    """Line and column, from 1, of the character that follows `text`."""
    return text.count("\n") + 1, len(text) - text.rfind("\n")


def _syntax(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "it cannot be parsed"
    if problem == NO_COMMENTS:
        return problem
    if "'\\t'" in problem:
        return "a tab; indent YAML with spaces only"
    if "another document" in problem:
        return "a second document starts here; a config has only one"
    context = f" {error.context}" if error.context else ""
    return f"not valid YAML:{shown(context)} {shown(problem)}".replace(":  ", ": ")


class Loader(yaml.SafeLoader):
    """Composes nodes without anchors, aliases and tags, and stops at MAX_VALUES and MAX_DEPTH."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.refused: list[tuple[Any, str]] = []
        self._depth = 0
        self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose one node, without its anchor and its tag."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        self._values += 1
        if self._values > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_VALUES} values", problem_mark=mark)
        if self.check_event(yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            self.refused.append((mark, f"aliases are not supported; replace *{shown(event.anchor)} by its value"))
            return yaml.ScalarNode("tag:yaml.org,2002:null", "", mark, event.end_mark)
        if event.anchor is not None:
            self.refused.append((mark, f"anchors are not supported; remove &{shown(event.anchor)}"))
            event.anchor = None
        if event.tag is not None:
            self.refused.append((mark, f"tags are not supported; remove {shown(event.tag)}"))
            event.tag = None
        if self._depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_DEPTH} levels deep", problem_mark=mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


@dataclass(frozen=True)
class _Builder:
    """Turns nodes into plain data, and records places and problems in `document`."""

    document: Document
    locate: Locate
    as_text: type[str]

    def build(self, node: yaml.Node | None, key: Key) -> object:
        if node is None:
            return None
        self.document.values[key] = self.locate(node.start_mark)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*key, index)) for index, child in enumerate(node.value)]
        return self._scalar(node, key)

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, object]:
        data: dict[str, object] = {}
        for name_node, value_node in node.value:
            place = self.locate(name_node.start_mark)
            if not isinstance(name_node, yaml.ScalarNode):
                self._problem(place, key, "a key must be a plain name")
                continue
            name = str(name_node.value)
            inner = (*key, name)
            if name in data:
                first = self.document.keys[inner]
                where = f", first given at line {first.line}" if first.column else ""
                self._problem(place, inner, f"duplicate key{where}; keep one of the two")
            elif _SURROGATE.search(name):
                self._problem(place, key, f"{name!r} is not valid text")
            else:
                self.document.keys[inner] = place
                data[name] = self.build(value_node, inner)
        return data

    def _scalar(self, node: Any, key: Key) -> object:
        text = str(node.value)
        if node.style is None and not isinstance(value := plain_value(text), str):  # not quoted
            return value
        if _SURROGATE.search(text):
            self._problem(self.locate(node.start_mark), key, f"{shown(text)} is not valid text")
            return None
        return self.as_text(text)

    def _problem(self, place: Place, key: Key, text: str) -> None:
        self.document.problems.append(Problem(place, dotted(key), text))
