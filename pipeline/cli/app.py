"""The command line: arguments to calls, exceptions to exit codes.

What is slow to import is imported by the commands that need it, once they listen to signals.
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
from pipeline.cli.arguments import parse_rect, parse_share, with_config, with_log_format, with_run
from pipeline.cli.signals import drop_unwritable_stdout, steadfast_stderr, stop_on_signals
from pipeline.core import profiler
from pipeline.core.errors import ConfigError, DamagedStateError, PipelineError, Stopped, StorageError, storage_error
from pipeline.core.events import Note, Sink
from pipeline.core.image_formats import COMPRESSIONS, MAX_SIDE_PX, PREVIEW_PX

if TYPE_CHECKING:
    from pipeline.core.tiling import Rect

_EXIT_CODES = """\b
Exit codes: 0 done, 1 a bug of ours, 2 wrong usage, 3 wrong config or input,
4 another run works there, 5 a disk that is full, read-only or failing,
6 damaged state, 75 stopped by Ctrl-C, TERM or HUP (the same command goes on),
130/143/129 aborted by a second one."""


def main() -> NoReturn:
    """Entry point: run a command and exit with its code (see errors.py)."""
    with steadfast_stderr():
        try:
            cli.main(standalone_mode=False)
            code = 0
        except click.exceptions.Exit as stop:
            code = stop.exit_code
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):  # of a caller that has Python's own handler
            code = _tell(Stopped())
        except PipelineError as error:
            code = _tell(error)
        except OSError as error:
            told = storage_error("standard output", error)
            code = _tell(told) if isinstance(told, StorageError) else _tell_bug()
        except Exception:  # the last place where a bug can be told from a user's mistake
            code = _tell_bug()
        drop_unwritable_stdout()
    sys.exit(code)


def _tell(error: PipelineError) -> int:
    from pipeline.core.text import printable

    word = "stopped" if isinstance(error, Stopped) else "error"
    text = printable(str(error))
    gap = "\n" if "\n" in text else " "  # several problems, each on a line of its own
    click.echo(f"pipeline: {word}:{gap}{text}", err=True)
    return error.exit_code


def _tell_bug() -> int:
    traceback.print_exc()
    click.echo("pipeline: this is a bug of ours. Your run is safe: the same command goes on.", err=True)
    return 1


@contextmanager
def _working(log_format: str) -> Iterator[tuple[Sink, threading.Event]]:
    """The sink and the stop flag of a command that takes its time, the imports at its beginning included."""
    from pipeline.cli.display import make_sink

    sink = make_sink(log_format)
    with (
        stop_on_signals(sink, sink.farewell) as stop,
        sink,
    ):  # the terminal is changed only while signals are listened to
        if sys.stderr.isatty():  # somebody waits; in a log, what is refused stays one line
            sink(Note("starting"))
        yield sink, stop


def _raise_if_stopped(stop: threading.Event) -> None:
    """Raise Stopped if a signal came during the imports."""
    if stop.is_set():
        raise Stopped()


def _one_of(config_path: Path | None, run_dir: Path | None) -> None:
    if (config_path is None) == (run_dir is None):
        raise click.UsageError("give either --config or --run")


def _work_dir(config_path: Path | None, overrides: tuple[str, ...], run_dir: Path | None) -> Path:
    _one_of(config_path, run_dir)
    return run_dir if run_dir is not None else pipeline.load_config(cast(Path, config_path), overrides).work_dir


@click.group(epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pipeline")
def cli() -> None:
    """Neural style transfer at print size: exact tiles, resumable, in bounded memory."""


@cli.command(epilog=_EXIT_CODES)
@with_config(required=True)
@click.option("--force", is_flag=True, help="Overwrite an output that this run did not make.")
@with_log_format
@click.option(
    "--profile",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="Write a timeline of all threads there (Chrome trace), and tell how busy they were.",
)
def run(config_path: Path, overrides: tuple[str, ...], force: bool, log_format: str, profile: Path | None) -> None:
    """Render the picture of a config, or go on where it stopped."""
    with _working(log_format) as (sink, stop):
        from pipeline.cli.display import with_profile

        config, work = pipeline.load_config(config_path, overrides), pipeline.run  # which imports it
        _raise_if_stopped(stop)
        with profiler.recording(profile):
            work(config, force=force, sink=with_profile(sink) if profile else sink, stop=stop)


@cli.command()
@with_config(required=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(config_path: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show stages, tiles, memory, disk and work of a run, without rendering."""
    config = pipeline.load_config(config_path, overrides)
    planned = pipeline.plan(config)
    if as_json:
        click.echo(json.dumps(planned.as_dict(), indent=2))
    else:
        from pipeline.cli import reports

        reports.print_plan(config, planned)


