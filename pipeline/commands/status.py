"""Looking at a run, and taking pictures out of it, without disturbing it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.fields import MAX_CHUNK_PX
from pipeline.config.sections import ExportConfig
from pipeline.core.errors import ConfigError, stop_check
from pipeline.core.events import Sink, WorkDone, ignore
from pipeline.core.image_formats import picture_kind
from pipeline.executors.threads import Engine
from pipeline.images.writer import check_output, refuse_unheeded
from pipeline.plan.memory import WORKERS
from pipeline.render import ingest
from pipeline.render.process import process_settings
from pipeline.rundir.journal import Journal, standing
from pipeline.rundir.lock import running_owner
from pipeline.rundir.manifest import content_kind, read_manifest
from pipeline.rundir.open import content_alpha, newest_canvas, refuse_unknown_stage
from pipeline.rundir.paths import refuse_links, refuse_missing_folder, refuse_own_state, taken
from pipeline.rundir.position import Position, position_of
from pipeline.rundir.records import Iteration, Manifest, Record, StageDone, StagePrepared, as_json
from pipeline.store import integrity
from pipeline.store.array import ChunkError, StageArray
from pipeline.store.layout import METADATA


def status(work_dir: Path) -> dict[str, Any]:
    """Where the run in `work_dir` stands, as JSON-able data; works while it runs and after.

    Raises ConfigError if there is no run, DamagedStateError if its records cannot be trusted.
    """
    manifest = _manifest_of(work_dir)
    records, position = standing(Journal(work_dir / "journal.jsonl"))
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
    kept = manifest.stages[stage].max_iterations
    return manifest.config.optimizer.max_iterations if kept is None else kept


def _without_checksums(record: Record) -> dict[str, Any]:
    return {key: value for key, value in as_json(record).items() if key != "checksums"}


def _seconds(iterations: Sequence[Iteration]) -> float:
    return round(sum(sum(record.seconds.values()) for record in iterations), 3)


def _stage_state(stage: int, records: Sequence[Record]) -> dict[str, Any]:
    own = [one for one in records if isinstance(one, StagePrepared | Iteration | StageDone) and one.stage == stage]
    done = next((record for record in own if isinstance(record, StageDone)), None)
    iterations = [record for record in own if isinstance(record, Iteration)]
    return {
        "state": "done" if done else "prepared" if own else "waiting",
        "iterations": len(iterations),
        "reason": done.reason if done else None,
        "seconds": _seconds(iterations),
    }


@process_settings()
def export(
    work_dir: Path,
    output: Path,
    *,
    stage: int | None = None,
    options: ExportConfig | None = None,
    force: bool = False,
    sink: Sink = ignore,
    stop: threading.Event | None = None,
) -> Path:
    """Write the canvas of any stage (default: the newest) as a picture, at any time; gives its path.

    Raises ConfigError if there is no such stage, the format cannot hold it or passes over an option, `output` exists
    without `force`, or its folder does not.
    """
    options = options or ExportConfig()
    refuse_own_state(output, work_dir)
    refuse_missing_folder(output)
    if taken(output) and not force:
        raise ConfigError(f"output {output}: exists and would be lost. Choose another name, or give --force.")
    manifest = _manifest_of(work_dir)
    journal = Journal(work_dir / "journal.jsonl")
    seen_bytes = journal.size_bytes()
    _, position = standing(journal)
    chosen = _choose_stage(work_dir, position, stage)
    refuse_links(work_dir)
    kind = picture_kind(output, options.bits, options.compression, content_kind(manifest))
    refuse_unheeded(output, options.changed, kind.alpha)
    options = options.model_copy(update={"bits": kind.bits})
    canvas = newest_canvas(work_dir, position, chosen)
    alpha = content_alpha(work_dir, position, chosen) if kind.alpha else None
    _check_arrays(canvas, alpha, manifest)
    height, width, _channels = canvas.shape
    check_output(output, width, height, kind.bits, options.compression)

    check_stop = stop_check(stop)

    def check() -> None:
        nonlocal seen_bytes
        check_stop()
        # several times a second: a long journal is read only when it has grown
        if not finished_stage(position, chosen) and (now_bytes := journal.size_bytes()) != seen_bytes:
            seen_bytes = now_bytes
            _refuse_overtaken(work_dir, position, position_of(journal.read()))

    def told(what: str) -> Callable[[int, int], None]:
        return lambda done, total: sink(WorkDone(chosen, what, done, total))

    try:
        with Engine(WORKERS, stop) as engine:
            integrity.require_intact([canvas] if alpha is None else [canvas, alpha], engine, told("check"))
        ingest.export_canvas(canvas, alpha, output, options, check, told("export"))
    except ChunkError:
        check()  # a run that has gone on is no damage
        raise
    return output


def _check_arrays(canvas: StageArray, alpha: StageArray | None, manifest: Manifest) -> None:
    """The arrays are a run's: their own metadata may claim any size, of which a chunk is taken at once."""
    sizes = [(*stage.size, 3) for stage in manifest.stages]
    for array, shapes in ((canvas, sizes), (alpha, [(*canvas.shape[:2], 1)])):
        if array is None:
            continue
        if array.shape not in shapes or array.chunk_px > MAX_CHUNK_PX or array.dtype.kind not in "fu":
            told = f"tells of {array.shape} {array.dtype}, which no stage has"
            raise ChunkError(array.path / METADATA, "changed", told)


def finished_stage(position: Position, stage: int) -> bool:
    """Whether no iteration will write to the stage's canvas any more."""
    return stage < position.stage or position.stage_done


def _refuse_overtaken(work_dir: Path, before: Position, now: Position) -> None:
    """The slot that was newest is the next iteration's target: what is read of it later is another canvas."""
    if (now.stage, now.iteration) != (before.stage, before.iteration):
        raise ConfigError(
            f"{work_dir}: the run finished an iteration while its canvas was being read, and the picture would mix "
            "two of them. Export a finished stage with --stage, or stop the run first."
        )


def _choose_stage(work_dir: Path, position: Position, stage: int | None) -> int:
    chosen = position.stage if stage is None else stage
    if chosen not in position.slots:
        ready = ", ".join(str(index) for index in sorted(position.slots)) or "none yet"
        raise ConfigError(f"{work_dir}: stage {chosen} has no canvas; stages with one: {ready}.")
    return chosen


def _manifest_of(work_dir: Path) -> Manifest:
    if not taken(work_dir / "manifest.json"):
        raise ConfigError(f"{work_dir}: there is no run here. Give the work_dir of one, or the config that began it.")
    return read_manifest(work_dir / "manifest.json")
