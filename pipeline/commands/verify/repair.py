"""What to do about damage: which steps mend it, and how far back the run has to go.

A step is told before it is taken: `verify` prints what `--repair` does. Nothing good is thrown away: the journal is
appended to, what is cut off or not understood is set aside, and only what the journal calls dead is deleted.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import store
from pipeline.commands.verify.scan import ScanResult
from pipeline.commands.verify.store_check import FOREIGN, ExpectedStage, Problem, group_checksums
from pipeline.core.errors import PipelineError
from pipeline.core.events import Sink
from pipeline.core.files import taken
from pipeline.executors.threads import Engine
from pipeline.network.weights import find_weights, widths_for_plan
from pipeline.plan.device import resolve_device
from pipeline.plan.network_cost import layers_in_use
from pipeline.plan.plan import arrays_of
from pipeline.render.context import make_stage, render_context
from pipeline.rundir.journal import Journal
from pipeline.rundir.manifest import begun_manifest, content_kind, write_manifest
from pipeline.rundir.open import newest_canvas, now, refuse_other_stages, stage_path
from pipeline.rundir.paths import SECOND_NAME, journal_path, manifest_path, store_path
from pipeline.rundir.position import Position, position_of
from pipeline.rundir.preflight import plan_on
from pipeline.rundir.records import Begun, CanvasLost, Iteration, Record, RolledBack, StagePrepared
from pipeline.store import integrity
from pipeline.store.checksums import checksum, unpacked
from pipeline.store.chunk_file import ChunkError
from pipeline.store.layout import ALPHA, CONTENT, METADATA, is_averaged, slot_names
from pipeline.store.metadata import array_metadata, group_metadata, make_room_again, replace_array, write_metadata

# A line that cannot be told from the record of an iteration is counted as one.
_OTHER_RECORD = re.compile(rb'"type": "(begun|stage_prepared|stage_done|exporting|exported|rolled_back|canvas_lost)"')


@dataclass(frozen=True)
class Step:
    """One thing that mends something. `iterations_lost`: how many have to be computed again for it."""

    text: str
    take: Callable[[], object]
    iterations_lost: int = 0


@dataclass(frozen=True)
class _Back:
    """Where a run can go on: before record `index`. `stage` begins again there, or goes on if that is None."""

    index: int
    position: Position
    stage: int | None


@dataclass
class Repair:
    """The steps against what was found. `hopeless`: arrays that cannot be made anew as they were, by (stage, name)."""

    engine: Engine
    sink: Sink
    hopeless: set[tuple[int, str]] = field(default_factory=set)

    def steps(self, found: ScanResult) -> list[Step]:
        """What to do now; look again when it is done. Empty if there is nothing, or nothing that helps."""
        steps = [_foreign_step(found, problem) for problem in found.problems if problem.kind == "foreign"]
        if records := list(_record_steps(found)):
            return steps + records
        if found.manifest is None:
            return steps
        if metadata := list(self._metadata_steps(found)):
            return steps + metadata  # with it, chunks come into view
        return [*steps, *_room_steps(found), *self._state_steps(found)]

    # --- descriptions ------------------------------------------------------------------------------------------

    def _metadata_steps(self, found: ScanResult) -> Iterator[Step]:
        for problem in found.problems:
            if problem.path.name != METADATA or problem.kind == "foreign":
                continue
            wanted = {
                int(unpacked(held.metadata[str(problem.path.relative_to(held.folder))])[0])
                for held in found.held
                if problem.path.is_relative_to(held.folder)
            } or group_checksums(found.held)
            data = next((data for data in _metadata_files(found, problem) if checksum(data) in wanted), None)
            if data is not None:
                text = f"write {problem.path} anew, as it was"
                yield Step(text, lambda path=problem.path, data=data: write_metadata(path, data))  # type: ignore[misc]
            elif problem.stage is not None and problem.array is not None:
                self.hopeless.add((problem.stage, problem.array))

    # --- pixels ------------------------------------------------------------------------------------------------

    def _state_steps(self, found: ScanResult) -> list[Step]:
        """Compute inputs of the stage again, go back, or give up a canvas that the run does not need."""
        stage = found.position.stage
        damaged = {(problem.stage, problem.array) for problem in found.problems if problem.kind != "foreign"}
        earlier = {index: {name for one, name in damaged if one == index} for index in range(stage)}
        mended = [index for index, names in earlier.items() if self._is_alpha_alone(found, index, names)]
        lost = [index for index, names in earlier.items() if names and index not in mended]
        names = {name for held in found.held if held.stage == stage for name in held.live if (stage, name) in damaged}
        state = names & {*slot_names(0, averaged=True), *slot_names(1, averaged=True)}
        inputs = {name for name in names - state if (stage, name) not in self.hopeless}
        begin_again = any(one == stage and name != CONTENT for one, name in self.hopeless)
        steps: list[Step] = []
        if state or begin_again:
            back = self._way_back(found, begin_again)
            if back is not None:
                steps.append(self._back_step(found, back))
            if back is not None and back.stage is not None:
                inputs = set()
                mended, lost = ([index for index in some if index < back.stage] for some in (mended, lost))
        if inputs and found.inputs_whole:
            steps.append(self._remake_step(found, stage, inputs))
        steps += [self._remake_step(found, index, {ALPHA}) for index in mended]
        return steps + [_lost_step(found, index) for index in lost]

    def _is_alpha_alone(self, found: ScanResult, stage: int, damaged: set[str | None]) -> bool:
        """Whether only the alpha of an earlier stage is damaged, and can be made anew from the content."""
        return damaged == {ALPHA} and found.inputs_whole and (stage, ALPHA) not in self.hopeless

    def _way_back(self, found: ScanResult, begin_again: bool) -> _Back | None:
        """The newest position before this one that the store still holds whole."""
        stage, records = found.position.stage, found.journal.records
        iteration = _last(records, Iteration, stage)
        if iteration is not None and not begin_again:
            position = position_of(records[:iteration])
            if self._is_whole(found.work_dir, position):
                return _Back(iteration, position, None)
        for index in range(stage, -1, -1) if found.inputs_whole else ():
            prepared = _last(records, StagePrepared, index)
            assert prepared is not None, index
            position = position_of(records[:prepared])
            if index == 0 or self._is_whole(found.work_dir, position):
                return _Back(prepared, position, index)
        return None

    def _back_step(self, found: ScanResult, back: _Back) -> Step:
        lost = sum(isinstance(record, Iteration) for record in found.journal.records[back.index :])
        if back.stage is None:
            where = f"stage {back.position.stage} goes on from iteration {back.position.iteration}"
        else:
            where = f"stage {back.stage} begins again"

        def take() -> None:
            _append(found, RolledBack(records=back.index))
            if back.stage is not None:
                self.hopeless.clear()  # everything is made anew
                for index in range(back.stage, found.position.stage + 1):
                    shutil.rmtree(stage_path(found.work_dir, index), ignore_errors=True)

        return Step(f"go back: {where}, and the picture will be the same", take, lost)

    def _is_whole(self, work_dir: Path, position: Position) -> bool:
        """Whether the newest canvas of the position (and m and v, if its stage goes on) is as it was written."""
        stage = position.stage
        if stage not in position.slots:
            return False  # the disk lost it before
        try:
            if position.stage_done:
                arrays = [newest_canvas(work_dir, position, stage)]
            else:
                sums = position.checksums[stage]
                names = slot_names(position.newest_slot, averaged=is_averaged(sums))
                arrays = [store.open_array(stage_path(work_dir, stage), name, sums[name]) for name in names]
        except ChunkError:
            return False
        specs = [spec for array in arrays for spec in integrity.specs_of(array, array.chunk_indices())]
        return not integrity.damage(specs, self.engine, lambda done, total: None)

    def _remake_step(self, found: ScanResult, stage: int, names: set[str]) -> Step:
        text = f"compute {', '.join(sorted(names))} of stage {stage} again"
        return Step(text, lambda: self._remake(found, stage, names))

    def _remake(self, found: ScanResult, index: int, names: set[str]) -> None:
        """Make inputs of a stage anew; those that do not come out as they were are hopeless."""
        from pipeline.render.preparation import remake  # noqa: PLC0415 - brings torch

        assert found.config is not None
        config = found.config.model_copy(update={"work_dir": found.work_dir})
        records = found.journal.records
        device = resolve_device(config.compute.device)
        weights = find_weights(config.network.name, config.network.weights, config.seed)
        planned = plan_on(config, device)
        assert found.manifest is not None
        refuse_other_stages(config, found.manifest, planned)
        prepared = _last(records, StagePrepared, index)
        assert prepared is not None
        record = records[prepared]
        assert isinstance(record, StagePrepared)
        context = render_context(config, planned, device, weights, self.engine, self.sink)
        tile_px = record.tile_px or planned.tile_px  # other tiles would round otherwise
        stage = make_stage(config, planned.stages[index], context, tile_px)
        sums = found.position.checksums[index]
        made = remake(stage, names, None if CONTENT in names else sums.get(CONTENT))
        for name in names:
            shutil.copyfile(stage.stage_dir / name / METADATA, stage.partial_dir / name / METADATA)
            if made[name] == sums[name]:
                replace_array(stage.partial_dir / name, stage.stage_dir / name)
            else:
                self.hopeless.add((index, name))
        shutil.rmtree(stage.partial_dir)


def _metadata_files(found: ScanResult, problem: Problem) -> Iterator[bytes]:
    """What a metadata file may have been: another of the same run, or what zarr writes today."""
    paths = [held.folder / name for held in found.held for name in held.metadata] + [
        store_path(found.work_dir) / METADATA
    ]
    for path in paths:
        if path != problem.path and path.is_file():
            yield path.read_bytes()
    yield group_metadata()
    if problem.array is None or problem.stage is None or found.manifest is None or found.config is None:
        return
    config = found.config
    try:
        height, width = found.manifest.stages[problem.stage].size
        config = config.for_stage(max(height, width))
        layer_use = layers_in_use(config, widths_for_plan(config.network.name, config.network.weights))
    except PipelineError:  # the weights are damaged too: they are a problem of their own
        return
    content = None if config.content is None else content_kind(found.manifest)
    arrays = arrays_of(config, (height, width), layer_use, content)
    if problem.array in arrays:
        yield array_metadata(arrays[problem.array], config.store.codec)


def _foreign_step(found: ScanResult, problem: Problem) -> Step:
    if problem.what.startswith(SECOND_NAME):
        return Step(f"make {problem.path} a file of its own", lambda: _make_own(problem.path))
    target = found.work_dir / FOREIGN / problem.path.relative_to(found.work_dir)

    def take() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        problem.path.rename(target if not taken(target) else _free_name(f"{target}-"))

    return Step(f"move {problem.path} to {target}", take)


def _make_own(path: Path) -> None:
    """Take a file's second name away: its content stays, in a file that nobody else changes."""
    aside = path.with_name(path.name + ".partial")
    shutil.copyfile(path, aside)
    aside.replace(path)


