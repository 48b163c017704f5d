"""The `view` command's options, and the browser that it opens."""

from __future__ import annotations

import contextlib
import ctypes
import html
import os
import signal
import sys
import tempfile
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import psutil

import pipeline
from pipeline.cli.arguments import with_options
from pipeline.cli.working import any_config
from pipeline.core.events import Sink

if TYPE_CHECKING:
    from pipeline.config import AnyConfig

_NICE = 10
_AUTOGROUP = Path("/proc/self/autogroup")
_PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that the child gets when its parent dies

# The options of `view` beside those that select the run.
with_view_options = with_options(
    click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="Address to listen at; default 127.0.0.1."),
    click.option("--port", type=click.IntRange(0, 65535), default=0, metavar="N", help="Port; default any free one."),
    click.option(
        "--token",
        envvar="PIPELINE_VIEW_TOKEN",
        metavar="TEXT",
        help="Token in the address; default a new one. Set PIPELINE_VIEW_TOKEN instead to hide it from `ps`.",
    ),
    click.option("--open", "open_browser", is_flag=True, help="Open the page in a browser."),
    click.option("--allow-crops", is_flag=True, help="The page may render crops (needs --config)."),
)


def checked_config(config_path: Path | None, overrides: tuple[str, ...], *, allow_crops: bool) -> AnyConfig | None:
    """The config of the run, if it is given. Raises UsageError if the page could not render crops of it."""
    if allow_crops and config_path is None:
        raise click.UsageError("--allow-crops needs --config")
    config = any_config(config_path, overrides) if config_path is not None else None
    if allow_crops and not isinstance(config, pipeline.Config):
        raise click.UsageError("--allow-crops is for runs: `pipeline preview --crop` renders no part of this picture")
    return config


def serve(
    config: AnyConfig | None,
    config_path: Path | None,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    sink: Sink,
    stop: threading.Event,
    *,
    open_browser: bool,
    **options: Any,
) -> None:
    """Serve the page of the run, and print its address, until `stop` is set."""
    from pipeline.viewer import ViewerOptions  # noqa: PLC0415 - slow

    given = ["-c", str(config_path.absolute())] if config_path and isinstance(config, pipeline.Config) else []
    given += [part for setting in overrides for part in ("--set", setting)]
    work_dir = config.work_dir if config is not None else cast(Path, run_dir).absolute()
    _be_quiet()
    with contextlib.ExitStack() as stack:

        def ready(address: str) -> None:
            click.echo(address)
            sys.stdout.flush()
            if open_browser:
                stack.callback(_opened(address).unlink, missing_ok=True)

        chosen = ViewerOptions(config_options=given, **options)
        if not stop.is_set():
            pipeline.view(work_dir, config=config, options=chosen, on_ready=ready, sink=sink, stop=stop)


def in_own_session() -> None:
    """Go on in a child process that has a session of its own, while this one passes signals on and ends with it.

    Linux divides the processor among sessions first (autogroup, see sched(7)): the priority of a process counts within
    its session only, and a viewer in another terminal would take as much as the run. A session can be given a low
    priority as a whole, but that of the terminal is not ours.
    """
    if not _AUTOGROUP.exists():
        return
    ours = os.getpid()
    child = os.fork()  # before the slow imports, which start threads
    if child == 0:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != ours:
            os._exit(128 + signal.SIGKILL)
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda received, _: os.kill(child, received))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def _be_quiet() -> None:
    """Give way to the run: a low priority for the processor, the lowest for the disk, where the system has one.

    Beside a run that leaves no processor idle, nice 10 has a tenth of one. Nice 19 has a seventieth, with
    which a viewer on a loaded machine did not begin to serve within two minutes.
    """
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    with contextlib.suppress(OSError):
        if os.getsid(0) == os.getpid():
            _AUTOGROUP.write_text(f"{_NICE}", encoding="ascii")
    with contextlib.suppress(psutil.Error, OSError, AttributeError):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


def _opened(address: str) -> Path:
    """Open a file that leads to the page. On a command line, other users of the machine would see the token."""
    descriptor, name = tempfile.mkstemp(prefix="pipeline-view-", suffix=".html")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        quoted = html.escape(address, quote=True)
        file.write(
            f'<!doctype html><meta http-equiv="refresh" content="0; url={quoted}"><a href="{quoted}">The page</a>'
        )
    webbrowser.open(Path(name).as_uri())
    return Path(name)
