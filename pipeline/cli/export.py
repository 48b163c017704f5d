"""The `export` command: writes the canvas of a stage as an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import click
from click.core import ParameterSource

import pipeline
from pipeline.cli.arguments import (
    parse_compression,
    parse_profile,
    with_run,
    with_stage,
)
from pipeline.cli.working import check_run_options, config_of_run, raise_if_stopped, working
from pipeline.core.image_formats import (
    INTENTS,
    LEVELS,
    METADATA_KEPT,
    PURPOSES,
    TIFF_COMPRESSIONS,
)
from pipeline.core.lengths import MAX_DPI, MIN_DPI


@click.command()
@with_run
@click.option("-o", "--output", required=True, help="Image file to write, or a folder with / at its end: a gallery.")
@with_stage("Stage to export, from 1; default the newest.")
@click.option(
    "--bits",
    type=click.Choice(["auto", "8", "16"]),
    default="auto",
    show_default=True,
    help="Bits per channel; auto: 16 if content and format have 16.",
)
@click.option(
    "--compression",
    callback=parse_compression,
    metavar="NAME",
    default="deflate",
    show_default=True,
    help=f"Compression of a TIFF: {', '.join(TIFF_COMPRESSIONS)}.",
)
@click.option("--quality", type=click.IntRange(1, 100), metavar="1-100", default=95, help="JPEG quality; default 95.")
@click.option(
    "--dpi",
    type=click.FloatRange(MIN_DPI, MAX_DPI),
    metavar="N",
    help="Resolution of the print in px per inch; default: that of the run.",
)
@click.option(
    "--profile",
    metavar="NAME|FILE",
    default="srgb",
    callback=parse_profile,
    help="srgb, adobe-rgb, display-p3, content, or FILE.icc.",
)
@click.option("--intent", type=click.Choice(INTENTS), default="relative", help="Intent of a printer's profile.")
@click.option(
    "--metadata",
    type=click.Choice(METADATA_KEPT),
    default="keep",
    show_default=True,
    help="Artist, copyright, captions and keywords of the content, with its place, or nothing.",
)
@click.option("--pyramid/--no-pyramid", default=True, show_default=True, help="Smaller levels in a TIFF, for viewers.")
@click.option(
    "--for",
    type=click.Choice(PURPOSES),
    default="viewer",
    show_default=True,
    help="Reader of a TIFF; print: strips without levels, for layout programs.",
)
@click.option(
    "--levels",
    type=click.Choice(LEVELS),
    default="pages",
    show_default=True,
    help="Place of a TIFF's levels; subifds: for Bio-Formats (QuPath).",
)
@click.option("--title", metavar="TEXT", help="Of a picture in a gallery; default the name of its image.")
@click.option("--credit", metavar="TEXT", help="Of a picture in a gallery: who made it, and from what.")
@click.option("--add", is_flag=True, help="Add the picture to a gallery that exists.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.pass_context
def export(
    context: click.Context,
    /,
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

    With / at its end the output is a gallery: a folder with a page and tiles, for any web host (docs/viewer.md).
    """
    bits = options["bits"] if options["bits"] == "auto" else int(options["bits"])
    check_run_options(config_path, run_dir)
    _refuse_export_keys(overrides)
    # An option that was given explicitly must not be ignored, even if its value is the default.
    given = [name for name in options if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    with working("auto") as (sink, stop):
        from pipeline.config import ExportConfig
        from pipeline.images import refuse_unheeded
        from pipeline.rundir import named_inputs, refuse_inputs

        export_config = ExportConfig.model_validate({**options, "bits": bits})
        config = config_of_run(config_path, overrides) if config_path is not None else None
        work_dir, write = config.work_dir if config is not None else cast(Path, run_dir), pipeline.export
        image = Path(output)
        common: dict[str, Any] = {"stage": stage, "sink": sink, "stop": stop}
        if output.endswith("/"):
            if given or force:
                raise click.UsageError("a gallery has its own options: omit those of image files, and --force")
            common |= {"title": title, "credit": credit or "", "add": add}
            click.echo(pipeline.gallery(work_dir, image.absolute(), **common))
            return
        if title is not None or credit is not None or add:
            raise click.UsageError("--title, --credit and --add are for a gallery: give its folder with / at its end")
        if config is not None:  # its files may be at other places than when the run began
            refuse_inputs(image, named_inputs(config))
        refuse_unheeded(image, {name: options[name] for name in given})
        raise_if_stopped(stop)
        path = write(work_dir, image.absolute(), options=export_config, force=force, **common)
    click.echo(path)


def _refuse_export_keys(overrides: tuple[str, ...]) -> None:
    """Raise UsageError for keys that would change nothing: this command has options for what it writes."""
    for setting in overrides:
        if setting.partition(".")[0].partition("=")[0].strip() == "export":
            raise click.UsageError(f"--set {setting}: give options such as --dpi, or use pipeline run --set {setting}")
