"""What the commands share: signals and progress while they work, the run that they are about, exit codes."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

import pipeline
from pipeline.cli.signals import stop_on_signals
from pipeline.core.errors import Stopped
from pipeline.core.events import Note, Sink

if TYPE_CHECKING:
    from pipeline.config import AnyConfig, Config

EXIT_CODES = """\b
Exit codes:
  0   done
  1   bug in this program
  2   wrong usage
  3   invalid config or input
  4   run directory locked by another process
  5   disk full, read-only or failing
  6   damaged state
  75  stopped by Ctrl-C, TERM or HUP, or its cluster is gone; resumable
  130, 143, 129  aborted by a second signal"""


@contextmanager
def working(log_format: str) -> Iterator[tuple[Sink, threading.Event]]:
    """The sink and the stop event of a command that takes a while, including its imports."""
    from pipeline.cli.display import make_sink

    sink = make_sink(log_format)
    # Signals first: the live display changes the terminal, and a signal must not leave it like that.
    with stop_on_signals(sink, sink.farewell) as stop, sink:
        if sys.stderr.isatty():  # not in logs, where a refused command should remain a single line
            sink(Note("starting"))
        yield sink, stop


def raise_if_stopped(stop: threading.Event) -> None:
    """Raise Stopped if a signal arrived during the imports."""
    if stop.is_set():
        raise Stopped()


def check_run_options(config_path: Path | None, run_dir: Path | None, overrides: tuple[str, ...]) -> None:
    """Raise UsageError unless one of the two is given, and --set only where there is a config to change."""
    if (config_path is None) == (run_dir is None):
        raise click.UsageError("give either --config or --run")
    if run_dir is not None and overrides:
        raise click.UsageError(f"--set {overrides[0]}: changes a value of a config: give --config")


def chosen_run(config_path: Path | None, overrides: tuple[str, ...], run_dir: Path | None) -> Path:
    """The run directory that a command is about. Raises UsageError, and ConfigError for the config."""
    check_run_options(config_path, run_dir, overrides)
    if run_dir is not None:
        return run_dir
    return any_config(cast(Path, config_path), overrides).work_dir


def any_config(path: Path, overrides: tuple[str, ...]) -> AnyConfig:
    """A config of `run` or of `apply`; otherwise as config_of_run."""
    from pipeline.commands.start import with_own_run
    from pipeline.config import is_apply_file

    load = pipeline.load_apply_config if is_apply_file(path) else pipeline.load_config
    return with_own_run(load(path, overrides))


def config_of_run(config_path: Path, overrides: tuple[str, ...]) -> Config:
    """A config, in the run directory of the run that wrote its output. Raises ConfigError."""
    from pipeline.commands.start import with_own_run

    return with_own_run(pipeline.load_config(config_path, overrides))


def echo_json(data: Any) -> None:
    """Print plain data as JSON."""
    click.echo(json.dumps(data, indent=2))
