"""The command line: maps arguments to calls of the package, and exceptions to exit codes.

Slow modules are imported inside the commands that need them, after the signal handlers are installed.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import click
from click.core import ParameterSource

import pipeline
from pipeline.cli.arguments import (
    as_json_option,
    parse_compression,
    parse_points,
    parse_profile,
    parse_rect,
    parse_share,
    with_config,
    with_log_format,
    with_run,
    with_stage,
)
from pipeline.cli.failures import report_bug, report_error
from pipeline.cli.init import init
from pipeline.cli.inputs import inputs_of, with_images
from pipeline.cli.on_finish import OnFinish
from pipeline.cli.signals import discard_unwritable_stdout, stop_on_signals, tolerant_stderr
from pipeline.core import profiler
from pipeline.core.errors import DamagedStateError, PipelineError, Stopped, StorageError, storage_error
from pipeline.core.events import Note, Sink
from pipeline.core.image_formats import (
    INTENTS,
    LEVELS,
    MAX_SIDE_PX,
    METADATA_KEPT,
    PREVIEW_PX,
    PURPOSES,
    TIFF_COMPRESSIONS,
)
from pipeline.core.lengths import MAX_DPI, MIN_DPI
from pipeline.core.papers import PAPERS_MM

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.core.tiling import Rect

_EXIT_CODES = """\b
Exit codes:
  0   done
  1   bug in this program
  2   wrong usage
  3   invalid config or input
  4   run directory locked by another process
  5   disk full, read-only or failing
  6   damaged state
  75  stopped by Ctrl-C, TERM or HUP; resumable
  130, 143, 129  aborted by a second signal"""


def main() -> NoReturn:
    """Run a command and exit with its code (see errors.py)."""
    with tolerant_stderr():
        on_finish = OnFinish()
        try:
            code = cli.main(standalone_mode=False, obj=on_finish) or 0
        except click.exceptions.Exit as stop:
            code = stop.exit_code
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):  # if a caller kept Python's own SIGINT handler
            code = report_error(Stopped())
        except PipelineError as error:
            code = report_error(error)
        except OSError as error:
            converted = storage_error("standard output", error)
            code = report_error(converted) if isinstance(converted, StorageError) else report_bug()
        except Exception:  # anything else is a bug, not a mistake of the user
            code = report_bug()
        discard_unwritable_stdout()
        on_finish(code)
    sys.exit(code)


@contextmanager
def _working(log_format: str) -> Iterator[tuple[Sink, threading.Event]]:
    """The sink and the stop event of a command that takes a while, including its imports."""
    from pipeline.cli.display import make_sink

    sink = make_sink(log_format)
    # Signals first: the live display changes the terminal, and a signal must not leave it like that.
    with stop_on_signals(sink, sink.farewell) as stop, sink:
        if sys.stderr.isatty():  # not in logs, where a refused command should remain a single line
            sink(Note("starting"))
        yield sink, stop


def _raise_if_stopped(stop: threading.Event) -> None:
    """Raise Stopped if a signal arrived during the imports."""
    if stop.is_set():
        raise Stopped()


def _check_run_options(config_path: Path | None, run_dir: Path | None) -> None:
    if (config_path is None) == (run_dir is None):
        raise click.UsageError("give either --config or --run")


def _work_dir(config_path: Path | None, overrides: tuple[str, ...], run_dir: Path | None) -> Path:
    _check_run_options(config_path, run_dir)
    return run_dir if run_dir is not None else pipeline.load_config(cast(Path, config_path), overrides).work_dir


def _echo_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2))


@click.group(epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pipeline")
def cli() -> None:
    """Neural style transfer at print size: exact tiles, bounded memory, resumable."""


@cli.command(epilog=_EXIT_CODES)
@click.argument("files", nargs=-1, type=click.Path())
@with_config(required=False)
@with_images
@click.option("--force", is_flag=True, help="Overwrite the output even if this run did not write it.")
@click.option("--more-iterations", type=click.IntRange(1), metavar="N", help="Continue a finished run at its size.")
@click.option("--on-finish", metavar="CMD", help="Shell command to run at the end, unless stopped.")
@with_log_format
@click.option(
    "--profile",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="Write a Chrome trace of the threads, and log how busy they are.",
)
@click.pass_context
def run(
    context: click.Context,
    /,
    files: tuple[str, ...],
    config_path: Path | None,
    overrides: tuple[str, ...],
    force: bool,
    more_iterations: int | None,
    on_finish: str | None,
    log_format: str,
    profile: Path | None,
    **images: str | None,
) -> None:
    """Render the output image, or resume a run.

    FILES are a content image and its style images, each style with its weight if you like:

    \b
      pipeline run content.jpg style.jpg other.jpg:0.5 -o out.png

    The settings are written beside the output, as out.yaml. Or FILES are configs, or folders of configs: they are
    rendered one after another, and one that fails does not stop the rest.
    """  # noqa: D301 - click's mark for a line that is not wrapped
    inputs = inputs_of(files, config_path, images, overrides)
    if more_iterations is not None and len(inputs.configs) > 1:
        raise click.UsageError("--more-iterations is for one run, not for a queue")
    context.ensure_object(OnFinish).command = on_finish
    queued = []
    with _working(log_format) as (sink, stop):
        from pipeline.cli.display import with_profile
        from pipeline.commands import one_line, queue

        render = pipeline.run  # the attribute access imports it
        _raise_if_stopped(stop)
        options: dict[str, Any] = {"force": force, "sink": with_profile(sink) if profile else sink, "stop": stop}
        with profiler.recording(profile):
            if inputs.line is not None:
                with one_line.written_config(inputs.line, sink) as config:
                    _refuse_profile(profile, config)
                    render(config, more_iterations=more_iterations, **options)
            elif len(inputs.configs) == 1:
                config = pipeline.load_config(inputs.configs[0], overrides, check_inputs=True)
                _refuse_profile(profile, config)
                render(config, more_iterations=more_iterations, **options)
            else:
                queued = queue.run_queue(inputs.configs, overrides=overrides, **options)
    if queued:
        from pipeline.cli import reports

        reports.print_queue(queued)
        context.exit(queue.exit_code_of(queued))


def _refuse_profile(profile: Path | None, config: Config) -> None:
    """Raise ConfigError if the trace of --profile would replace a file of the config."""
    if profile is not None:
        from pipeline.rundir import named_inputs, refuse_inputs

        refuse_inputs(profile, [*named_inputs(config), ("output", config.output)])


@cli.command()
@with_config(required=True)
@click.option("--time", "with_time", is_flag=True, help="Measure for about 5 s how long the run takes on this machine.")
@click.option("--watts", type=click.FloatRange(0), metavar="W", help="With --time: power of the working machine.")
@as_json_option
def plan(config_path: Path, overrides: tuple[str, ...], with_time: bool, watts: float | None, as_json: bool) -> None:
    """Show the stages, tiles, memory, disk space and work of a run, and what `run` would do now."""
    if watts is not None and not with_time:
        raise click.UsageError("--watts is for --time")
    from pipeline.cli import reports

    config = pipeline.load_config(config_path, overrides, check_inputs=True)
    planned, expected = pipeline.plan(config), None
    if with_time:
        with _working("auto") as (sink, stop):
            expected = pipeline.measured_time(config, planned, watts=watts, sink=sink, stop=stop)
    run = pipeline.outlook(config, planned)
    if as_json:
        _echo_json({**planned.as_dict(), "run": run, "time": expected and expected.as_dict()})
    else:
        reports.print_plan(config, planned, expected, run)


@cli.command(epilog=_EXIT_CODES)
@with_config(required=True)
@click.option(
    "--vary", multiple=True, metavar="KEY=V1,V2", help="Values to compare: initial_size=384,512. Several make a grid."
)
@click.option(
    "--size",
    "size_px",
    type=click.IntRange(32, MAX_SIDE_PX),
    metavar="PX",
    help=f"Long side of each image; default {PREVIEW_PX}, at most that of the run.",
)
@click.option(
    "--crop", "rect", callback=parse_rect, metavar="X,Y,W,H", help="Render this part of the output in full resolution."
)
@with_stage("With --crop: last stage to render, from 1; default the run's last.")
@click.option("--proof", "paper", type=click.Choice(list(PAPERS_MM)), help="Make a sheet of paper to judge the print.")
@click.option("--dpi", type=float, metavar="N", help="With --proof: px per inch of the print; default 150.")
@click.option(
    "--at", "points", multiple=True, callback=parse_points, metavar="X,Y", help="With --proof: centre of a part, in px."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Image file; default beside the config's output.")
@click.option("--force", is_flag=True, help="Overwrite the file even if no preview of this config wrote it.")
@with_log_format
@as_json_option
def preview(
    config_path: Path,
    overrides: tuple[str, ...],
    vary: tuple[str, ...],
    size_px: int | None,
    rect: Rect | None,
    stage: int | None,
    paper: str | None,
    dpi: float | None,
    points: list[tuple[int, int]],
    output: Path | None,
    force: bool,
    log_format: str,
    as_json: bool,
) -> None:
    """Render a config, or variations of it, at low resolution.

    Writes each image, and a contact sheet of all. A preview is the run itself up to --size: keys in px mean the same as
    in the run, and no image is rendered below the largest initial_size. It does not show details that are finer than
    its pixels. Images that an earlier preview has rendered are reused.

    --crop (in px of the output) shows those details in a part of it, once the run has finished a stage. It starts from
    the last finished stage and uses the Gram matrices of the whole image, so the result is what the run will produce.

    --proof shows parts of the output as a print at --dpi will have them: a PDF or TIFF for paper, with rulers, colour
    patches and the settings. --at may be given several times. Parts that are not finished are rendered as with --crop.
    """
    if rect is not None and (vary or size_px is not None or as_json):
        raise click.UsageError("--crop renders one config at full resolution: omit --vary, --size and --json")
    if rect is None and stage is not None:
        raise click.UsageError("--stage requires --crop; use --size for a grid")
    if paper is not None and (rect is not None or vary or size_px is not None or as_json):
        raise click.UsageError("--proof makes one sheet: omit --crop, --vary, --size and --json")
    if paper is None and (dpi is not None or points):
        raise click.UsageError("--dpi and --at require --proof")
    with _working(log_format) as (sink, stop):
        common: dict[str, Any] = {"output": output and output.absolute(), "force": force, "sink": sink, "stop": stop}
        if rect is not None:
            config, crop = pipeline.load_config(config_path, overrides), pipeline.crop
            _raise_if_stopped(stop)
            click.echo(crop(config, rect, stage=stage, **common))
            return
        if paper is not None:
            config, proof = pipeline.load_config(config_path, overrides), pipeline.proof
            _raise_if_stopped(stop)
            click.echo(proof(config, points, paper=paper, dpi=150 if dpi is None else dpi, **common))
            return
        render, size = pipeline.preview, PREVIEW_PX if size_px is None else size_px
        _raise_if_stopped(stop)
        result = render(config_path, vary=vary, overrides=overrides, size_px=size, **common)
    if as_json:
        _echo_json(result.as_dict())
    else:
        from pipeline.cli import reports

        reports.print_preview(result)


@cli.command()
@with_run
@as_json_option
def status(config_path: Path | None, overrides: tuple[str, ...], run_dir: Path | None, as_json: bool) -> None:
    """Show the progress of a run, while it works and afterwards."""
    from pipeline.cli import reports

    progress = pipeline.status(_work_dir(config_path, overrides, run_dir))
    if as_json:
        _echo_json(progress)
    else:
        reports.print_status(progress)


@cli.command(epilog=_EXIT_CODES)
@with_run
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option("--force", is_flag=True, help="Also if the run has no image yet, so that its work is lost.")
def clean(config_path: Path | None, overrides: tuple[str, ...], run_dir: Path | None, **options: bool) -> None:
    """Delete the state of a finished run. Its image, config and journal stay."""
    from pipeline.cli.cleaning import clean_if_wanted

    _check_run_options(config_path, run_dir)
    config = None if config_path is None else pipeline.load_config(config_path, overrides)
    work_dir = cast(Path, run_dir) if config is None else config.work_dir
    clean_if_wanted(work_dir, None if config is None else config.output, _working, **options)


@cli.command(epilog=_EXIT_CODES)
@with_run
@click.option("--sample", "share", callback=parse_share, metavar="5%", help="Read only this share of the chunks.")
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Seed of the sample, to repeat it.")
@click.option("--repair", is_flag=True, help="Repair what can be repaired, and report what is lost.")
@as_json_option
def verify(
    config_path: Path | None,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    share: float | None,
    seed: int | None,
    repair: bool,
    as_json: bool,
) -> None:
    """Find the changed, missing and foreign files of a run.

    The run must not be in progress. Nothing is written without --repair. The exit code is 0 if no damage is left, else
    6.
    """
    if repair and share is not None:
        raise click.UsageError("--repair checks everything: omit --sample")
    _check_run_options(config_path, run_dir)
    with _working("auto") as (sink, stop):
        from pipeline.cli import reports

        config = pipeline.load_config(config_path, overrides) if config_path is not None else None
        work_dir, check = config.work_dir if config is not None else cast(Path, run_dir), pipeline.verify
        _raise_if_stopped(stop)
        report = check(work_dir, config=config, share=share, seed=seed, repair=repair, sink=sink, stop=stop)
    if as_json:
        _echo_json(report.as_dict())
    else:
        reports.print_verify(report)
    if not report.clean:
        raise DamagedStateError(reports.verdict(report))


@cli.command()
@with_run
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Image file to write.")
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
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.pass_context
def export(
    context: click.Context,
    /,
    config_path: Path | None,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    output: Path,
    stage: int | None,
    force: bool,
    **options: Any,
) -> None:
    """Write the canvas of any stage as an image, at any time."""
    bits = options["bits"] if options["bits"] == "auto" else int(options["bits"])
    _check_run_options(config_path, run_dir)
    # An option that was given explicitly must not be ignored, even if its value is the default.
    given = [name for name in options if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    with _working("auto") as (sink, stop):
        from pipeline.config import ExportConfig
        from pipeline.images import refuse_unheeded
        from pipeline.rundir import named_inputs, refuse_inputs

        export_config = ExportConfig.model_validate({**options, "bits": bits})
        config = pipeline.load_config(config_path, overrides) if config_path is not None else None
        work_dir, write = config.work_dir if config is not None else cast(Path, run_dir), pipeline.export
        if config is not None:  # its files may be at other places than when the run began
            refuse_inputs(output, named_inputs(config))
        refuse_unheeded(output, {name: options[name] for name in given})
        _raise_if_stopped(stop)
        path = write(work_dir, output.absolute(), stage=stage, options=export_config, force=force, sink=sink, stop=stop)
    click.echo(path)


cli.add_command(init)


@cli.command()
def doctor() -> None:
    """Show versions, devices, memory and disk space."""
    from pipeline.cli import reports

    reports.print_doctor()
