"""The `init` command: writes a config to start from."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from pipeline.cli.inputs import line_of, split_config, with_images


@click.command()
@click.argument("files", nargs=-1, type=click.Path())
@with_images
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="With images: a value to write.")
@click.option("--full", is_flag=True, help="Write every setting, not only those that people change.")
def init(files: tuple[str, ...], overrides: tuple[str, ...], full: bool, **images: str | None) -> None:
    """Write a commented config.

    FILES may name the config to write (default pipeline.yaml; - is stdout). With images, content first, it is filled
    in, and its default is beside the output:

    \b
      pipeline init content.jpg style.jpg -o out.tif
    """  # noqa: D301 - click's mark for a line that is not wrapped
    from pipeline.commands import one_line
    from pipeline.config.template import template

    path, names = split_config(files)
    if names:
        path, text = one_line.config_to_write(path, line_of(names, images, overrides), full)
    else:
        path, text = path or Path("pipeline.yaml"), template(images["preset"], full=full)
    if str(path) == "-":
        click.echo(text, nl=False)
        return
    one_line.write_new(path, text)
    todo = "look at it" if names else "set content, styles and output in it"
    click.echo(f"{path}: {todo}, then run: pipeline run {shlex.quote(str(path))}")
