"""Variations of a config: every combination of the values that a preview compares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import MAX_PROBLEMS, Config, Place, Problem, listed, load_config, problem_lines
from pipeline.core.errors import ConfigError
from pipeline.core.text import shown

# More images cannot be compared on one sheet, and each takes minutes to render.
MAX_VARIATIONS = 64


@dataclass(frozen=True)
class Axis:
    """A key that is varied, and its values as written by the user."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Variation:
    """One combination: its `key=value` settings, in the order of the axes, and the config with them."""

    settings: tuple[str, ...]
    config: Config


def load_variations(
    path: str | Path, overrides: Sequence[str], vary: Sequence[str], *, check_inputs: bool = False
) -> tuple[tuple[Axis, ...], list[Variation]]:
    """The axes of `vary`, each `key=value,value`, and all combinations of their values, the last axis fastest.

    A comma inside [], {} or quotes does not separate values. `check_inputs`: as in load_config. Raises ConfigError with
    all problems of all combinations, each listed once.
    """
    axes = tuple(_axes(vary))
    if (number := math.prod(len(axis.values) for axis in axes)) > MAX_VARIATIONS:
        raise ConfigError(
            f"--vary {' --vary '.join(vary)}: {number:,} combinations, each an image to render; at most "
            f"{MAX_VARIATIONS} are allowed. Give fewer values, or vary one key after the other."
        )
    variations: list[Variation] = []
    problems: dict[str, None] = {}
    for values in itertools.product(*(axis.values for axis in axes)):
        settings = tuple(f"{axis.key}={value}" for axis, value in zip(axes, values, strict=True))
        try:
            variations.append(Variation(settings, load_config(path, overrides, settings, check_inputs=check_inputs)))
        except ConfigError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    if problems:
        more = [f"and {len(problems) - MAX_PROBLEMS} more problems"] if len(problems) > MAX_PROBLEMS else []
        raise ConfigError("\n".join([*list(problems)[:MAX_PROBLEMS], *more]))
    return axes, variations


def _axes(vary: Sequence[str]) -> list[Axis]:
    axes: list[Axis] = []
    problems: list[Problem] = []
    for number, text in enumerate(vary):
        place = Place(number + 1, 0, f"--vary {shown(text)}")
        key, _, values_text = text.partition("=")
        values, wrong = listed(values_text, place)
        if not wrong and not (key and values):
            example = "this is not key=value,value, such as initial_size=384,512 or loss.style_weight=0.5,1,2"
            wrong = [Problem(place, "", example)]
        elif any(axis.key == key for axis in axes):
            wrong = [Problem(place, key, "varied twice; give all its values in one --vary")]
        problems += wrong
        axes.append(Axis(key, tuple(values)))
    if problems:
        raise ConfigError(problem_lines(problems))
    return axes
