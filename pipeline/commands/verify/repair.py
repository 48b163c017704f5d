"""Repair of a damaged run: rolls back to the newest intact iteration or stage, from where the next `run` recomputes.

Every step is printed before it is taken: `verify` lists what `--repair` would do. The journal is only appended to; the
damaged part of a journal, a store without a journal and unknown files are set aside, not deleted.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import store
from pipeline.commands.verify.scan import ScanResult
from pipeline.commands.verify.store_check import FOREIGN, Problem
from pipeline.core.files import taken
from pipeline.core.text import stage_name
from pipeline.executors import Executor
from pipeline.rundir import (
    SECOND_NAME,
    Begun,
    CanvasLost,
    Iteration,
    Journal,
    Pass,
    Position,
    Record,
    RolledBack,
    StagePrepared,
    begun_manifest,
    journal_path,
    manifest_path,
    now,
    position_of,
    stage_path,
    store_path,
    write_manifest,
)
from pipeline.store import (
    METADATA,
    ChunkError,
    checksum,
    group_metadata,
    integrity,
    is_averaged,
    make_room_again,
    slot_names,
    unpacked,
    write_metadata,
)

# A line that is too damaged to be recognised counts as an iteration: the report must not understate the loss.
_OTHER_RECORD = re.compile(
    rb'"type": "(begun|stage_prepared|stage_done|exporting|exported|rolled_back|canvas_lost|stage_added|cleaned)"'
)


@dataclass(frozen=True)
class Step:
    """One action of a repair. `iterations_lost`: how many iterations have to be computed again after it."""

    text: str
    take: Callable[[], object]
    iterations_lost: int = 0


def repair_steps(scan: ScanResult, executor: Executor) -> list[Step]:
    """The steps of one round, after which the directory has to be scanned again.

    Empty if nothing is damaged, or if nothing in the directory can repair it.
    """
    steps = [_foreign_step(scan, problem) for problem in scan.problems if problem.kind == "foreign"]
    if records := list(_record_steps(scan)):
        return steps + records  # the store was compared with records that these steps replace
    if scan.manifest is None:
        return steps
    if groups := [_group_step(problem) for problem in scan.problems if _is_group(scan, problem)]:
        return steps + groups
    return steps + _store_steps(scan, executor)


# --- journal and manifest ---------------------------------------------------------------------------------------------


def _record_steps(scan: ScanResult) -> Iterator[Step]:
    paths = {problem.path for problem in scan.problems}
    path, manifest = journal_path(scan.work_dir), scan.manifest
    journal = Journal(path)
    if (line := scan.journal.damaged_line) is not None:
        tail = path.read_bytes()[scan.journal.good_bytes :].splitlines()
        lost = sum(not _OTHER_RECORD.search(row) for row in tail)
        yield Step(f"cut {path} before line {line} and set the rest aside", journal.set_damage_aside, lost)
        return
    if path in paths and manifest is not None:
        top = store_path(scan.work_dir)
        aside = _free_name(f"{top}.damaged-")
        if top.exists():
            yield Step(f"move {top} to {aside}: the run starts again from the inputs", lambda: top.rename(aside))
        if begun_manifest(scan.journal.records) is None:
            yield Step(f"start a new {path}", lambda: _append(scan, Begun(manifest=manifest)))
    if manifest_path(scan.work_dir) in paths and manifest is not None:
        text = f"restore {manifest_path(scan.work_dir)} from the journal"
        yield Step(text, lambda: write_manifest(manifest_path(scan.work_dir), manifest))


# --- the store --------------------------------------------------------------------------------------------------------


def _is_group(scan: ScanResult, problem: Problem) -> bool:
    """Whether a file is the metadata of a Zarr group, which is the same for all groups and can be written again."""
    if problem.path.name != METADATA or problem.array is not None or problem.kind == "foreign":
        return False
    sums = [stage.metadata[METADATA] for stage in scan.expected if stage.stage == problem.stage]
    return all(int(unpacked(packed)[0]) == checksum(group_metadata()) for packed in sums)


def _group_step(problem: Problem) -> Step:
    return Step(f"write {problem.path} again", lambda: write_metadata(problem.path, group_metadata()))


def _store_steps(scan: ScanResult, executor: Executor) -> list[Step]:
    """Roll back if the current stage is damaged; give up damaged results of earlier stages that the run is past."""
    spare = {(stage.stage, name) for stage in scan.expected for name in stage.spare}
    spare_chunks: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    damage: list[Problem] = []
    for problem in scan.problems:
        if problem.stage is None or problem.kind == "foreign":
            continue
        if problem.chunk is not None and (problem.stage, problem.array) in spare:
            spare_chunks[str(problem.array)].append(problem.chunk)
        else:
            damage.append(problem)
    damaged = {problem.stage for problem in damage if problem.stage is not None}
    discarded = scan.position.stage  # the first stage that is not merely given up
    if discarded not in damaged:
        steps = [_allocation_step(scan, name, chunks) for name, chunks in spare_chunks.items()]
    elif target := _newest_intact(scan, damage, damaged, executor):
        steps = [_rollback_step(scan, *target)]
        discarded = min(discarded, target[1])
    else:
        return []  # until the inputs are restored
    return steps + [_lost_step(scan, stage) for stage in sorted(damaged) if stage < discarded]


def _newest_intact(
    scan: ScanResult, damage: Sequence[Problem], damaged: set[int], executor: Executor
) -> tuple[int, int] | None:
    """(the first record, the first stage) that a rollback to the newest intact position discards."""
    stage, records = scan.position.stage, scan.journal.records
    newest = slot_names(scan.position.newest_slot, averaged=True)
    only_newest = all(item.array in newest and item.chunk is not None for item in damage if item.stage == stage)
    iteration = _last(records, Iteration, stage)
    # the last iteration read the other slot, which stays intact until the next one begins to overwrite it
    other = position_of(records[:iteration])
    if iteration is not None and only_newest and _slot_is_intact(scan.work_dir, other, executor):
        return iteration, stage + 1
    for index in range(stage, -1, -1) if scan.inputs_intact else ():
        # a stage needs the inputs and the result of the stage before, which is lost if a repair has given it up
        if index == 0 or (index - 1 in scan.position.slots and index - 1 not in damaged):
            prepared = _last(records, StagePrepared, index)
            assert prepared is not None, index
            return prepared, index
    return None


def _slot_is_intact(work_dir: Path, position: Position, executor: Executor) -> bool:
    """Whether canvas, m, v and average of the position's slot have the content that the journal records."""
    sums = position.checksums[position.stage]
    names = slot_names(position.newest_slot, averaged=is_averaged(sums))
    try:
        arrays = [store.open_array(stage_path(work_dir, position.stage), name, sums[name]) for name in names]
    except ChunkError:  # a stage that has ended keeps its result alone
        return False
    specs = [spec for array in arrays for spec in integrity.specs_of(array, array.chunk_indices())]
    return not integrity.damage(specs, executor, lambda done, total: None)


