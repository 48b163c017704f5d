"""The dialogue of `pipeline clean`: says what is deleted and what stays, asks, and deletes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import click

from pipeline.commands.clean import Cleaning, clean
from pipeline.core.events import Sink
from pipeline.core.text import size_text

Working = Callable[[str], AbstractContextManager[tuple[Sink, threading.Event]]]


def clean_if_wanted(
    work_dir: Path, output: Path | None, working: Working, *, yes: bool, dry_run: bool, force: bool
) -> None:
    """Delete the state of a run once the user has agreed. `working`: makes signals stop the deletion in order."""
    click.echo(_text(clean(work_dir, output=output, force=force, dry_run=True)))
    if dry_run:
        return
    if not yes:  # before the signal handlers: Ctrl-C ends the question
        if not sys.stdin.isatty():
            raise click.UsageError(
                "there is no terminal to ask on: give --yes, or --dry-run to see what would be deleted"
            )
        if not click.confirm("Delete it?"):
            click.echo("nothing was deleted")
            return
    with working("auto") as (_, stop):
        freed_bytes = clean(work_dir, output=output, force=force, stop=stop).freed_bytes
    click.echo(f"{size_text(freed_bytes)} freed")


def _text(cleaning: Cleaning) -> str:
    stays = ", ".join((*cleaning.images, "the config, the manifest and the journal"))
    lost = "" if cleaning.images else "\nThe run has no image: all its work is lost."
    return f"{cleaning.work_dir}: the state takes {size_text(cleaning.freed_bytes)}. {stays} stay.{lost}"