def _record_steps(found: ScanResult) -> Iterator[Step]:
    """What the journal and the manifest need; everything else is judged by them, and waits."""
    paths = {problem.path for problem in found.problems}
    path, manifest = journal_path(found.work_dir), found.manifest
    journal = Journal(path)
    if found.journal.damaged_line is not None:
        tail = path.read_bytes()[found.journal.good_bytes :].splitlines()
        lost = sum(not _OTHER_RECORD.search(row) for row in tail)
        line = found.journal.damaged_line
        yield Step(
            f"set {path} aside from line {line} on; what comes before it decides", journal.set_damage_aside, lost
        )
        return
    if path in paths and manifest is not None:
        top = store_path(found.work_dir)
        aside = _free_name(f"{top}.damaged-")
        if top.exists():
            yield Step(f"move {top} to {aside}: the run begins again from nothing", lambda: top.rename(aside))
        if begun_manifest(found.journal.records) is None:
            yield Step(f"begin {path} anew", lambda: _append(found, Begun(manifest=manifest)))
    if manifest_path(found.work_dir) in paths and manifest is not None:
        text = f"restore {manifest_path(found.work_dir)} from the journal"
        yield Step(text, lambda: write_manifest(manifest_path(found.work_dir), manifest))


def _room_steps(found: ScanResult) -> Iterator[Step]:
    """Chunks that the next iteration writes over only need to be there."""
    for held in found.held:
        for name in held.spare:
            chunks = [
                problem.chunk
                for problem in found.problems
                if (problem.stage, problem.array) == (held.stage, name) and problem.chunk is not None
            ]
            if chunks:
                text = (
                    f"make room again for {len(chunks)} chunks of stage {held.stage}, {name}: their content is nobody's"
                )
                yield Step(text, lambda held=held, name=name, chunks=chunks: _make_room(held, name, chunks))  # type: ignore[misc]


def _make_room(held: ExpectedStage, name: str, chunks: Sequence[tuple[int, int]]) -> None:
    array = store.open_array(held.folder, name)
    for cy, cx in chunks:
        make_room_again(array, cy, cx)


def _lost_step(found: ScanResult, stage: int) -> Step:
    text = (
        f"give up the canvas of stage {stage}: the run does not need it, but `pipeline export --stage` has it no more"
    )
    return Step(text, lambda: _append(found, CanvasLost(stage=stage)))


def _append(found: ScanResult, record: Record) -> None:
    journal = Journal(journal_path(found.work_dir))
    journal.repair_tail()
    journal.append(record.model_copy(update={"time": now()}))


def _last(records: Sequence[Record], kind: type[Iteration | StagePrepared], stage: int) -> int | None:
    """The index of the last record of this kind and stage."""
    found = [index for index, record in enumerate(records) if isinstance(record, kind) and record.stage == stage]
    return found[-1] if found else None


def _free_name(start: str) -> Path:
    """`start` with the first number behind it that is free."""
    return next(path for number in itertools.count(1) if not taken(path := Path(f"{start}{number}")))
