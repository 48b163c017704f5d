"""The command line: maps arguments to calls of the package, and exceptions to exit codes.

Slow modules are imported inside the commands that need them, after the signal handlers are installed.
"""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import click
from click.core import ParameterSource

import pipeline
from pipeline.cli.arguments import as_json_option, parse_rect, parse_share, with_config, with_log_format, with_run
from pipeline.cli.signals import discard_unwritable_stdout, stop_on_signals, tolerant_stderr
from pipeline.cli.view import serve, with_view_options
from pipeline.core import profiler
from pipeline.core.errors import ConfigError, DamagedStateError, PipelineError, Stopped, StorageError, storage_error
from pipeline.core.events import Note, Sink
from pipeline.core.image_formats import COMPRESSIONS, MAX_SIDE_PX, PREVIEW_PX
from pipeline.core.presets import PRESETS

if TYPE_CHECKING:
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
        try:
            cli.main(standalone_mode=False)
            code = 0
        except click.exceptions.Exit as stop:
            code = stop.exit_code
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):  # if a caller kept Python's own SIGINT handler
            code = _report(Stopped())
        except PipelineError as error:
            code = _report(error)
        except OSError as error:
            converted = storage_error("standard output", error)
            code = _report(converted) if isinstance(converted, StorageError) else _report_bug()
        except Exception:  # anything else is a bug, not a mistake of the user
            code = _report_bug()
        discard_unwritable_stdout()
    sys.exit(code)


def _report(error: PipelineError) -> int:
    from pipeline.core.text import printable

    text = printable(str(error))
    separator = "\n" if "\n" in text else " "  # several errors get a line each
    label = "" if isinstance(error, Stopped) else f" error:{separator}"
    click.echo(f"pipeline:{label or ' '}{text}", err=True)
    return error.exit_code


def _report_bug() -> int:
    traceback.print_exc()
    click.echo("pipeline: this is a bug in pipeline. The run is safe: the same command resumes it.", err=True)
    return 1


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
@with_config(required=True)
@click.option("--force", is_flag=True, help="Overwrite the output even if this run did not write it.")
@with_log_format
@click.option(
    "--profile",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="Write a Chrome trace of the threads, and log how busy they are.",
)
def run(config_path: Path, overrides: tuple[str, ...], force: bool, log_format: str, profile: Path | None) -> None:
    """Render the output image of a config, or resume a run."""
    with _working(log_format) as (sink, stop):
        from pipeline.cli.display import with_profile

        config, render = pipeline.load_config(config_path, overrides), pipeline.run  # the attribute access imports it
        _raise_if_stopped(stop)
        with profiler.recording(profile):
            render(config, force=force, sink=with_profile(sink) if profile else sink, stop=stop)


@cli.command()
@with_config(required=True)
@as_json_option
def plan(config_path: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show the stages, tiles, memory, disk space and work of a run."""
    from pipeline.cli import reports

    config = pipeline.load_config(config_path, overrides)
    planned = pipeline.plan(config)
    if as_json:
        _echo_json(planned.as_dict())
    else:
        reports.print_plan(config, planned)


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
@click.option("--stage", type=int, metavar="N", help="With --crop: last stage to render; default the run's last.")
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
    """
    if rect is not None and (vary or size_px is not None or as_json):
        raise click.UsageError("--crop renders one config at full resolution: omit --vary, --size and --json")
    if rect is None and stage is not None:
        raise click.UsageError("--stage requires --crop; use --size for a grid")
    with _working(log_format) as (sink, stop):
        common: dict[str, Any] = {"output": output and output.absolute(), "force": force, "sink": sink, "stop": stop}
        if rect is not None:
            config, crop = pipeline.load_config(config_path, overrides), pipeline.crop
            _raise_if_stopped(stop)
            click.echo(crop(config, rect, stage=stage, **common))
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


@cli.command()
@with_run
@with_view_options
def view(config_path: Path | None, overrides: tuple[str, ...], run_dir: Path | None, **options: Any) -> None:
    """Show a run in a browser: before it starts, while it paints, and afterwards.

    Only reads the run directory. Prints the page's address, which has a token, and works until Ctrl-C. From another
    machine, use `ssh -L`. With --host beyond this machine, the page is sent unencrypted to everybody with the token.
    """
    _check_run_options(config_path, run_dir)
    with _working("plain") as (sink, stop):
        serve(config_path, overrides, run_dir, sink, stop, **options)


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
@click.option("-o", "--output", required=True, help="Image file to write, or a folder with / at its end: a gallery.")
@click.option("--stage", type=int, metavar="N", help="Stage to export; default the newest.")
@click.option(
    "--bits",
    type=click.Choice(["auto", "8", "16"]),
    default="auto",
    show_default=True,
    help="Bits per channel; auto: 16 if content and format have 16.",
)
@click.option(
    "--compression",
    type=click.Choice(COMPRESSIONS),
    metavar="NAME",
    default="deflate",
    show_default=True,
    help=f"Compression of a TIFF: {', '.join(COMPRESSIONS)}.",
)
@click.option("--quality", type=click.IntRange(1, 100), metavar="1-100", default=95, help="JPEG quality; default 95.")
@click.option("--pyramid/--no-pyramid", default=True, show_default=True, help="Smaller levels in a TIFF, for viewers.")
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
    force: bool,
    **options: Any,
) -> None:
    """Write the canvas of any stage as an image, at any time.

    With / at its end the output is a gallery: a folder with a page and tiles, for any web host (docs/viewer.md).
    """
    bits = options["bits"] if options["bits"] == "auto" else int(options["bits"])
    _check_run_options(config_path, run_dir)
    # An option that was given explicitly must not be ignored, even if its value is the default.
    given = [name for name in options if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    with _working("auto") as (sink, stop):
        from pipeline.config import ExportConfig
        from pipeline.images import refuse_unheeded

        export_config = ExportConfig.model_validate({**options, "bits": bits})
        work_dir, write = _work_dir(config_path, overrides, run_dir), pipeline.export
        image = Path(output)
        common: dict[str, Any] = {"stage": stage, "sink": sink, "stop": stop}
        if output.endswith("/"):
            if given or force:
                raise click.UsageError("a gallery is a new folder, with its own options: omit those of image files")
            click.echo(pipeline.gallery(work_dir, image.absolute(), **common))
            return
        refuse_unheeded(image, {name: options[name] for name in given})
        _raise_if_stopped(stop)
        path = write(work_dir, image.absolute(), options=export_config, force=force, **common)
    click.echo(path)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path), default="pipeline.yaml")
@click.option("--preset", type=click.Choice(PRESETS), help="Write the values of a preset in place of the defaults.")
def init(path: Path, preset: str | None) -> None:
    """Write a commented config to PATH.

    The default is pipeline.yaml; - is stdout.
    """
    from pipeline.config.template import template

    text = template(preset)
    if str(path) == "-":
        click.echo(text, nl=False)
        return
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{path}: exists and would be overwritten. Choose another name.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}). Choose another place.") from error
    click.echo(f"{path}: set content, styles and output in it, then run: pipeline run --config {path}")


@cli.command()
def doctor() -> None:
    """Show versions, devices, memory and disk space."""
    from pipeline.cli import reports

    reports.print_doctor()
