"""The `status` command: the state of a run, active or not. Takes no lock and writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import ConfigError
from pipeline.core.files import taken
from pipeline.core.text import stage_name
from pipeline.rundir import (
    Iteration,
    Journal,
    Manifest,
    Position,
    Record,
    StageDone,
    StagePrepared,
    as_json,
    journal_path,
    manifest_path,
    read_manifest,
    refuse_unknown_stage,
    running_owner,
    standing,
)


def status(work_dir: Path) -> dict[str, Any]:
    """The state of the run in `work_dir` as JSON-able data, while it runs and after.

    Raises ConfigError if there is no run, DamagedStateError if its manifest or journal is damaged.
    """
    manifest = manifest_of(work_dir)
    records, position = standing(Journal(journal_path(work_dir)))
    refuse_unknown_stage(work_dir, manifest, position)
    iterations = [record for record in records if isinstance(record, Iteration)]
    owner = running_owner(work_dir)
    finished = position.stage_done and position.stage == len(manifest.stages) - 1
    return {
        "work_dir": str(work_dir),
        "state": "running" if owner else "done" if finished and position.exported else "stopped",
        "pid": owner,
        "stage": position.stage,
        "stages": [
            {
                "stage": index,
                "height_px": stage.size[0],
                "width_px": stage.size[1],
                "max_iterations": _max_iterations(manifest, index),
                **_stage_state(index, records),
            }
            for index, stage in enumerate(manifest.stages)
        ],
        "iteration": position.iteration,
        "max_iterations": _max_iterations(manifest, position.stage),
        "last": _without_checksums(iterations[-1]) if iterations else None,
        "seconds": _seconds(iterations),
        "output": manifest.config.output,
        "exported": sorted(position.exported),
    }


def _max_iterations(manifest: Manifest, stage: int) -> int:
    # older manifests have only the config's value, which is that of stages without settings of their own
    recorded = manifest.stages[stage].max_iterations
    return manifest.config.optimizer.max_iterations if recorded is None else recorded


def _without_checksums(record: Record) -> dict[str, Any]:
    return {key: value for key, value in as_json(record).items() if key != "checksums"}


def _seconds(iterations: Sequence[Iteration]) -> float:
    return round(sum(sum(record.seconds.values()) for record in iterations), 3)


def _stage_state(stage: int, records: Sequence[Record]) -> dict[str, Any]:
    prepared = any(isinstance(record, StagePrepared) and record.stage == stage for record in records)
    done = next((record for record in records if isinstance(record, StageDone) and record.stage == stage), None)
    iterations = [record for record in records if isinstance(record, Iteration) and record.stage == stage]
    return {
        "state": "done" if done else "prepared" if prepared else "waiting",
        "iterations": len(iterations),
        "reason": done.reason if done else None,
        "seconds": _seconds(iterations),
    }


def choose_stage(work_dir: Path, position: Position, stage: int | None) -> int:
    """`stage`, or the newest if it is None. Raises ConfigError if the run has no canvas of that stage."""
    chosen = position.stage if stage is None else stage
    if chosen not in position.slots:
        ready = ", ".join(str(index + 1) for index in sorted(position.slots)) or "none yet"
        raise ConfigError(f"{work_dir}: {stage_name(chosen)} has no canvas; stages with one: {ready}.")
    return chosen


def manifest_of(work_dir: Path) -> Manifest:
    """The manifest of the run in `work_dir`. Raises ConfigError if there is no run."""
    if not taken(manifest_path(work_dir)):
        raise ConfigError(f"{work_dir}: there is no run here. Give the work_dir of one, or the config that began it.")
    return read_manifest(manifest_path(work_dir))