def _rollback_step(scan: ScanResult, first_record: int, first_stage: int) -> Step:
    position = position_of(scan.journal.records[:first_record])
    lost = sum(isinstance(record, Iteration | Pass) for record in scan.journal.records[first_record:])
    stages = range(first_stage, scan.position.stage + 1)
    where = f"{stage_name(first_stage)} starts again"
    if not stages:
        where = f"{stage_name(position.stage)} resumes at iteration {position.iteration + 1}"

    def take() -> None:
        # the record first: after a crash here, the arrays are leftovers that the next preparation replaces
        _append(scan, RolledBack(records=first_record))
        for stage in stages:
            shutil.rmtree(stage_path(scan.work_dir, stage), ignore_errors=True)

    return Step(f"roll back: {where}, and the output image will be the same", take, lost)


def _allocation_step(scan: ScanResult, name: str, chunks: Sequence[tuple[int, int]]) -> Step:
    """An iteration overwrites chunks in place, so that those of the idle slot have to exist at their full size."""
    stage = scan.position.stage

    def take() -> None:
        array = store.open_array(stage_path(scan.work_dir, stage), name)
        for cy, cx in chunks:
            make_room_again(array, cy, cx)

    return Step(f"allocate {len(chunks)} chunks of {stage_name(stage)}, {name}, again: their content is unused", take)


def _lost_step(scan: ScanResult, stage: int) -> Step:
    text = (
        f"give up the canvas of {stage_name(stage)}: the run does not need it, but `pipeline export --stage` loses it"
    )
    return Step(text, lambda: _append(scan, CanvasLost(stage=stage)))


# --- unknown files ----------------------------------------------------------------------------------------------------


def _foreign_step(scan: ScanResult, problem: Problem) -> Step:
    if problem.what.startswith(SECOND_NAME):
        return Step(f"replace {problem.path} by a copy of its own", lambda: _break_hard_link(problem.path))
    target = scan.work_dir / FOREIGN / problem.path.relative_to(scan.work_dir)

    def take() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        problem.path.rename(target if not taken(target) else _free_name(f"{target}-"))

    return Step(f"move {problem.path} to {target}", take)


def _break_hard_link(path: Path) -> None:
    aside = path.with_name(path.name + ".partial")
    shutil.copyfile(path, aside)
    aside.replace(path)


def _append(scan: ScanResult, record: Record) -> None:
    journal = Journal(journal_path(scan.work_dir))
    journal.repair_tail()
    journal.append(record.model_copy(update={"time": now()}))


def _last(records: Sequence[Record], kind: type[Iteration | StagePrepared], stage: int) -> int | None:
    """The index of the last record of this kind and stage."""
    indices = [index for index, record in enumerate(records) if isinstance(record, kind) and record.stage == stage]
    return indices[-1] if indices else None


def _free_name(start: str) -> Path:
    """`start` with the first number behind it that no file has."""
    return next(path for number in itertools.count(1) if not taken(path := Path(f"{start}{number}")))
