"""Shows the events of a run on stderr: as a live display, as plain lines or as JSON lines."""

from __future__ import annotations

import json
import os
import shlex
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from pipeline.core.errors import Stopped
from pipeline.core.events import (
    Event,
    IterationDone,
    Note,
    PictureDone,
    QueuedRunEnded,
    QueuedRunStarted,
    RunDone,
    Sink,
    StageDone,
    StageStarted,
    TrainingDone,
    TrainingStep,
    WorkDone,
)
from pipeline.core.text import count, duration, end_text, printable, size_text, stage_name

# Columns to the right of the bars: the terminal echoes ^C at the cursor, after the last bar. Without free columns the
# echo would wrap to the next line, and rich would no longer erase the bars above it.
_FREE_COLUMNS = 6
# Longest time between two lines of progress in a log.
_MAX_QUIET_S = 300.0
# Minimum width of a bar with the gaps beside it.
_BAR_COLUMNS = 6


def make_sink(log_format: str) -> EventSink:
    """The sink for `--log-format`: live, plain, json, or auto: live if the terminal can move its cursor, else plain."""
    if log_format == "json":
        return JsonSink()
    moves_cursor = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    live = log_format == "live" or (log_format == "auto" and moves_cursor)
    return LiveSink() if live else PlainSink()


