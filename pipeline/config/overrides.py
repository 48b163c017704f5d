"""Values from the command line: `--set key=value`, and the lists of `--vary`.

A value is text, a number or a word of the config (null, true, false), taken as it is: unlike a line of YAML it has no
comments, anchors or other signs with a meaning. Only what begins with [ { " or ' is YAML.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import yaml

from pipeline.config.yaml_reader import (
    MAX_DEPTH,
    NO_COMMENTS,
    CommandLineText,
    Document,
    Loader,
    Place,
    Problem,
    dotted,
    parse,
    plain_value,
)
from pipeline.core.text import shown

_SIGNS = ("[", "{", '"', "'")
_DECIMAL_COMMA = re.compile(r"0[0-9]+")


def override(document: Document, number: int, setting: str, option: str = "--set") -> None:
    """Apply the `number`-th `--set key=value` to a document. Its problems are placed at the option."""
    place = Place(10**9 + number, 0, f"{option} {shown(setting)}")
    name, equals, text = setting.partition("=")
    parts = name.split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        document.problems.append(Problem(place, "", "not key=value, such as size=4096 or styles.0.weight=2"))
        return
    value = _value(text, place)
    for problem in value.problems:
        key = ".".join(filter(None, (dotted(tuple(parts)), problem.key)))
        document.problems.append(Problem(place, key, problem.text))
    if value.readable:
        document.put(parts, value.data, place)


def _value(text: str, place: Place) -> Document:
    value = Document(place.source)
    plain = text.strip()
    if plain.startswith(_SIGNS) or "\n" in plain:
        parse(text, value, lambda _mark: place, CommandLineText, _OptionLoader)
        value.problems = [Problem(place, problem.key, _in_quotes(plain, problem.text)) for problem in value.problems]
    else:
        found = plain_value(plain)
        value.data = CommandLineText(found) if isinstance(found, str) else found
        _refuse_surrogates(plain, value, place)
    return value


def _refuse_surrogates(text: str, value: Document, place: Place) -> None:
    """A name that is not UTF-8 cannot be written to the journal, or printed."""
    try:
        text.encode()
    except UnicodeEncodeError:
        value.readable = False
        value.problems.append(Problem(place, "", f"{text!r} is not valid text"))


def _in_quotes(plain: str, text: str) -> str:
    """`text` with the remedy for a name that begins like YAML."""
    if not text.startswith("not valid YAML") or plain[0] not in "[{":
        return text
    return f"{text}. A name that begins with {plain[0]} needs quotes of its own: '\"{shown(plain, 20)}\"'"


def listed(text: str, place: Place) -> tuple[list[str], list[Problem]]:
    """The comma-separated values in `text`, as written, and the problems that keep them from being parsed.

    Commas inside quotes, [] or {} do not separate.
    """
    flow, document = f"[{text}]", Document(place.source)
    node: Any = parse(flow, document, lambda _mark: place, str, _OptionLoader)
    if document.problems or not document.readable:
        return [], document.problems
    values = [flow[value.start_mark.index : value.end_mark.index] for value in node.value]
    return values, list(_decimal_commas(values, place))


def _decimal_commas(values: list[str], place: Place) -> Iterator[Problem]:
    for before, after in itertools.pairwise(values):
        if _DECIMAL_COMMA.fullmatch(after):
            text = f"a comma separates values; for a decimal number write {before}.{after}, not {before},{after}"
            yield Problem(place, "", text)
            return


class _OptionLoader(Loader):
    """Refuses comments: an option has none, so what follows a # was meant."""

    def scan_to_next_token(self) -> None:
        """Skip blanks, and refuse a comment among them."""
        start: int = self.pointer
        super().scan_to_next_token()
        if "#" in self.buffer[start : self.pointer]:
            raise yaml.MarkedYAMLError(problem=NO_COMMENTS, problem_mark=self.get_mark())
