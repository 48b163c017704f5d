"""What the page shows besides pictures, as JSON: progress, curves, disk, memory and the log of events."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import psutil

from pipeline.core.text import end_text, stage_name
from pipeline.rundir import (
    Begun,
    CanvasLost,
    Exported,
    Iteration,
    Manifest,
    Position,
    Record,
    StageDone,
    StagePrepared,
    iterations_of,
    max_iterations,
)
from pipeline.rundir.records import Cleaned, RolledBack, SmallerTile, StageAdded
from pipeline.rundir.space import space_taken
from pipeline.viewer.snapshot import Snapshot

_POINTS = 300  # of a curve: more than a screen shows
_LOG_LINES = 60
_DISK_EVERY_S, _DISK_REST = 60.0, 1000.0  # counting takes at most a thousandth of the time


class Usage:
    """Disk space and memory of a run; the disk space is counted now and then, since a large store has many files."""

    def __init__(self, work_dir: Path) -> None:
        self._work_dir = work_dir
        self._used_bytes: int | None = None
        self._due_s = 0.0

    def is_due(self) -> bool:
        """Whether it is time to count again."""
        return time.monotonic() >= self._due_s

    def count(self) -> bool:
        """Count the disk space of the run directory. Returns whether it has changed."""
        before, began = self._used_bytes, time.monotonic()
        with contextlib.suppress(OSError):  # a run deletes files meanwhile
            self._used_bytes = space_taken(self._work_dir).bytes if self._work_dir.is_dir() else None
        ended = time.monotonic()
        self._due_s = ended + max(_DISK_EVERY_S, _DISK_REST * (ended - began))
        return self._used_bytes != before

    def measured(self, owner: int | None) -> dict[str, int | None]:
        """Bytes: `disk_used`, `disk_free`, and `memory` of the run's processes; None where there is none."""
        if not self._work_dir.is_dir():
            return {"disk_used": None, "disk_free": None, "memory": None}
        free_bytes = None
        with contextlib.suppress(OSError):
            free_bytes = shutil.disk_usage(self._work_dir).free
        return {"disk_used": self._used_bytes, "disk_free": free_bytes, "memory": _memory_bytes(owner)}


def _memory_bytes(owner: int | None) -> int | None:
    if owner is None:
        return None
    try:
        process = psutil.Process(owner)
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
    except psutil.Error:
        return None


def run_state(snapshot: Snapshot) -> dict[str, Any]:
    """The run's phase, stages with their curves, estimate of the remaining time, and log."""
    manifest, position = snapshot.manifest, snapshot.position
    if manifest is None:
        return {"phase": "waiting", "problem": snapshot.problem, "pid": snapshot.owner, "stages": [], "log": []}
    height, width = manifest.stages[-1].size
    return {
        "phase": phase(snapshot),
        "problem": snapshot.problem,
        "pid": snapshot.owner,
        "width": width,
        "height": height,
        "stage": position.stage,
        "iteration": position.iteration,
        "eta_s": remaining_s(snapshot),
        "stages": [_stage(snapshot, index) for index in range(len(manifest.stages))],
        "log": _log([*snapshot.records, *snapshot.repairs]),
    }


def phase(snapshot: Snapshot) -> str:
    """One of waiting, damaged, running, done, stopped."""
    manifest, position = snapshot.manifest, snapshot.position
    if manifest is None:
        return "waiting"
    if snapshot.problem:
        return "damaged"
    if snapshot.owner is not None:
        return "running"
    return "done" if _finished(manifest, position) else "stopped"


def _finished(manifest: Manifest, position: Position) -> bool:
    return position.stage_done and position.stage == len(manifest.stages) - 1


def _stage(snapshot: Snapshot, stage: int) -> dict[str, Any]:
    assert snapshot.manifest is not None
    records = iterations_of(snapshot.records, stage)
    height, width = snapshot.manifest.stages[stage].size
    done = next((one for one in snapshot.records if isinstance(one, StageDone) and one.stage == stage), None)
    prepared = any(isinstance(one, StagePrepared) and one.stage == stage for one in snapshot.records)
    return {
        "height": height,
        "width": width,
        "state": "done" if done else "painting" if prepared else "waiting",
        "reason": done.reason if done else "",
        "iterations": len(records),
        "max_iterations": max_iterations(snapshot.manifest, snapshot.manifest.stages[stage]),
        "seconds": round(sum(_seconds(one) for one in records), 3),
        "curves": _curves(records),
    }


def _seconds(record: Iteration) -> float:
    return sum(record.seconds.values())


def _curves(records: Sequence[Iteration]) -> dict[str, Any]:
    step = max(1, len(records) // _POINTS)
    chosen = [*records[::-step]][::-1]  # from the end, so that the newest is among them
    layers = sorted({name for record in chosen for name in record.layer_losses})
    passes = sorted({name for record in chosen for name in record.seconds})
    return {
        "iteration": [one.iteration for one in chosen],
        "objective": [one.objective for one in chosen],
        "content loss": [one.content_loss for one in chosen],
        "style loss": [one.style_loss for one in chosen],
        "mean |u|": [one.mean_abs_u for one in chosen],
        "layers": {name: [one.layer_losses.get(name) for one in chosen] for name in layers},
        "passes": {name: [one.seconds.get(name) for one in chosen] for name in passes},
    }


def remaining_s(snapshot: Snapshot) -> float | None:
    """What the run itself expected after its newest iteration; None if it could not tell, or is done."""
    if snapshot.manifest is None or _finished(snapshot.manifest, snapshot.position):
        return None
    measured = iterations_of(snapshot.records)
    return measured[-1].remaining_s if measured else None


def _log(records: Sequence[Record]) -> list[dict[str, str]]:
    lines = [{"time": record.time, "text": text} for record in records if (text := _line(record))]
    lines.sort(key=itemgetter("time"))  # stable: records of one second stay in their order
    return lines[-_LOG_LINES:]


def _line(record: Record) -> str:  # noqa: C901, PLR0911 - one for each kind
    match record:
        case Begun():
            return "the run began"
        case StagePrepared():
            return f"{stage_name(record.stage)} prepared"
        case Iteration():
            text = f"{stage_name(record.stage)}, iteration {record.iteration + 1}: objective {record.objective:.4g}"
            return f"{text}, {_seconds(record):.3g} s"
        case StageDone():
            return f"{stage_name(record.stage)}: {end_text(record.reason)}"
        case StageAdded():
            return f"{record.iterations} more iterations were asked for"
        case Cleaned():
            return "the state was deleted"
        case SmallerTile():
            return f"tiles of {record.tile_px} px from here on: larger ones did not fit in memory"
        case Exported():
            return f"image written: {record.output}"
        case RolledBack():
            return "a repair rolled the run back"
        case CanvasLost():
            return f"the canvas of {stage_name(record.stage)} was given up by a repair"
    return ""


def print_dpi(manifest: Manifest | None) -> float | None:
    """The resolution that the run's config sets for the print, or None."""
    section = manifest.config.model_dump().get("export") if manifest else None
    value = section.get("dpi") if isinstance(section, dict) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None
