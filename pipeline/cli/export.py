"""The `export` command: writes the canvas of a stage as an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import click

import pipeline
from pipeline.cli.arguments import parse_compression, parse_profile, with_run, with_stage
from pipeline.cli.working import any_config, check_run_options, raise_if_stopped, working
from pipeline.core.image_formats import INTENTS, LEVELS, METADATA_KEPT, PURPOSES, TIFF_COMPRESSIONS
from pipeline.core.lengths import MAX_DPI, MIN_DPI


@click.command()
@with_run
@click.option("-o", "--output", required=True, help="Image file to write, or a folder with / at its end: a gallery.")
@with_stage("Stage to export, from 1; default the newest.")
@click.option("--bits", type=click.Choice(["auto", "8", "16"]), help="Bits per channel.")
@click.option(
    "--compression",
    callback=parse_compression,
    metavar="NAME",
    help=f"Compression of a TIFF: {', '.join(TIFF_COMPRESSIONS)}.",
)
@click.option("--quality", type=click.IntRange(1, 100), metavar="1-100", help="JPEG quality.")
@click.option(
    "--dpi", type=click.FloatRange(MIN_DPI, MAX_DPI), metavar="N", help="Resolution of the print, px per inch."
)
@click.option(
    "--profile", metavar="NAME|FILE", callback=parse_profile, help="srgb, adobe-rgb, display-p3, content, or FILE.icc."
)
@click.option("--intent", type=click.Choice(INTENTS), help="Intent of a printer's profile.")
@click.option(
    "--metadata",
    type=click.Choice(METADATA_KEPT),
    help="Artist, copyright, captions and keywords of the content, with its place, or nothing.",
)
@click.option("--pyramid/--no-pyramid", default=None, help="Smaller levels in a TIFF, for viewers.")
@click.option(
    "--for", type=click.Choice(PURPOSES), help="Reader of a TIFF; print: strips without levels, for layout programs."
)
@click.option(
    "--levels", type=click.Choice(LEVELS), help="Place of a TIFF's levels; subifds: for Bio-Formats (QuPath)."
)
@click.option("--title", metavar="TEXT", help="Of a picture in a gallery; default the name of its image.")
@click.option("--credit", metavar="TEXT", help="Of a picture in a gallery: who made it, and from what.")
@click.option("--add", is_flag=True, help="Add the picture to a gallery that exists.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
def export(
    config_path: Path | None,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    output: str,
    stage: int | None,
    title: str | None,
    credit: str | None,
    add: bool,
    force: bool,
    **options: Any,
) -> None:
    """Write the canvas of any stage as an image, at any time.

    Options that are not given are those of the run: of the section `export` of its config, or with --run of the config
    that it began with. `--set export.KEY=VALUE` changes any of them, such as export.bleed=6mm, for this image only.

    With / at its end the output is a gallery: a folder with a page and tiles, for any web host (docs/viewer.md).
    """
    changes = {name: value for name, value in options.items() if value is not None}
    if changes.get("bits", "auto") != "auto":
        changes["bits"] = int(changes["bits"])
    settings = [setting for setting in overrides if _is_for_export(setting)]
    others = tuple(setting for setting in overrides if setting not in settings)
    check_run_options(config_path, run_dir, others)
    with working("auto") as (sink, stop):
        from pipeline.commands.export import own_options
        from pipeline.plan import whole_of
        from pipeline.rundir import named_inputs, refuse_inputs

        config = any_config(config_path, others) if config_path is not None else None
        work_dir, write = config.work_dir if config is not None else cast(Path, run_dir), pipeline.export
        image = Path(output)
        common: dict[str, Any] = {"stage": stage, "sink": sink, "stop": stop}
        if output.endswith("/"):
            if changes or settings or force:
                raise click.UsageError("a gallery has its own options: omit those of image files, and --force")
            common |= {"title": title, "credit": credit or "", "add": add}
            click.echo(pipeline.gallery(work_dir, image.absolute(), **common))
            return
        if title is not None or credit is not None or add:
            raise click.UsageError("--title, --credit and --add are for a gallery: give its folder with / at its end")
        if config is not None:  # its files may be at other places than when the run began
            refuse_inputs(image, named_inputs(config))
        wanted, given = own_options(work_dir, config, settings, changes)
        raise_if_stopped(stop)
        path = write(work_dir, image.absolute(), options=wanted, given=given, force=force, **common)
    for name in (path,) if path == image.absolute() else whole_of(path)[1]:  # one image, or all panels
        click.echo(name)


def _is_for_export(setting: str) -> bool:
    """Whether a --set is about the image that is written, and not about which run it is of."""
    return setting.partition("=")[0].strip().partition(".")[0] == "export"
