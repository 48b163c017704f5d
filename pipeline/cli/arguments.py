"""Options that several commands share, and parsers of option values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline.core.image_formats import COMPRESSIONS, PROFILE_SUFFIXES, PROFILES, TIFF_COMPRESSIONS
from pipeline.core.tiling import Rect

F = TypeVar("F", bound=Callable[..., Any])

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
with_log_format = click.option(
    "--log-format",
    type=click.Choice(["auto", "live", "plain", "json"]),
    metavar="FORMAT",
    default="auto",
    help="Progress output on stderr: live, plain, json, or auto (default), which is live on a terminal, else plain.",
)


def with_options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """These options, in this order."""
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


def with_config(required: bool) -> Callable[[F], F]:
    """The options --config and --set."""
    path, metavar = click.Path(path_type=Path), "KEY=VALUE"
    config = click.option("-c", "--config", "config_path", type=path, required=required, help="Config file.")
    overrides = click.option("--set", "overrides", multiple=True, metavar=metavar, help="Change a value of the config.")
    return lambda command: config(overrides(command))


def with_run(command: F) -> F:
    """The options that select a run: its config or its run directory."""
    path = click.Path(path_type=Path, file_okay=False)
    run = click.option("--run", "run_dir", type=path, help="Run directory (work_dir), instead of --config.")
    return with_config(required=False)(run(command))


def with_stage(text: str) -> Callable[[F], F]:
    """The option --stage, which counts from 1 as all output does; the commands count from 0."""

    def to_index(_context: click.Context, _option: click.Parameter, value: int | None) -> int | None:
        return None if value is None else value - 1

    return click.option("--stage", type=click.IntRange(1), metavar="N", callback=to_index, help=text)


def parse_rect(_context: click.Context, _option: click.Parameter, value: str | None) -> Rect | None:
    """Parse `x,y,width,height` in px. Raises BadParameter."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]{1,7}),([0-9]{1,7}),([0-9]{1,7}),([0-9]{1,7})", value.replace(" ", ""))
    if match is None:
        raise click.BadParameter(f"{value!r} is not x,y,width,height in whole px, such as 1200,800,400,300")
    x, y, width, height = map(int, match.groups())
    return Rect(y, y + height, x, x + width)


def parse_points(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> list[tuple[int, int]]:
    """Parse every `x,y` in px. Raises BadParameter."""
    points: list[tuple[int, int]] = []
    for value in values:
        match = re.fullmatch(r"([0-9]{1,7}),([0-9]{1,7})", value.replace(" ", ""))
        if match is None:
            raise click.BadParameter(f"{value!r} is not x,y in whole px, such as 1200,800")
        points.append((int(match[1]), int(match[2])))
    return points


def parse_compression(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """A known compression; a wrong one is answered with those that every build can write. Raises BadParameter."""
    if value is not None and value not in COMPRESSIONS:
        raise click.BadParameter(f"{value!r} is not one of {', '.join(TIFF_COMPRESSIONS)}")
    return value


def parse_profile(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """Accept the name of a profile, or that of a file of one. Raises BadParameter."""
    if value is not None and value not in PROFILES and not value.lower().endswith(PROFILE_SUFFIXES):
        raise click.BadParameter(
            f"{value!r} is none of {', '.join(PROFILES)}, and no {' or '.join(PROFILE_SUFFIXES)} file"
        )
    return value


def parse_share(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    """Parse a share above 0 and up to 1: `5%` and `0.05` are the same. Raises BadParameter."""
    if value is None:
        return None
    try:
        share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise click.BadParameter(f"{value!r} is not a share above 0 and up to 100 %, such as 5%")
    return share
