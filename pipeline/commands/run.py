"""The `run` command: the coarse-to-fine loop, and its resume. The computations are in `render`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import store
from pipeline.commands.commits import Commits, end_reason
from pipeline.commands.measure import starting_speed
from pipeline.commands.outputs import Outputs
from pipeline.commands.smaller_tiles import TileWork
from pipeline.commands.start import check_stage_space, check_start, identifier, measured_iterations, with_finished_run
from pipeline.config import Config, InitNetwork, InitWct, OptimizerConfig, dotted, input_files
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import storage
from pipeline.core.events import IterationDone, Note, RunDone, Sink, StageDone, StageStarted, ignore
from pipeline.core.text import count, duration, energy_text, stage_name
from pipeline.core.vgg_layers import ceil_to
from pipeline.network import find_weights
from pipeline.plan import Plan, Speed, StagePlan, run_device
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
    Identity,
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
    state_bytes,
)
from pipeline.rundir.process_settings import process_settings
from pipeline.store import kept_files

if TYPE_CHECKING:
    from pipeline.render.measurements import IterationResult


@process_settings()
def run(
    config: Config,
    *,
    force: bool = False,
    more_iterations: int | None = None,
    watts: float | None = None,
    sink: Sink = ignore,
    stop: threading.Event | None = None,
) -> Path:
    """Render the output image of `config`, or resume an earlier run of the same config; returns the image's path.

    `force`: overwrite an output that this run did not make. `more_iterations`: continue a finished run with a stage of
    its last size and this many iterations. `watts`: the power of the machine while it works, for what is said of the
    energy. `stop`: set it from any thread to stop between two tasks.
    Raises the errors of errors.py; after Stopped, or any crash, the same call resumes.
    """
    started, cancel = time.monotonic(), CancelToken(stop)
    config = with_finished_run(resolved(config), sink, cancel, more_iterations)
    with storage(config.work_dir), ExitStack() as stack:
        exists = config.work_dir.exists()
        if exists:  # before anything that takes long, so that a second run is refused at once
            lock = stack.enter_context(locked_folder(config.work_dir))
        device = run_device(config.compute, cancel, lambda message: sink(Note(message)))
        planned = plan_on(config, device)
        for note in planned.notes:
            sink(Note(note))
        weights = find_weights(config.network.name, config.network.weights, config.seed, sink, cancel)
        identify = identifier(config, sink, cancel)
        check = partial(
            check_start, config, planned, identify, force=force, more_iterations=more_iterations, cancel=cancel
        )
        begin = check()
        if not exists:  # after all refusals, so that a refused start creates nothing
            lock = stack.enter_context(locked_folder(config.work_dir))
            begin = check()  # until it was locked, another run may have begun there
        # inside the lock: its tasks have ended before another run can lock the directory
        files = [*weights.files, *_start_networks(config, identify)]
        executor = stack.enter_context(executor_for(config, device, files, lock.descriptor, sink, cancel))
        refuse_links(config.work_dir)
        context = render_context(config, planned, device, weights, executor, sink)
        speed = starting_speed(config, begin.planned, context, watts, begins=not begin.state.position.is_fixed)
        for number, iteration, seconds in measured_iterations(begin.state.records):
            if iteration:
                speed.iterations.add(begin.planned.stages[number].flop_per_iteration, seconds)
        open_run(config, planned, identify, begin.state)
        commits = Commits(config, begin.state.journal, begin.state.position)
        rendering = _Rendering(config, begin.planned, context, commits, speed)
        if begin.adds is not None:
            commits.commit(records.StageAdded(iterations=begin.adds, time=now()))
        del begin  # its records of a long run would take memory that the plan does not count
        rendering.render()
        Outputs(config, rendering.plan, executor, sink, force, commits).write()
    outputs = list(planned.outputs)
    seconds = time.monotonic() - started
    if watts is not None:
        sink(Note(f"this took {duration(seconds)} and {energy_text(seconds * watts)}, at {watts:g} W (as given)"))
    sink(RunDone(", ".join(outputs), seconds, str(config.work_dir), state_bytes(config.work_dir)))
    return Path(outputs[0])


def _start_networks(config: Config, identify: Callable[[], Identity]) -> list[tuple[Path, str]]:
    """(path, SHA-256) of the network of `init: apply` or `init: wct`."""
    if not isinstance(config.init, InitNetwork | InitWct):
        return []
    return [(path, identify().inputs[dotted(key)]) for key, path in input_files(config) if key[0] == "init"]


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
    _commits: Commits
    _speed: Speed
    _is_warm: bool = False
    _may_be_resident: bool = True
    _since: float = 0.0  # when what is being measured began

    def __post_init__(self) -> None:
        self.sink, self.executor = self.context.sink, self.context.executor

    @property
    def position(self) -> Position:
        """What is done. The iterations of a stage in memory count before they are committed."""
        return self._commits.position

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
        tiles = TileWork(min(self.plan.tile_px, longest), step_px, self.context.device.name, "iteration")
        tiles.do(partial(self._render_in_tiles, stage_plan), self._commits, self.sink, partial(self._leave, stage_plan))

    def _leave(self, stage_plan: StagePlan) -> bool:
        """Let stages no longer stay in the device's memory; False if this one is not there."""
        if not (self._is_resident(stage_plan) and self._is_prepared(stage_plan)):
            return False
        self._may_be_resident = False
        name = self.context.device.name
        self.sink(Note(f"{name} is out of memory: stages no longer stay there, but are read from the disk"))
        return True

    def _render_in_tiles(self, stage_plan: StagePlan, tile_px: int) -> None:
        # these import torch, which other commands start without
        from pipeline.feedforward.start import start_picture  # noqa: PLC0415
        from pipeline.render.iteration import Iterations  # noqa: PLC0415
        from pipeline.render.preparation import prepare  # noqa: PLC0415

        index, settings = stage_plan.index, self._settings(stage_plan)
        stage = make_stage(self.config, stage_plan, self.context, tile_px)
        iteration = self.position.iteration if self.position.stage == index else 0
        stages, (height, width) = len(self.plan.stages), stage_plan.size
        prepared = self._is_prepared(stage_plan)
        check_stage_space(self.config, self.plan, self.position, index)
        self.sink(StageStarted(index, stages, height, width, len(stage.tiles), iteration, settings.max_iterations))
        if not prepared:
            previous = newest_canvas(self.config.work_dir, self.position, index - 1) if index else None
            before = self._carried(stage_plan) if index else None
            self._since = time.monotonic()
            first = None if index else start_picture(stage)
            started = prepare(stage, previous, moments=before.moments if before else (), first_canvas=first)
            record = prepared_record(index, stage.tile_px, started)
            start = {"alpha": before.alpha, "adam_steps": before.steps} if before else {}
            self._commits.commit(record.model_copy(update={**start, "carries": stage_plan.carries}))
            if self._is_warm:
                self._speed.preparations.add(stage_plan.prepare_flop, time.monotonic() - self._since)
        elif end_reason(self.position, settings) is None:
            stage.check(self.position.newest_slot, self.position.checksums[index])
        at = self.position
        self._since = time.monotonic()
        iterations = Iterations(stage, at.content_energies, at.areas, adam_steps=at.adam_steps)
        with self._commits.in_memory(stage) if self._is_resident(stage_plan) else nullcontext():
            while (reason := end_reason(self.position, settings)) is None:
                self.executor.cancel.raise_if_set()
                commit = partial(self._commit_iteration, stage_plan, self.position.iteration)
                iterations.iterate(self.position.iteration, self.position.alpha, self.position.checksums[index], commit)
        self._commits.commit(records.StageDone(stage=index, iterations=self.position.iteration, reason=reason))
        self._free_arrays(index)
        self.sink(StageDone(index, self.position.iteration, reason))

    def _is_prepared(self, stage_plan: StagePlan) -> bool:
        return self.position.prepared and self.position.stage == stage_plan.index

    def _is_resident(self, stage_plan: StagePlan) -> bool:
        return self._may_be_resident and stage_plan.resident_bytes > 0

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
        now_s = time.monotonic()
        if self._is_warm and iteration:  # the first iteration also loads weights and compiles kernels
            self._speed.iterations.add(stage_plan.flop_per_iteration, now_s - self._since)
        self._is_warm, self._since = True, now_s
        left = self._speed.remaining_s(self.plan.stages[stage_plan.index :], iteration + 1)
        record = iteration_record(stage_plan.index, iteration, result)
        self._commits.add(record.model_copy(update={"remaining_s": left}))
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

    def _free_arrays(self, stage: int) -> None:
        at = self.position
        retained = set(kept_files(at.slots[stage], at.checksums[stage], moments=stage in at.carrying))
        store.delete_arrays(stage_path(self.config.work_dir, stage), retained)
