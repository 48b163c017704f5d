"""A queue of runs, one after another: one that fails does not keep the others from being rendered."""

from __future__ import annotations

import gc
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.commands.run import run
from pipeline.config import load_config
from pipeline.core.errors import PipelineError, Stopped
from pipeline.core.events import Note, QueuedRunEnded, QueuedRunStarted, Sink, ignore


@dataclass(frozen=True)
class QueuedRun:
    """How a run of a queue ended: the exit code that it would have alone, None if the queue stopped before it."""

    config: Path
    exit_code: int | None
    seconds: float = 0.0
    output: Path | None = None
    message: str = ""


def run_queue(
    paths: Sequence[Path],
    *,
    overrides: Sequence[str] = (),
    force: bool = False,
    watts: float | None = None,
    sink: Sink = ignore,
    stop: threading.Event | None = None,
) -> list[QueuedRun]:
    """Run every config of `paths`; the arguments are those of load_config and run.

    Faults of the configs are reported before the first run, but each config is read again at its turn, so that it can
    be corrected until then. A failed run is skipped, one that is stopped ends the queue; the same call resumes it.
    """
    for path in paths:
        try:
            load_config(path, overrides, check_inputs=True)
        except PipelineError as error:
            sink(Note(f"{path} will fail unless it is corrected before its turn:\n{error}"))
    ended: list[QueuedRun] = []
    for number, path in enumerate(paths, start=1):
        sink(QueuedRunStarted(number, len(paths), str(path)))
        one = _run_one(path, overrides, {"force": force, "watts": watts, "sink": sink, "stop": stop})
        sink(QueuedRunEnded(number, len(paths), str(path), one.exit_code or 0, one.message))
        ended.append(one)
        if one.exit_code == Stopped.exit_code:
            break
        gc.collect()  # the frames of an error refer to tensors
    return [*ended, *(QueuedRun(path, None) for path in paths[len(ended) :])]


def _run_one(path: Path, overrides: Sequence[str], options: dict[str, Any]) -> QueuedRun:
    started = time.monotonic()
    try:
        output = run(load_config(path, overrides, check_inputs=True), **options)
    except PipelineError as error:
        return QueuedRun(path, error.exit_code, time.monotonic() - started, message=str(error))
    except Exception:  # a bug in one run is no reason to leave the others
        return QueuedRun(path, PipelineError.exit_code, time.monotonic() - started, message=traceback.format_exc())
    return QueuedRun(path, 0, time.monotonic() - started, output)


def exit_code_of(runs: Sequence[QueuedRun]) -> int:
    """The exit code of a queue: 75 if it was stopped, else that of the first failed run, else 0."""
    codes = [one.exit_code for one in runs if one.exit_code]
    return Stopped.exit_code if Stopped.exit_code in codes else next(iter(codes), 0)