class EventSink(ABC):
    """Shows one event at a time; may be called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:  # noqa: B027 - only the live display overrides it
        """Restore the terminal."""

    def __call__(self, event: Event) -> None:
        """Show the event."""
        with self._lock:
            self._show(event)

    def farewell(self) -> bytes:
        """The bytes that restore the terminal if the process ends without `__exit__`."""
        return b""

    @abstractmethod
    def _show(self, event: Event) -> None:
        """Show the event; called by one thread at a time."""


class PlainSink(EventSink):
    """One line for each event of interest, for logs and pipes, and the progress of work that takes long.

    The first line of progress comes after `quiet_s` without another, each further one after twice as long, so that a
    preview is seen to work and the log of a day stays short.
    """

    def __init__(self, quiet_s: float = 10.0) -> None:
        super().__init__()
        self._first_s = self._quiet_s = quiet_s
        self._printed_s = time.monotonic()

    def _show(self, event: Event) -> None:
        line, waited_s = line_of(event), time.monotonic() - self._printed_s
        if isinstance(event, WorkDone) and waited_s >= self._quiet_s:
            line = f"  {event.what}: {100 * event.done // max(event.total, 1)} %"
            self._quiet_s = min(2 * self._quiet_s, _MAX_QUIET_S)
        elif isinstance(event, TrainingStep) and waited_s >= self._quiet_s:
            line = f"  step {event.step:,}/{event.steps:,}: {_training_text(event)}"
            self._quiet_s = min(2 * self._quiet_s, _MAX_QUIET_S)
        elif line is not None:
            self._quiet_s = self._first_s
        if line is not None:
            self._printed_s = time.monotonic()
            print(line, file=sys.stderr, flush=True)


class JsonSink(EventSink):
    """Every event as one JSON object per line."""

    def _show(self, event: Event) -> None:
        print(json.dumps(event.as_dict()), file=sys.stderr, flush=True)


class LiveSink(EventSink):
    """Progress bars below the log: the iterations of the stage, and one for each pass in progress."""

    def __init__(self) -> None:
        super().__init__()
        console = Console(stderr=True, markup=False, emoji=False)  # a path may look like markup of rich
        numbers = MofNCompleteColumn(table_column=Column(no_wrap=True))
        columns = [TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), numbers]
        self._progress = _Bars(*columns, console=console, expand=True, transient=True)
        self._iterations: TaskID | None = None
        self._stage = ""
        self._passes: dict[TaskID, WorkDone] = {}  # the last event of each pass bar

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        # With the lock: a note that another thread prints while rich erases the bars would move them out of its reach.
        with self._lock:
            self._progress.stop()

    def farewell(self) -> bytes:
        """Does not take the lock, because a thread that is blocked by the terminal may hold it."""
        if not self._progress.console.is_terminal:
            return b""
        lines = len(self._passes) + (self._iterations is not None)
        return b"\r\x1b[2K" + b"\x1b[A\x1b[2K" * (lines - 1) + b"\x1b[?25h"

    def _show(self, event: Event) -> None:
        """Update a bar, or print a line above the bars."""
        if isinstance(event, WorkDone):
            self._show_work(event)
        elif isinstance(event, TrainingStep):
            if self._iterations is None:
                self._iterations = self._progress.add_task("training", total=event.steps, completed=event.step)
            self._progress.update(self._iterations, completed=event.step, description=_training_text(event))
        elif isinstance(event, IterationDone):
            if self._iterations is not None:
                text = self._describe(event)
                self._progress.update(self._iterations, completed=event.iteration + 1, description=text)
        else:
            if (line := line_of(event)) is not None:
                self._progress.console.print(line, highlight=False, soft_wrap=True)
            if isinstance(event, StageStarted | StageDone | PictureDone | RunDone | TrainingDone | QueuedRunEnded):
                self._clear()
            if isinstance(event, StageStarted):
                self._stage = stage_name(event.stage, event.stages)
                self._iterations = self._progress.add_task(
                    self._stage, total=event.max_iterations, completed=event.iteration
                )

    def _describe(self, event: IterationDone) -> str:
        """The longest description that leaves room for the bar and its numbers."""
        stage, short = self._stage, stage_name(event.stage)
        losses = f"content {event.content_loss:.3g} style {event.style_loss:.3g}"
        update = f"mean|u| {event.mean_abs_u:.3f}"
        left = "" if event.eta_s is None else f"{duration(event.eta_s)} left"
        run, eta = (f", run {left}", f", {left}") if left else ("", "")
        long = f"{stage}: {losses} {update}{run}", f"{stage}: {update}{run}", f"{stage}{run}"
        texts = (*long, f"{short}{run}", f"{short}{eta}")
        numbers = f"{event.max_iterations}/{event.max_iterations}"
        width = self._progress.console.width - _FREE_COLUMNS - _BAR_COLUMNS - len(numbers)
        return next((text for text in texts if len(text) <= width), stage)

    def _show_work(self, event: WorkDone) -> None:
        """Update the bar of this pass, else reuse that of a finished pass, else add a bar."""
        passes = self._passes.items()
        bars = [bar for bar, last in passes if last.what == event.what]
        bars = bars or [bar for bar, last in passes if last.done >= last.total]
        if bars:
            bar = bars[0]
            self._progress.update(bar, description=event.what, completed=event.done, total=event.total)
        else:
            bar = self._progress.add_task(event.what, completed=event.done, total=event.total)
        self._passes[bar] = event

    def _clear(self) -> None:
        """Remove all bars."""
        for bar in self._progress.task_ids:
            self._progress.remove_task(bar)
        self._passes.clear()
        self._iterations = None


class _Bars(Progress):
    """Progress bars that leave the last columns of the terminal free."""

    def get_renderable(self) -> RenderableType:
        return _Narrower(super().get_renderable())


@dataclass(frozen=True)
class _Narrower:
    """Renders its content _FREE_COLUMNS narrower than the terminal."""

    content: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.content, options.update_width(max(1, options.max_width - _FREE_COLUMNS)))


def line_of(event: Event) -> str | None:  # noqa: PLR0911 - one per event type
    """The event as one line of text, or None for events without a line."""
    match event:
        case Note():
            return event.message
        case StageStarted():
            size, tiles = f"{event.width_px}×{event.height_px} px", count(event.tiles, "tile")
            return f"{stage_name(event.stage, event.stages)}: {size}, {tiles}"
        case IterationDone():
            seconds = " ".join(f"{name} {value:.1f}s" for name, value in event.seconds.items())
            eta = f", {duration(event.eta_s)} left in the run" if event.eta_s is not None else ""
            return (
                f"  iteration {event.iteration + 1}/{event.max_iterations}: content {event.content_loss:.4g}, "
                f"style {event.style_loss:.4g}, mean|u| {event.mean_abs_u:.3f}; {seconds}{eta}"
            )
        case StageDone():
            return f"  {stage_name(event.stage)}: {end_text(event.reason)} ({event.iterations:,})"
        case PictureDone():
            settings = " ".join(event.settings) or "the config unchanged"
            took = "reused" if event.seconds is None else duration(event.seconds)
            return f"image {event.picture} of {event.pictures}: {settings}: {took}"
        case RunDone():
            done = f"done in {duration(event.seconds)}: {event.output}"
            clean = f"`pipeline clean --run {shlex.quote(event.work_dir)}` frees {size_text(event.state_bytes)}"
            return f"the image needs no state any more: {clean}\n{done}" if event.state_bytes else done
        case TrainingDone():
            return f"done in {duration(event.seconds)}: {event.output}"
        case QueuedRunStarted():
            return f"run {event.run} of {event.runs}: {event.config}"
        case QueuedRunEnded() if event.exit_code not in (0, Stopped.exit_code):
            return f"run {event.run} of {event.runs} failed: {printable(event.message)}"
    return None


def _training_text(event: TrainingStep) -> str:
    losses = f"content {event.content_loss:.3g} style {event.style_loss:.3g}"
    return f"{losses}, {duration(event.eta_s)} left"


def with_profile(sink: Sink) -> Sink:
    """`sink`, with a note after every iteration that says how busy the threads were."""

    def profiled(event: Event) -> None:
        sink(event)
        if isinstance(event, IterationDone):
            sink(Note(f"  busy: {busy_line(event.busy)}"))

    return profiled


def busy_line(busy: Mapping[str, float]) -> str:
    """Thread seconds by kind of work, and the share of the elapsed time in which the device computed."""
    wall = busy["wall"]
    kinds = ", ".join(f"{kind} {busy.get(kind, 0.0):.1f}s" for kind in ("read", "write", "update", "wait"))
    computing = busy.get("compute", 0.0)
    return f"computing {computing:.1f}s of {wall:.1f}s ({computing / wall:.0%}); on other threads {kinds}"
