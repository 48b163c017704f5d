"""Typed events of a run. The library emits them; only the command line prints them (cli/display.py)."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """Base class of all events."""

    def as_dict(self) -> dict[str, Any]:
        """The event as JSON-able data, with its class name under `event`."""
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Note(Event):
    """A message for the user."""

    message: str


@dataclass(frozen=True)
class StageStarted(Event):
    """A stage starts, or resumes at `iteration`."""

    stage: int
    stages: int
    height_px: int
    width_px: int
    tiles: int
    iteration: int
    max_iterations: int


@dataclass(frozen=True)
class WorkDone(Event):
    """`done` of `total` units of `what` (ingest, content pass, Gram pass, …) are finished."""

    stage: int
    what: str
    done: int
    total: int


@dataclass(frozen=True)
class IterationDone(Event):
    """An iteration is committed. The losses are those of the canvas before the update.

    `seconds`: duration of each pass. `busy`: thread seconds by kind of work since the last commit (see
    core/profiler.py), and the elapsed seconds as `wall`.
    """

    stage: int
    iteration: int
    max_iterations: int
    objective: float
    content_loss: float
    style_loss: float
    mean_abs_u: float
    max_abs_u: float
    alpha: float
    seconds: Mapping[str, float]
    busy: Mapping[str, float]
    eta_s: float | None


@dataclass(frozen=True)
class StageDone(Event):
    """A stage has ended. `reason` is max_iterations, stop_condition or converged."""

    stage: int
    iterations: int
    reason: str


@dataclass(frozen=True)
class RunDone(Event):
    """The output image has been written to `output`. The state that it no longer needs takes `state_bytes`."""

    output: str
    seconds: float
    work_dir: str
    state_bytes: int


@dataclass(frozen=True)
class PictureDone(Event):
    """Number `picture` of the `pictures` images of a preview is at `output`. `settings`: its varied keys, as key=value.

    `seconds` is None if an earlier preview rendered it.
    """

    picture: int
    pictures: int
    settings: tuple[str, ...]
    output: str
    seconds: float | None


@dataclass(frozen=True)
class QueuedRunStarted(Event):
    """Number `run` of the `runs` of a queue starts, or resumes."""

    run: int
    runs: int
    config: str


@dataclass(frozen=True)
class QueuedRunEnded(Event):
    """Number `run` of the `runs` of a queue has ended; `message` says why if `exit_code` is not 0."""

    run: int
    runs: int
    config: str
    exit_code: int
    message: str


@dataclass(frozen=True)
class TrainingStep(Event):
    """Number `step` of the `steps` of a training is done. The losses are means over its batch, before the step."""

    step: int
    steps: int
    objective: float
    content_loss: float
    style_loss: float
    eta_s: float


@dataclass(frozen=True)
class TrainingDone(Event):
    """The trained network has been written to `output`."""

    output: str
    seconds: float
    work_dir: str


Sink = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """A sink that discards events."""


def reporter(sink: Sink, stage: int, what: str) -> Callable[[int, int], None]:
    """Reports (done, total) of `what` to the sink."""
    return lambda done, total: sink(WorkDone(stage, what, done, total))


def in_order(report: Callable[[int, int], None], total: int) -> Callable[[], None]:
    """A callback for finished tasks, on any thread: calls report(1, total), report(2, total), …

    Counting and reporting are one atomic step. Otherwise a thread that is suspended between the two would move a
    progress bar backwards, or leave it unfinished.
    """
    lock, numbers = threading.Lock(), itertools.count(1)

    def finish_one() -> None:
        with lock:
            report(next(numbers), total)

    return finish_one
