"""The `apply` command: a picture through a trained network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.arguments import with_config, with_log_format
from pipeline.cli.working import EXIT_CODES, raise_if_stopped, working

if TYPE_CHECKING:
    from pipeline.config import ApplyConfig


@click.command(epilog=EXIT_CODES)
@click.argument("files", nargs=-1, type=click.Path())
@with_config(required=False)
@click.option("-o", "--output", metavar="FILE", help="With files: the image to write.")
@click.option("--size", metavar="SIZE", help="With files: long side, such as 30000 or 60cm.")
@click.option("--style", metavar="FILE", help="With files: the style, for a file of encoder-decoder pairs.")
@click.option("--force", is_flag=True, help="Overwrite the output even if this run did not write it.")
@with_log_format
def apply(
    files: tuple[str, ...],
    config_path: Path | None,
    overrides: tuple[str, ...],
    output: str | None,
    size: str | None,
    style: str | None,
    force: bool,
    log_format: str,
) -> None:
    """Put an image through a trained network, at any size, or resume that.

    FILES are the network and the image:

    \b
      pipeline apply net.safetensors photo.tif -o big.tif --size 30000
    """  # noqa: D301 - click's mark for a line that is not wrapped
    with working(log_format) as (sink, stop):
        from pipeline.commands.apply import apply as run_apply

        config = _config(files, config_path, {"output": output, "size": size, "style": style}, overrides)
        raise_if_stopped(stop)
        run_apply(config, force=force, sink=sink, stop=stop)


def _config(
    files: tuple[str, ...], config_path: Path | None, options: dict[str, str | None], overrides: tuple[str, ...]
) -> ApplyConfig:
    from pipeline.config import apply_config_of_line, load_apply_config
    from pipeline.rundir import refuse_missing_folder

    if config_path is not None:
        if files or any(options.values()):
            raise click.UsageError("give either --config, or files with -o, --size and --style")
        return load_apply_config(config_path, overrides, check_inputs=True)
    if len(files) != 2 or (output := options["output"]) is None:
        raise click.UsageError("give a network and an image, and the image to write with -o; or --config")
    config = apply_config_of_line(files[0], files[1], output, options["size"], overrides, options["style"])
    refuse_missing_folder(config.output)  # as `run` does with a line: a typing error would make a folder
    return config
