"""The files that a run's start picture is made with, checked before the run begins. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import Config, InitNetwork, InitWct
from pipeline.core.errors import ConfigError, InputError
from pipeline.feedforward.network_file import NetworkHeader, read_network_header
from pipeline.feedforward.wct_file import WctHeader, is_wct_file, read_wct_header
from pipeline.plan import StagePlan


def check_start_file(config: Config, first: StagePlan) -> None:
    """Raise what the readers below raise. `first`: the run's first stage."""
    if isinstance(config.init, InitNetwork):
        start_network(config, config.init.apply, first)
    elif isinstance(config.init, InitWct):
        start_pairs(config, config.init.wct, first)


def start_network(config: Config, path: Path, first: StagePlan) -> NetworkHeader:
    """The network of `init: apply:path`. Raises InputError, ConfigError for a network that cannot be used here."""
    try:
        header = read_network_header(path, config.limits.max_weights_bytes)
    except InputError as error:
        raise InputError(f"init.apply: {error}") from error
    if header.spec.factor != 1:
        raise ConfigError(f"init.apply: {path} enlarges its input; name a network of a style.")
    if min(first.size) < (least := header.spec.least_side_px()):
        raise InputError(f"init.apply: {path} needs {least} px on each side. Choose a larger initial_size.")
    return header


def start_pairs(config: Config, path: Path, first: StagePlan) -> WctHeader:
    """The pairs of `init: wct:path`. Raises InputError for a file that cannot be used here."""
    try:
        if not is_wct_file(path):
            raise InputError(
                f"{path} has no encoder-decoder pairs. Name a file as for `pipeline apply --style`, or a network as "
                "apply:FILE."
            )
        header = read_wct_header(path, config.limits.max_weights_bytes)
    except InputError as error:
        raise InputError(f"init.wct: {error}") from error
    least = max(level.least_side_px for level in header.levels)
    if min(min(size) for size in (first.size, *first.style_sizes)) < least:
        raise InputError(
            f"init.wct: {path} needs {least} px on each side of content and styles. Choose a larger initial_size."
        )
    return header
