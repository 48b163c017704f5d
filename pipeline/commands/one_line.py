"""Runs without a config file of the user's: writes the config of the images and options beside the output."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import Config, OneLine, config_and_text, differing_keys, load_config
from pipeline.core.errors import ConfigError, PipelineError, Stopped
from pipeline.core.events import Note, Sink, ignore
from pipeline.core.files import path_fault
from pipeline.core.text import shown
from pipeline.rundir import refuse_missing_folder

_MAX_KEYS = 5


def config_path_of(output: Path) -> Path:
    """The config file that belongs to an output, beside it."""
    return output.with_suffix(".yaml")


@contextmanager
def written_config(line: OneLine, sink: Sink = ignore) -> Iterator[Config]:
    """The config of a command line, written beside its output during the block and after it.

    Says on `sink` where it is. The file of an earlier command with the same meaning is used again. If the block is
    refused before a run has begun, a new file is removed.

    Raises ConfigError if the file of that name has other settings.
    """
    config, text = config_and_text(line)
    refuse_missing_folder(config.output)
    path = config_path_of(config.output)
    created = not os.path.lexists(path)
    if created:
        write_new(path, text)
        sink(Note(f"settings written to {path}"))
    else:
        _refuse_other(path, config)
    try:
        yield config
    except PipelineError as error:
        if created and not isinstance(error, Stopped) and not config.work_dir.exists():
            path.unlink(missing_ok=True)
        raise


def config_to_write(path: Path | None, line: OneLine, full: bool) -> tuple[Path, str]:
    """The place and text of the config that `init` writes for a command line; by default beside the output."""
    folder = None if path is None else path.absolute().parent  # of stdout: the current one
    config, text = config_and_text(line, folder=folder, full=full)
    if path is None:
        refuse_missing_folder(config.output)
    return path or config_path_of(config.output), text


def _refuse_other(path: Path, config: Config) -> None:
    try:
        before = load_config(path)
    except ConfigError as error:
        text = f"{path}: this command writes its settings there, but the file cannot be used for it"
        raise ConfigError(f"{text}. Move it away, or choose another -o.\n{error}") from error
    if keys := differing_keys(before, config):
        more = f" and {len(keys) - _MAX_KEYS} more" if len(keys) > _MAX_KEYS else ""
        raise ConfigError(
            f"{path}: was written by an earlier command, or by you, and differs from this one in "
            f"{', '.join(keys[:_MAX_KEYS])}{more}. To resume with that file: pipeline run "
            f"{shlex.quote(str(path))}. To start another image, choose another -o, or move the file away."
        )


def write_new(path: Path, text: str) -> None:
    """Write a config file. Raises ConfigError if the name is taken, or cannot be written."""
    if fault := path_fault(path):
        raise ConfigError(f"{shown(str(path))}: {fault}. Choose another name.")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{path}: exists and would be overwritten. Choose another name.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}). Choose another place.") from error
