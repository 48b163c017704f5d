"""The `run` command: the coarse-to-fine loop, and its resume. The computations are in `render`."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import store
from pipeline.config import Config, OptimizerConfig
from pipeline.core.allocator import trim_heap
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import DeviceMemoryError, storage
from pipeline.core.events import IterationDone, Note, RunDone, Sink, StageDone, StageStarted, WorkDone, ignore
from pipeline.core.files import taken
from pipeline.core.vgg_layers import ceil_to
from pipeline.executors import Executor, ThreadExecutor
from pipeline.network import find_weights
from pipeline.plan import WORKERS, Device, Plan, StagePlan, resolve_device, update_threads
from pipeline.render import export
from pipeline.render.context import RenderContext, iteration_record, make_stage, prepared_record, render_context
from pipeline.rundir import (
    Journal,
    Position,
    RunLock,
    check_space,
    content_alpha,
    is_as_written,
    journal_path,
    locked_folder,
    manifest_path,
    newest_canvas,
    newest_moments,
    now,
    open_run,
    output_metadata,
    plan_on,
    read_manifest,
    records,
    refuse_foreign,
    refuse_links,
    stage_path,
    standing,
    store_path,
    written_picture,
)
from pipeline.rundir.process_settings import enter_process_settings, process_settings
from pipeline.store import integrity, kept_files, metadata

if TYPE_CHECKING:
    from pipeline.render.measurements import IterationResult

_FOREIGN = "this run did not make it"


@process_settings()
def run(config: Config, *, force: bool = False, sink: Sink = ignore, stop: threading.Event | None = None) -> Path:
    """Render the output image of `config`, or resume an earlier run of the same config; returns the image's path.

    `force`: overwrite an output that this run did not make. `stop`: set it from any thread to stop between two tasks.
    Raises the errors of errors.py; after Stopped, or any crash, the same call resumes.
    """
    started, cancel = time.monotonic(), CancelToken(stop)
    with storage(config.work_dir), ExitStack() as stack:
        exists = config.work_dir.exists()
        if exists:  # before anything that takes long, so that a second run is refused at once
            lock = stack.enter_context(locked_folder(config.work_dir))
        device = resolve_device(config.compute.device)
        planned = plan_on(config, device)
        for note in planned.notes:
            sink(Note(note))
        weights = find_weights(config.network.name, config.network.weights, config.seed, sink, cancel)
        begun = taken(manifest_path(config.work_dir)) or taken(journal_path(config.work_dir))
        if not (force or begun):
            refuse_foreign(config.output, {}, _FOREIGN)
        if not exists:  # after all refusals, so that a refused start creates nothing
            lock = stack.enter_context(locked_folder(config.work_dir))
        # inside the lock: its tasks have ended before another run can lock the directory
        executor = stack.enter_context(_executor(config, device, lock, sink, cancel))
        refuse_links(config.work_dir)
        journal = open_run(config, planned, weights, cancel)
        context = render_context(config, planned, device, weights, executor, sink)
        rendering = _Rendering(config, planned, context, journal, force)
        rendering.refuse_foreign_output()
        rendering.render()
        rendering.export()
    sink(RunDone(str(config.output), time.monotonic() - started))
    return config.output


def _executor(config: Config, device: Device, lock: RunLock, sink: Sink, cancel: CancelToken) -> Executor:
    """The threads of this process, or worker processes."""
    if config.compute.workers == 0:
        return ThreadExecutor(WORKERS, cancel, update_threads(device.name))
    from pipeline.executors.processes import ProcessExecutor  # noqa: PLC0415 - brings distributed, for this case only

    return ProcessExecutor(
        config.compute.workers,
        WORKERS,
        cancel,
        lock.descriptor,
        lambda message: sink(Note(message)),
        enter_process_settings,
    )


@dataclass(frozen=True)
class _Carried:
    """What a stage continues (optimizer.carry): m and v, the step size, and the number of Adam's steps so far."""

    moments: Sequence[store.StageArray]
    alpha: float
    steps: int


