"""The command line: maps arguments to calls of the package, and exceptions to exit codes.

Slow modules are imported inside the commands that need them, after the signal handlers are installed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import click

import pipeline
from pipeline.cli.apply import apply
from pipeline.cli.arguments import (
    as_json_option,
    parse_points,
    parse_rect,
    parse_share,
    with_config,
    with_log_format,
    with_run,
    with_stage,
)
from pipeline.cli.cluster import scheduler, worker
from pipeline.cli.ending import OnFinish, report_bug, report_error
from pipeline.cli.export import export
from pipeline.cli.init import init
from pipeline.cli.run import run
from pipeline.cli.signals import discard_unwritable_stdout, tolerant_stderr
from pipeline.cli.train import train
from pipeline.cli.view import checked_config, in_own_session, serve, with_view_options
from pipeline.cli.working import (
    EXIT_CODES,
    any_config,
    check_run_options,
    chosen_run,
    config_of_run,
    echo_json,
    raise_if_stopped,
    working,
)
from pipeline.core.errors import DamagedStateError, PipelineError, Stopped, StorageError, storage_error
from pipeline.core.image_formats import MAX_SIDE_PX, PREVIEW_PX
from pipeline.core.lengths import PAPERS_MM

if TYPE_CHECKING:
    from pipeline.core.tiling import Rect


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


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pipeline")
def cli() -> None:
    """Neural style transfer at print size: exact tiles, bounded memory, resumable."""


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
    from pipeline.commands.start import outlook_and_plan
    from pipeline.config import is_apply_file

    if is_apply_file(config_path):
        if with_time:
            raise click.UsageError("--time is for runs")
        _plan_apply(config_path, overrides, as_json)
        return
    config = pipeline.load_config(config_path, overrides, check_inputs=True)
    run, planned = outlook_and_plan(config, pipeline.plan(config))
    expected = None
    if with_time:
        with working("auto") as (sink, stop):
            expected = pipeline.measured_time(config, planned, watts=watts, sink=sink, stop=stop)
    if as_json:
        echo_json({**planned.as_dict(), "run": run, "time": expected and expected.as_dict()})
    else:
        reports.print_plan(config, planned, expected, run)


def _plan_apply(config_path: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    from pipeline.cli import reports
    from pipeline.commands.apply import apply_outlook, apply_plan
    from pipeline.config import load_apply_config

    config = load_apply_config(config_path, overrides, check_inputs=True)
    planned = apply_plan(config)
    what = apply_outlook(config, planned)
    if as_json:
        echo_json({**planned.plan.as_dict(), "run": what})
    else:
        reports.print_plan(config, planned.plan, None, what)


@cli.command(epilog=EXIT_CODES)
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
@click.option(
    "--page",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Also write the images as a web page, in a new folder.",
)
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
    page: Path | None,
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
    if page is not None and (rect is not None or paper is not None):
        raise click.UsageError("--page shows the images of a grid: omit --crop and --proof")
    if paper is None and (dpi is not None or points):
        raise click.UsageError("--dpi and --at require --proof")
    with working(log_format) as (sink, stop):
        output = output and output.absolute()
        if rect is not None:
            config, crop = config_of_run(config_path, overrides), pipeline.crop
            raise_if_stopped(stop)
            click.echo(crop(config, pipeline.CropSpec(rect, stage, output, force), sink=sink, stop=stop))
            return
        if paper is not None:
            config, proof = config_of_run(config_path, overrides), pipeline.proof
            raise_if_stopped(stop)
            spec = pipeline.ProofSpec(points, paper, 150 if dpi is None else dpi, output, force)
            click.echo(proof(config, spec, sink=sink, stop=stop))
            return
        render = pipeline.preview
        raise_if_stopped(stop)
        shown_px = PREVIEW_PX if size_px is None else size_px
        grid = pipeline.GridSpec(vary, overrides, shown_px, output, page and page.absolute(), force)
        result = render(config_path, grid, sink=sink, stop=stop)
    if as_json:
        echo_json(result.as_dict())
    else:
        from pipeline.cli import reports

        reports.print_preview(result)


@cli.command()
@with_run
@as_json_option
def status(config_path: Path | None, overrides: tuple[str, ...], run_dir: Path | None, as_json: bool) -> None:
    """Show the progress of a run, while it works and afterwards."""
    from pipeline.cli import reports

    progress = pipeline.status(chosen_run(config_path, overrides, run_dir))
    if as_json:
        echo_json(progress)
    else:
        reports.print_status(progress)


@cli.command(epilog=EXIT_CODES)
@with_run
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option("--force", is_flag=True, help="Also if the run has no image yet, so that its work is lost.")
def clean(config_path: Path | None, overrides: tuple[str, ...], run_dir: Path | None, **options: bool) -> None:
    """Delete the state of a finished run. Its image, config and journal stay."""
    from pipeline.cli.cleaning import clean_if_wanted

    check_run_options(config_path, run_dir, overrides)
    config = None if config_path is None else any_config(config_path, overrides)
    work_dir = cast(Path, run_dir) if config is None else config.work_dir
    clean_if_wanted(work_dir, None if config is None else config.output, working, **options)


@cli.command()
@with_run
@with_view_options
def view(config_path: Path | None, overrides: tuple[str, ...], run_dir: Path | None, **options: Any) -> None:
    """Show a run in a browser: before it starts, while it paints, and afterwards.

    Only reads the run directory. Prints the page's address, which has a token, and works until Ctrl-C. From another
    machine, use `ssh -L`. With --host beyond this machine, the page is sent unencrypted to everybody with the token.
    """
    check_run_options(config_path, run_dir, overrides)
    config = checked_config(config_path, overrides, allow_crops=options["allow_crops"])
    in_own_session()
    with working("plain") as (sink, stop):
        serve(config, config_path, overrides, run_dir, sink, stop, **options)


@cli.command(epilog=EXIT_CODES)
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
    check_run_options(config_path, run_dir, overrides)
    with working("auto") as (sink, stop):
        from pipeline.cli import reports

        config = any_config(config_path, overrides) if config_path is not None else None
        work_dir, check = config.work_dir if config is not None else cast(Path, run_dir), pipeline.verify
        chosen = {} if seed is None else {"seed": seed}
        sample = None if share is None else pipeline.SampleSpec(share, **chosen)
        raise_if_stopped(stop)
        report = check(work_dir, config=config, sample=sample, repair=repair, sink=sink, stop=stop)
    if as_json:
        echo_json(report.as_dict())
    else:
        reports.print_verify(report)
    if not report.clean:
        raise DamagedStateError(reports.verdict(report))


@cli.command()
def doctor() -> None:
    """Show versions, devices, memory and disk space."""
    from pipeline.cli import reports

    reports.print_doctor()


for command in (run, apply, train, export, init, scheduler, worker):
    cli.add_command(command)
