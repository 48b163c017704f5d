"""How a command ends: messages of failures, on stderr, and the command of `--on-finish`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import traceback
from dataclasses import dataclass

import click

from pipeline.core.errors import PipelineError, Stopped
from pipeline.core.text import printable


@dataclass
class OnFinish:
    """The command for the shell at the end of a run or a queue, if one was given."""

    command: str | None = None

    def __call__(self, code: int) -> None:
        """Run the command with the exit code in PIPELINE_EXIT_CODE, unless the run was stopped: it is not finished."""
        if self.command is None or code == Stopped.exit_code:
            return
        environment = {**os.environ, "PIPELINE_EXIT_CODE": str(code)}
        ended = subprocess.run(self.command, shell=True, check=False, env=environment)
        if ended.returncode:
            click.echo(f"pipeline: the command of --on-finish ended with {ended.returncode}", err=True)


def report_error(error: PipelineError) -> int:
    """Print an error; returns its exit code."""
    text = printable(str(error))
    separator = "\n" if "\n" in text else " "  # several errors get a line each
    label = "" if isinstance(error, Stopped) else f" error:{separator}"
    click.echo(_wrapped(f"pipeline:{label or ' '}{text}"), err=True)
    return error.exit_code


def _wrapped(text: str) -> str:
    """`text` in lines that break between words on a terminal; paths stay whole, and logs have a line per message."""
    if not sys.stderr.isatty():
        return text
    columns = shutil.get_terminal_size().columns
    lines = (textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False) for line in text.splitlines())
    return "\n".join(lines)


def report_bug() -> int:
    """Print the traceback of the exception that is being handled; returns the exit code."""
    traceback.print_exc()
    click.echo("pipeline: this is a bug in pipeline. The run is safe: the same command resumes it.", err=True)
    return 1