@dataclass
class _Rendering:
    """The state of a run in this process, from its start or resume to the export."""

    config: Config
    plan: Plan
    context: RenderContext
    journal: Journal
    force: bool
    position: Position = field(init=False)
    _speed: _Speed = field(init=False)

    def __post_init__(self) -> None:
        _, self.position = standing(self.journal)
        self._speed = _Speed()
        self.sink, self.executor = self.context.sink, self.context.executor

    def refuse_foreign_output(self) -> None:
        """Raise ConfigError if the output path has a file that this run did not write.

        Checked at the start and again before the export, because a run may take days.
        """
        if not self.force:
            refuse_foreign(self.config.output, self.position.pictures, _FOREIGN, self.executor.cancel)

    def render(self) -> None:
        """Render every stage that is not done."""
        if self.position.prepared:
            self.sink(Note(f"resuming at stage {self.position.stage}, iteration {self.position.iteration}"))
        for stage_plan in self.plan.stages[self.position.stage :]:
            if self.position.stage_done and self.position.stage == stage_plan.index:
                self._free_arrays(stage_plan.index)
                continue
            self._render_stage(stage_plan)

    def _render_stage(self, stage_plan: StagePlan) -> None:
        """Render one stage, in smaller tiles if those of the plan do not fit in the device's memory."""
        step_px = self.plan.tile_step_px
        longest = ceil_to(max(*stage_plan.size, *chain.from_iterable(stage_plan.style_sizes)), step_px)
        while True:
            tile_px = min(self.position.tile_px or longest, self.plan.tile_px, longest)
            try:
                self._render_in_tiles(stage_plan, tile_px)
                return
            except DeviceMemoryError:
                if tile_px == step_px:
                    raise
            gc.collect()  # the error's frames refer to each other, and to the tile's tensors
            smaller = max(step_px, tile_px // 2 // step_px * step_px)
            # recorded: the bits depend on the tiles, and a resume must take the same
            self._commit(records.SmallerTile(tile_px=smaller))
            cause = f"{self.context.device.name} is out of memory for tiles of {tile_px} px"
            self.sink(Note(f"{cause}: resuming with tiles of {smaller} px from the last iteration"))

    def _render_in_tiles(self, stage_plan: StagePlan, tile_px: int) -> None:
        # these import torch, which other commands start without
        from pipeline.render.iteration import Iterations  # noqa: PLC0415
        from pipeline.render.preparation import prepare  # noqa: PLC0415

        index, settings = stage_plan.index, self._settings(stage_plan)
        stage = make_stage(self.config, stage_plan, self.context, tile_px)
        iteration = self.position.iteration if self.position.stage == index else 0
        stages, (height, width) = len(self.plan.stages), stage_plan.size
        prepared = self.position.prepared and self.position.stage == index
        # uncompressed arrays are allocated when the stage is prepared, and overwritten in place
        allocated = prepared and self.config.store.codec == "none"
        check_space(self.config, self.plan, index + allocated)
        self.sink(StageStarted(index, stages, height, width, len(stage.tiles), iteration, settings.max_iterations))
        if not prepared:
            previous = newest_canvas(self.config.work_dir, self.position, index - 1) if index else None
            before = self._carried(stage_plan) if index else None
            started = prepare(stage, previous, moments=before.moments if before else ())
            record = prepared_record(index, stage.tile_px, started)
            start = {"alpha": before.alpha, "adam_steps": before.steps} if before else {}
            self._commit(record.model_copy(update={**start, "carries": stage_plan.carries}))
        elif end_reason(self.position, settings) is None:
            stage.check(self.position.newest_slot, self.position.checksums[index])
        at = self.position
        iterations = Iterations(stage, at.content_energies, at.areas, adam_steps=at.adam_steps)
        while (reason := end_reason(self.position, settings)) is None:
            self.executor.cancel.raise_if_set()
            commit = partial(self._commit_iteration, stage_plan, self.position.iteration)
            iterations.iterate(self.position.iteration, self.position.alpha, self.position.checksums[index], commit)
        self._commit(records.StageDone(stage=index, iterations=self.position.iteration, reason=reason))
        self._free_arrays(index)
        self.sink(StageDone(index, self.position.iteration, reason))

    def _carried(self, stage_plan: StagePlan) -> _Carried | None:
        """What the stage continues of the finished stage before it; None if it starts afresh."""
        at, before = self.position, stage_plan.index - 1
        # without a step there is no step size, and the moments are zeros
        if before not in at.carrying or not at.alpha or not self._settings(stage_plan).carry:
            return None
        moments = newest_moments(self.config.work_dir, at, before)
        return _Carried(moments, at.alpha, at.adam_steps + at.iteration)

    def _commit_iteration(self, stage_plan: StagePlan, iteration: int, result: IterationResult) -> bool:
        """Commit the iteration, and return whether another one follows."""
        self._commit(iteration_record(stage_plan.index, iteration, result))
        self._speed.add(stage_plan.flop_per_iteration, sum(result.seconds.values()))
        self.sink(
            IterationDone(
                stage=stage_plan.index,
                iteration=iteration,
                max_iterations=stage_plan.max_iterations,
                objective=result.objective,
                content_loss=result.content_loss,
                style_loss=result.style_loss,
                mean_abs_u=result.mean_abs_u,
                max_abs_u=result.max_abs_u,
                alpha=result.alpha,
                seconds=result.seconds,
                busy=result.busy,
                eta_s=self._speed.seconds_for(self._remaining_flop(stage_plan.index)),
            )
        )
        return end_reason(self.position, self._settings(stage_plan)) is None

    def _remaining_flop(self, index: int) -> int:
        """FLOP of all remaining iterations if no stage stops early."""
        current, *later = self.plan.stages[index:]
        remaining = current.flop_per_iteration * (current.max_iterations - self.position.iteration)
        return remaining + sum(stage.flop_per_iteration * stage.max_iterations for stage in later)

    def _settings(self, stage_plan: StagePlan) -> OptimizerConfig:
        return self.config.for_stage(max(stage_plan.size)).optimizer

    def export(self) -> None:
        """Write the last stage's canvas as the output image, unless the same image is there already."""
        output, picture = self.config.output, self.plan.picture
        settings = self.config.export.model_copy(update={"bits": picture.bits})
        options = settings.model_dump(mode="json")
        before = self.position.exported.get(str(output))
        # options that are newer than the record did not affect its image
        same = before and before == {key: options.get(key) for key in before}
        if same and is_as_written(output, self.position.pictures[str(output)][-1], self.executor.cancel):
            self.sink(Note(f"{output} is already there"))
            return
        check_space(self.config, self.plan, len(self.plan.stages))
        trim_heap()
        last = self.plan.stages[-1].index
        canvas = newest_canvas(self.config.work_dir, self.position, last)
        alpha = content_alpha(self.config.work_dir, self.position, last) if picture.alpha else None
        planes = [canvas] if alpha is None else [canvas, alpha]
        integrity.require_intact(
            planes, self.executor, lambda done, total: self.sink(WorkDone(last, "check", done, total))
        )
        cancel = self.executor.cancel
        manifest = read_manifest(manifest_path(self.config.work_dir))
        export.export_canvas(
            planes,
            output,
            settings,
            cancel,
            lambda done, total: self.sink(WorkDone(last, "export", done, total)),
            self._record_picture,
            output_metadata(manifest, self.config.content, settings.metadata, cancel, self.sink),
        )
        written = self.position.pictures[str(output)][-1]
        self._commit(records.Exported(output=str(output), options=options, picture=written))

    def _record_picture(self, whole: Path) -> None:
        """Record the image before it is renamed: after a crash between the two, the run would not recognise it."""
        written = written_picture(whole, self.executor.cancel)
        self.refuse_foreign_output()
        self._commit(records.Exporting(output=str(self.config.output), picture=written))

    def _free_arrays(self, stage: int) -> None:
        at = self.position
        retained = set(kept_files(at.slots[stage], at.checksums[stage], moments=stage in at.carrying))
        store.delete_arrays(stage_path(self.config.work_dir, stage), retained)

    def _commit(self, record: records.Record) -> None:
        has_pixels = isinstance(record, records.StagePrepared | records.Iteration)
        # the chunks must be on the disk before the record that commits them
        if has_pixels and self.config.store.durability == "power":
            metadata.sync(store_path(self.config.work_dir))
        self.journal.append(record.model_copy(update={"time": now()}))
        self.position = self.position.after(record)


def end_reason(position: Position, settings: OptimizerConfig) -> str | None:
    """Why the stage ends at this position, or None if it continues."""
    if position.max_abs_u == 0:
        return "converged"
    if position.mean_abs_u is not None and position.mean_abs_u < settings.stop_condition:
        return "stop_condition"
    return "max_iterations" if position.iteration >= settings.max_iterations else None


class _Speed:
    """Seconds per floating-point operation, as measured so far in this process."""

    def __init__(self) -> None:
        self._flop = 0.0
        self._seconds = 0.0
        self._warm = False

    def add(self, flop: int, seconds: float) -> None:
        if not self._warm:  # the first iteration also loads weights and compiles kernels
            self._warm = True
            return
        # older iterations have less weight: those of smaller stages have relatively more overhead
        self._flop, self._seconds = self._flop * 0.8 + flop, self._seconds * 0.8 + seconds

    def seconds_for(self, flop: int) -> float | None:
        return flop * self._seconds / self._flop if self._flop else None
