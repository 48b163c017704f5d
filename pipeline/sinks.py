"""Where a run's events go: a live display, plain lines, or JSON lines; all on stderr."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from pipeline.progress import Event, IterationDone, Note, PictureDone, RunDone, Sink, StageDone, StageStarted, WorkDone


def make_sink(log_format: str) -> AbstractContextManager[Sink]:
    """The sink for `--log-format`: live, plain, json, or auto (live on a terminal, else plain)."""
    if log_format == "json":
        return JsonSink()
    live = log_format == "live" or (log_format == "auto" and sys.stderr.isatty())
    return LiveSink() if live else PlainSink()


class PlainSink:
    """One line per event worth a line; for logs and pipes."""

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, event: Event) -> None:
        """Print the event's line, if it has one."""
        if (line := line_of(event)) is not None:
            print(line, file=sys.stderr, flush=True)


class JsonSink(PlainSink):
    """Every event as one JSON object per line."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Print the event as JSON; events come from several threads."""
        with self._lock:
            print(json.dumps(event.as_dict()), file=sys.stderr, flush=True)


class LiveSink:
    """Two live lines under the log: the stage's iterations, and the pass that is being computed."""

    def __init__(self) -> None:
        console = Console(stderr=True, markup=False, emoji=False)  # a path may hold what rich takes for markup
        columns = [TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), MofNCompleteColumn()]
        self._progress = Progress(*columns, console=console, expand=True, transient=True)
        self._iterations: TaskID | None = None
        self._work: TaskID | None = None

    def __enter__(self) -> Sink:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Move a bar, or print a line above the bars."""
        if isinstance(event, WorkDone):
            self._show_work(event)
        elif isinstance(event, IterationDone):
            eta = f", {duration(event.eta_s)} left" if event.eta_s is not None else ""
            losses = f"content {event.content_loss:.3g} style {event.style_loss:.3g}"
            text = f"stage {event.stage}: {losses} mean|u| {event.mean_abs_u:.3f}{eta}"
            if self._iterations is not None:
                self._progress.update(self._iterations, completed=event.iteration + 1, description=text)
        else:
            self._show_line(event)

    def _show_work(self, event: WorkDone) -> None:
        if self._work is None:
            self._work = self._progress.add_task("")
        self._progress.update(self._work, description=event.what, completed=event.done, total=event.total)

    def _show_line(self, event: Event) -> None:
        self._progress.console.print(line_of(event), highlight=False, soft_wrap=True)
        if isinstance(event, StageStarted):
            if self._iterations is not None:
                self._progress.remove_task(self._iterations)
            self._iterations = self._progress.add_task(
                f"stage {event.stage}", total=event.max_iterations, completed=event.iteration
            )


def line_of(event: Event) -> str | None:  # noqa: PLR0911 - one for each kind
    """The event as one line of text, or None if it is not worth one."""
    match event:
        case Note():
            return event.message
        case StageStarted():
            size, tiles = f"{event.width_px}×{event.height_px} px", count(event.tiles, "tile")
            return f"stage {event.stage} (0 to {event.stages - 1}): {size}, {tiles}"
        case IterationDone():
            seconds = " ".join(f"{name} {value:.1f}s" for name, value in event.seconds.items())
            eta = f", {duration(event.eta_s)} left" if event.eta_s is not None else ""
            return (
                f"  iteration {event.iteration + 1}/{event.max_iterations}: content {event.content_loss:.4g}, "
                f"style {event.style_loss:.4g}, mean|u| {event.mean_abs_u:.3f}; {seconds}{eta}"
            )
        case StageDone():
            return f"  stage {event.stage} ended after {count(event.iterations, 'iteration')}: {event.reason}"
        case PictureDone():
            what = " ".join(event.settings) or "as the config says"
            took = "rendered before" if event.seconds is None else duration(event.seconds)
            return f"picture {event.picture} of {event.pictures}: {what}: {took}"
        case RunDone():
            return f"done in {duration(event.seconds)}: {event.output}"
    return None


def with_profile(sink: Sink) -> Sink:
    """`sink`, told after every iteration how busy the threads were."""

    def told(event: Event) -> None:
        sink(event)
        if isinstance(event, IterationDone):
            sink(Note(f"  busy: {busy_line(event.busy)}"))

    return told


def busy_line(busy: Mapping[str, float]) -> str:
    """Thread seconds by kind of work, and how much of the time the device computed."""
    wall = busy["wall"]
    kinds = ", ".join(f"{kind} {busy.get(kind, 0.0):.1f}s" for kind in ("read", "write", "update", "wait"))
    computing = busy.get("compute", 0.0)
    return f"computing {computing:.1f}s of {wall:.1f}s ({computing / wall:.0%}); on other threads {kinds}"


def count(number: int, noun: str) -> str:
    """`number` with its noun, in the plural where it needs one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds for people: 42s, 3m 10s, 5h 02m, 2d 03h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02}h"
