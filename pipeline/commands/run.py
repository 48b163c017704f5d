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
from pipeline.commands.measure import forecast, is_worth_measuring
from pipeline.commands.outputs import Outputs
from pipeline.commands.start import (
    check_stage_space,
    check_start,
    identifier,
    measured_iterations,
    with_finished_run,
)
from pipeline.config import Config, InitNetwork, OptimizerConfig
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import DeviceMemoryError, storage
from pipeline.core.events import IterationDone, Note, RunDone, Sink, StageDone, StageStarted, ignore
from pipeline.core.text import count, stage_name
from pipeline.core.vgg_layers import ceil_to
from pipeline.network import find_weights
from pipeline.plan import Plan, Speed, StagePlan, resolve_device
from pipeline.render.context import (
    RenderContext,
    executor_for,
    iteration_record,
    make_stage,
    prepared_record,
    render_context,
    settings_of,
)
from pipeline.rundir import (
    Journal,
    Position,
    locked_folder,
    newest_canvas,
    newest_moments,
    now,
    open_run,
    plan_on,
    records,
    refuse_links,
    resolved,
    stage_path,
    standing,
    state_bytes,
    store_path,
)
from pipeline.rundir.process_settings import process_settings
from pipeline.store import kept_files, metadata

if TYPE_CHECKING:
    from pipeline.render.measurements import IterationResult


@process_settings()
def run(
    config: Config,
    *,
    force: bool = False,
    more_iterations: int | None = None,
    sink: Sink = ignore,
    stop: threading.Event | None = None,
) -> Path:
    """Render the output image of `config`, or resume an earlier run of the same config; returns the image's path.

    `force`: overwrite an output that this run did not make. `more_iterations`: continue a finished run with a stage of
    its last size and this many iterations. `stop`: set it from any thread to stop between two tasks.
    Raises the errors of errors.py; after Stopped, or any crash, the same call resumes.
    """
    started, cancel = time.monotonic(), CancelToken(stop)
    config = with_finished_run(resolved(config), sink, cancel)
    with storage(config.work_dir), ExitStack() as stack:
        exists = config.work_dir.exists()
        if exists:  # before anything that takes long, so that a second run is refused at once
            lock = stack.enter_context(locked_folder(config.work_dir))
        device = resolve_device(config.compute.device)
        planned = plan_on(config, device)
        for note in planned.notes:
            sink(Note(note))
        weights = find_weights(config.network.name, config.network.weights, config.seed, sink, cancel)
        identify = identifier(config, sink, cancel)
        begin = check_start(config, planned, identify, force=force, more_iterations=more_iterations, cancel=cancel)
        if not exists:  # after all refusals, so that a refused start creates nothing
            lock = stack.enter_context(locked_folder(config.work_dir))
        # inside the lock: its tasks have ended before another run can lock the directory
        executor = stack.enter_context(executor_for(config, device, lock.descriptor, sink, cancel))
        refuse_links(config.work_dir)
        context = render_context(config, planned, device, weights, executor, sink)
        speed = _first_speed(config, planned, context) if not begin.position.is_fixed else Speed()
        journal = open_run(config, planned, identify)
        if begin.adds is not None:
            journal.append(records.StageAdded(iterations=begin.adds, time=now()))
        rendering = _Rendering(config, begin.planned, context, journal, force, speed)
        rendering.render()
        rendering.export()
    outputs = list(planned.outputs)
    seconds = time.monotonic() - started
    sink(RunDone(", ".join(outputs), seconds, str(config.work_dir), state_bytes(config.work_dir)))
    return Path(outputs[0])


def _first_speed(config: Config, planned: Plan, context: RenderContext) -> Speed:
    """The speed of this machine, of which the user is told what it means for the run, if the run takes long."""
    if is_worth_measuring(planned) and (measured := forecast(config, planned, context)):
        speed, expected = measured
        context.sink(Note(expected.text))
        return speed
    return Speed()


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
    _speed: Speed
    position: Position = field(init=False)
    _is_warm: bool = field(init=False)

    def __post_init__(self) -> None:
        earlier, self.position = standing(self.journal)
        self._is_warm = False
        for stage, seconds in measured_iterations(earlier):
            self._speed.iterations.add(self.plan.stages[stage].flop_per_iteration, seconds)
        self.sink, self.executor = self.context.sink, self.context.executor

    def render(self) -> None:
        """Render every stage that is not done."""
        if self.position.prepared and not self.position.stage_done:
            stage = stage_name(self.position.stage, len(self.plan.stages))
            self.sink(Note(f"resuming at {stage}, after {count(self.position.iteration, 'iteration')}"))
        for stage_plan in self.plan.stages[self.position.stage :]:
            if self.position.stage_done and self.position.stage == stage_plan.index:
                if not self.position.cleaned:
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
        from pipeline.feedforward.start import start_picture  # noqa: PLC0415
        from pipeline.render.iteration import Iterations  # noqa: PLC0415
        from pipeline.render.preparation import prepare  # noqa: PLC0415

        index, settings = stage_plan.index, self._settings(stage_plan)
        stage = make_stage(self.config, stage_plan, self.context, tile_px)
        iteration = self.position.iteration if self.position.stage == index else 0
        stages, (height, width) = len(self.plan.stages), stage_plan.size
        prepared = self.position.prepared and self.position.stage == index
        check_stage_space(self.config, self.plan, self.position, index)
        self.sink(StageStarted(index, stages, height, width, len(stage.tiles), iteration, settings.max_iterations))
        if not prepared:
            previous = newest_canvas(self.config.work_dir, self.position, index - 1) if index else None
            before = self._carried(stage_plan) if index else None
            begun = time.monotonic()
            first = start_picture(stage) if not index and isinstance(self.config.init, InitNetwork) else None
            started = prepare(stage, previous, moments=before.moments if before else (), first_canvas=first)
            if self._is_warm:
                self._speed.preparations.add(stage_plan.prepare_flop, time.monotonic() - begun)
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
        if self._is_warm:  # the first iteration also loads weights and compiles kernels
            self._speed.iterations.add(stage_plan.flop_per_iteration, result.busy["wall"])
        self._is_warm = True
        left = self._speed.remaining_s(self.plan.stages[stage_plan.index :], iteration + 1)
        record = iteration_record(stage_plan.index, iteration, result)
        self._commit(record.model_copy(update={"remaining_s": left}))
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
                eta_s=left,
            )
        )
        return end_reason(self.position, self._settings(stage_plan)) is None

    def _settings(self, stage_plan: StagePlan) -> OptimizerConfig:
        return settings_of(self.config, stage_plan).optimizer

    def export(self) -> None:
        """Write the last stage's canvas as the output images, except for those that are there already."""
        commit, position = self._commit, lambda: self.position
        Outputs(self.config, self.plan, self.executor, self.sink, self.force, commit, position).write()

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
