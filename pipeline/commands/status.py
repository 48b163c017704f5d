"""The `status` command: the state of a run, active or not. Takes no lock and writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core.errors import ConfigError
from pipeline.core.files import taken
from pipeline.core.text import stage_name
from pipeline.rundir import (
    Iteration,
    Journal,
    Manifest,
    Pass,
    Position,
    Record,
    StageDone,
    StagePrepared,
    as_json,
    journal_path,
    manifest_path,
    max_iterations,
    read_manifest,
    refuse_unknown_stage,
    running_owner,
    stages_of,
    standing,
    state_bytes,
)
from pipeline.store import CONTENT, result_name


def status(work_dir: Path) -> dict[str, Any]:
    """The state of the run in `work_dir` as JSON-able data, while it runs and after.

    Raises ConfigError if there is no run, DamagedStateError if its manifest or journal is damaged.
    """
    manifest = manifest_of(work_dir)
    records, position = standing(Journal(journal_path(work_dir)))
    refuse_unknown_stage(work_dir, manifest, position)
    iterations = [record for record in records if isinstance(record, Iteration | Pass)]
    owner, stages = running_owner(work_dir), stages_of(manifest, position)
    written = position.newest_export.values()
    finished = position.stage_done and position.stage == len(stages) - 1 and any(written) and all(written)
    left = 0.0 if finished else _left_s(iterations, owner is not None)
    return {
        "work_dir": str(work_dir),
        "command": manifest.command,
        "state": "running" if owner else "done" if finished else "stopped",
        "pid": owner,
        "stage": position.stage,
        "stages": [
            {
                "stage": index,
                "height_px": stage.size[0],
                "width_px": stage.size[1],
                "max_iterations": max_iterations(manifest, stage),
                **_stage_state(index, records),
            }
            for index, stage in enumerate(stages)
        ],
        "iteration": position.iteration,
        "max_iterations": max_iterations(manifest, stages[position.stage]),
        "last": _without_checksums(iterations[-1]) if iterations else None,
        "seconds": _seconds(iterations),
        "percent": _percent(iterations, left),
        "run_left_s": left,
        "state_bytes": state_bytes(work_dir),
        "cleaned": position.cleaned,
        "output": manifest.config.output,
        "exported": sorted(position.exported),
    }


def _left_s(iterations: Sequence[Iteration | Pass], is_running: bool) -> float | None:
    """Seconds to the end of the run, by the estimate of its last iteration; None: there was none."""
    if not iterations or (left := iterations[-1].remaining_s) is None:
        return None
    return max(0.0, left - _age_s(iterations[-1])) if is_running else left


def _age_s(record: Record) -> float:
    """Seconds since a record was committed; 0 if its time is no time, as a stranger's may be."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(record.time)).total_seconds()
    except (ValueError, TypeError):
        return 0.0


def _percent(iterations: Sequence[Iteration | Pass], left_s: float | None) -> float | None:
    """The share of the run's time that is over."""
    if left_s is None:
        return None if iterations else 0.0
    spent = sum(record.busy.get("wall", 0.0) for record in iterations)
    return round(100 * spent / (spent + left_s), 1) if spent + left_s else 100.0


def _without_checksums(record: Record) -> dict[str, Any]:
    return {key: value for key, value in as_json(record).items() if key not in ("checksums", "mean", "variance")}


def _seconds(iterations: Sequence[Iteration | Pass]) -> float:
    return round(sum(sum(record.seconds.values()) for record in iterations), 3)


def _stage_state(stage: int, records: Sequence[Record]) -> dict[str, Any]:
    prepared = any(isinstance(record, StagePrepared) and record.stage == stage for record in records)
    done = next((record for record in records if isinstance(record, StageDone) and record.stage == stage), None)
    iterations = [record for record in records if isinstance(record, Iteration | Pass) and record.stage == stage]
    return {
        "state": "done" if done else "prepared" if prepared else "waiting",
        "iterations": len(iterations),
        "reason": done.reason if done else None,
        "seconds": _seconds(iterations),
    }


def refuse_cleaned(work_dir: Path, position: Position) -> None:
    """Raise ConfigError if the state of the run was deleted."""
    if position.cleaned:
        raise ConfigError(
            f"{work_dir}: the state of this run was deleted with `pipeline clean`, so there is no canvas any more. To "
            "render again, which takes as long as the first time, delete this folder or choose another work_dir."
        )


def choose_stage(work_dir: Path, position: Position, stage: int | None) -> int:
    """`stage`, or the newest if it is None. Raises ConfigError if the run has no canvas of that stage."""
    refuse_cleaned(work_dir, position)
    chosen = position.stage if stage is None else stage
    if chosen not in position.slots:
        ready = ", ".join(str(index + 1) for index in sorted(position.slots)) or "none yet"
        raise ConfigError(f"{work_dir}: {stage_name(chosen)} has no canvas; stages with one: {ready}.")
    if result_name(position.slots[chosen], position.checksums[chosen]) == CONTENT:
        raise ConfigError(f"{work_dir}: the picture is written by the last pass, which is not done. Resume it first.")
    return chosen


def manifest_of(work_dir: Path) -> Manifest:
    """The manifest of the run in `work_dir`. Raises ConfigError if there is no run."""
    if not taken(manifest_path(work_dir)):
        raise ConfigError(f"{work_dir}: there is no run here. Give the work_dir of one, or the config that began it.")
    return read_manifest(manifest_path(work_dir))
