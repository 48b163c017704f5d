"""The `run` command: renders one image, or a queue of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import pipeline
from pipeline.cli.arguments import with_config, with_log_format
from pipeline.cli.ending import OnFinish
from pipeline.cli.inputs import inputs_of, with_images
from pipeline.cli.working import EXIT_CODES, raise_if_stopped, working
from pipeline.core import profiler

if TYPE_CHECKING:
    from pipeline.config import Config


@click.command(epilog=EXIT_CODES)
@click.argument("files", nargs=-1, type=click.Path())
@with_config(required=False)
@with_images
@click.option("--force", is_flag=True, help="Overwrite the output even if this run did not write it.")
@click.option("--more-iterations", type=click.IntRange(1), metavar="N", help="Continue a finished run at its size.")
@click.option("--watts", type=click.FloatRange(0), metavar="W", help="Power of the working machine, for the energy.")
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
    watts: float | None,
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
    with working(log_format) as (sink, stop):
        from pipeline.cli.display import with_profile
        from pipeline.commands import one_line, queue

        render = pipeline.run  # the attribute access imports it
        raise_if_stopped(stop)
        log = with_profile(sink) if profile else sink
        options: dict[str, Any] = {"force": force, "watts": watts, "sink": log, "stop": stop}

        def render_one(config: Config) -> None:
            _refuse_profile(profile, config)
            with profiler.recording(profile):
                render(config, more_iterations=more_iterations, **options)

        if inputs.line is not None:
            with one_line.written_config(inputs.line, sink) as config:
                render_one(config)
        elif len(inputs.configs) == 1:
            render_one(pipeline.load_config(inputs.configs[0], overrides, check_inputs=True))
        else:
            with profiler.recording(profile):
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
