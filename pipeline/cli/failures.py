"""Messages of commands that fail, on stderr."""

from __future__ import annotations

import shutil
import sys
import textwrap
import traceback

import click

from pipeline.core.errors import PipelineError, Stopped
from pipeline.core.text import printable


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