@cli.command(epilog=_EXIT_CODES)
@with_config(required=True)
@click.option(
    "--vary",
    multiple=True,
    metavar="KEY=V1,V2",
    help="Values to compare, such as initial_size=384,512; several make a grid.",
)
@click.option(
    "--size",
    "size_px",
    type=click.IntRange(32, MAX_SIDE_PX),
    metavar="PX",
    help=f"Long side of each picture as shown; default {PREVIEW_PX}, at most the run's own.",
)
@click.option(
    "--crop",
    "rect",
    callback=parse_rect,
    metavar="X,Y,W,H",
    help="Render this part at full resolution, in px of the finished picture, from the last finished stage of the run.",
)
@click.option("--stage", type=int, help="With --crop: up to which stage; default the last.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The picture; default beside the config's output."
)
@click.option("--force", is_flag=True, help="Overwrite a picture that no preview of this config made.")
@with_log_format
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
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
    """Render a config, or a grid of variations of it, at low resolution onto one contact sheet.

    A preview is the run up to --size: keys in px mean what they mean in the run, and no picture is rendered below the
    largest initial_size. Detail finer than its pixels is not there. Pictures that are rendered are not rendered again.

    --crop shows that detail in a part of the picture, once the run has finished a stage: with the whole picture's Gram
    matrices, so that what one sees is what the run will do there.
    """
    if rect is not None and (vary or size_px is not None or as_json):
        raise click.UsageError("--crop is at full resolution, of one config: leave out --vary, --size and --json")
    if rect is None and stage is not None:
        raise click.UsageError("--stage goes with --crop: give --size for the grid")
    with _working(log_format) as (sink, stop):
        told: dict[str, Any] = {"output": output and output.absolute(), "force": force, "sink": sink, "stop": stop}
        if rect is not None:
            config, crop = pipeline.load_config(config_path, overrides), pipeline.crop
            _raise_if_stopped(stop)
            click.echo(crop(config, rect, stage=stage, **told))
            return
        work, size = pipeline.preview, PREVIEW_PX if size_px is None else size_px
        _raise_if_stopped(stop)
        found = work(config_path, vary=vary, overrides=overrides, size_px=size, **told)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
    else:
        from pipeline.cli import reports

        reports.print_preview(found)


@cli.command()
@with_run
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(config_path: Path | None, overrides: tuple[str, ...], run_dir: Path | None, as_json: bool) -> None:
    """Show where a run stands; works while it runs and after."""
    found = pipeline.status(_work_dir(config_path, overrides, run_dir))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        from pipeline.cli import reports

        reports.print_status(found)


@cli.command(epilog=_EXIT_CODES)
@with_run
@click.option("--sample", "share", callback=parse_share, metavar="5%", help="Read only this share of the chunks.")
@click.option("--seed", type=click.IntRange(0), help="Choose the same sample again.")
@click.option("--repair", is_flag=True, help="Mend what can be mended, and say what is lost.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(
    config_path: Path | None,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    share: float | None,
    seed: int | None,
    repair: bool,
    as_json: bool,
) -> None:
    """Find every changed, missing or foreign file of a run that stands still; nothing is written without --repair.

    Ends with 0 if nothing is damaged (any more), else with 6.
    """
    if repair and share is not None:
        raise click.UsageError("--repair looks at everything: leave out --sample")
    _one_of(config_path, run_dir)
    with _working("auto") as (sink, stop):
        from pipeline.cli import reports

        config = pipeline.load_config(config_path, overrides) if config_path is not None else None
        work_dir, work = config.work_dir if config is not None else cast(Path, run_dir), pipeline.verify
        _raise_if_stopped(stop)
        found = work(work_dir, config=config, share=share, seed=seed, repair=repair, sink=sink, stop=stop)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
    else:
        reports.print_verify(found)
    if not found.clean:
        raise DamagedStateError(reports.verdict(found))


@cli.command()
@with_run
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The picture to write.")
@click.option("--stage", type=int, help="Which stage; default the newest.")
@click.option(
    "--bits",
    type=click.Choice(["auto", "8", "16"]),
    default="auto",
    show_default=True,
    help="Of a channel; auto is 16 where content and format have them, else 8.",
)
@click.option("--compression", type=click.Choice(COMPRESSIONS), default="deflate", show_default=True, help="Of a TIFF.")
@click.option("--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="Of JPEG.")
@click.option("--pyramid/--no-pyramid", default=True, show_default=True, help="Smaller levels in a TIFF, for viewers.")
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
    """Write the canvas of any stage as a picture, at any time."""
    bits = options["bits"] if options["bits"] == "auto" else int(options["bits"])
    _one_of(config_path, run_dir)
    # what was asked for, even if it is the default
    given = [name for name in options if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    with _working("auto") as (sink, stop):
        from pipeline.config.sections import ExportConfig
        from pipeline.images.output_check import refuse_unheeded

        export_config = ExportConfig.model_validate({**options, "bits": bits})
        work_dir, work = _work_dir(config_path, overrides, run_dir), pipeline.export
        refuse_unheeded(output, {name: options[name] for name in given})
        _raise_if_stopped(stop)
        path = work(work_dir, output.absolute(), stage=stage, options=export_config, force=force, sink=sink, stop=stop)
    click.echo(path)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path), default="pipeline.yaml")
def init(path: Path) -> None:
    """Write a commented config to PATH (default pipeline.yaml; - for stdout)."""
    from pipeline.config.template import template

    text = template()
    if str(path) == "-":
        click.echo(text, nl=False)
        return
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{path}: exists, and would be lost. Choose another name.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}). Choose another place.") from error
    click.echo(f"{path}: now set content, styles and output in it, then: pipeline run --config {path}")


@cli.command()
def doctor() -> None:
    """Show versions, devices, memory and disk."""
    from pipeline.cli import reports

    reports.print_doctor()
