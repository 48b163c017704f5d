"""What a run tells the world: typed events. The library emits them; only the CLI prints (see sinks in cli)."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """Root of all events."""

    def as_dict(self) -> dict[str, Any]:
        """The event as JSON-able data, with its kind under `event`."""
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Note(Event):
    """Something worth a line of its own."""

    message: str


@dataclass(frozen=True)
class StageStarted(Event):
    """A stage begins, or goes on at `iteration`."""

    stage: int
    stages: int
    height_px: int
    width_px: int
    tiles: int
    iteration: int
    max_iterations: int


@dataclass(frozen=True)
class WorkDone(Event):
    """`done` of `total` pieces of `what` (ingest, content pass, Gram pass, …) are finished."""

    stage: int
    what: str
    done: int
    total: int


@dataclass(frozen=True)
class IterationDone(Event):
    """An iteration is committed. Losses are those of the canvas before its update.

    `seconds`: of each pass. `busy`: thread seconds by kind of work since the last commit, and as `wall` all of them.
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
    """A stage ended: `reason` is max_iterations, stop_condition or converged."""

    stage: int
    iterations: int
    reason: str


@dataclass(frozen=True)
class RunDone(Event):
    """The picture is at `output`."""

    output: str
    seconds: float


@dataclass(frozen=True)
class PictureDone(Event):
    """One of the `pictures` of a preview is at `output`. `seconds` is None if it was there before.

    `settings`: what it varies, as key=value.
    """

    picture: int
    pictures: int
    settings: tuple[str, ...]
    output: str
    seconds: float | None


Sink = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """The sink of those who do not listen."""


def in_order(
    tell: Callable[[int, int], None], total: int, then: Callable[[int], None] = lambda done: None
) -> Callable[[], None]:
    """For tasks to call when they are done, on any thread: tells 1, 2, … of `total`, and then calls `then` with it.

    Counting and telling are one step. Else a thread held up between them would take a bar back, or leave it unfinished.
    """
    telling, numbers = threading.Lock(), itertools.count(1)

    def one_more() -> None:
        with telling:
            done = next(numbers)
            tell(done, total)
        then(done)

    return one_more
