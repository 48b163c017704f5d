"""The `train` command: trains a style network, or one for super-resolution."""

from __future__ import annotations

from pathlib import Path

import click

import pipeline
from pipeline.cli.arguments import with_config, with_log_format
from pipeline.cli.working import EXIT_CODES, raise_if_stopped, working


@click.command(epilog=EXIT_CODES)
@with_config(required=True)
@click.option("--force", is_flag=True, help="Overwrite the output even if this training did not write it.")
@with_log_format
def train(config_path: Path, overrides: tuple[str, ...], force: bool, log_format: str) -> None:
    """Train a network that paints in a style, or enlarges, in one pass; or resume that.

    The config names the style images, a folder of photographs and the output, a .safetensors file for `apply`. Losses,
    sample pictures and the checkpoint are in a folder beside the output (docs/feedforward.md).
    """
    with working(log_format) as (sink, stop):
        work = pipeline.train  # the attribute access imports it
        raise_if_stopped(stop)
        work(pipeline.load_train_config(config_path, overrides), force=force, sink=sink, stop=stop)
