"""The `apply` command: a picture through image transformation networks, exact in tiles, and its resume."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import store
from pipeline.commands.commits import Commits
from pipeline.commands.outputs import Outputs
from pipeline.commands.smaller_tiles import TileWork
from pipeline.commands.start import check_stage_space, check_start
from pipeline.config import ApplyConfig, dotted, input_files, result_fields
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import PipelineError, Stopped, storage
from pipeline.core.events import Note, RunDone, Sink, StageDone, StageStarted, ignore
from pipeline.core.text import count
from pipeline.executors import Executor
from pipeline.feedforward.plan import ApplyPlan, plan_apply
from pipeline.network import sha256_of
from pipeline.plan import Device, run_device
from pipeline.render.context import executor_for, process_gpu_bytes, threads_of
from pipeline.rundir import (
    Identity,
    Position,
    check_work_dir,
    locked_folder,
    open_run,
    records,
    refuse_links,
    refuse_locked,
    resolved,
    stage_path,
    state_bytes,
)
from pipeline.rundir.process_settings import process_settings
from pipeline.store import kept_files

if TYPE_CHECKING:
    from pipeline.feedforward.passes import Passes


@process_settings()
def apply_plan(config: ApplyConfig) -> ApplyPlan:
    """What `apply` will compute and need, from the headers of its files; raises the errors of errors.py."""
    return plan_apply(resolved(config), run_device(config.compute))


@process_settings()
def apply(
    config: ApplyConfig, *, force: bool = False, sink: Sink = ignore, stop: threading.Event | None = None
) -> Path:
    """Write the output image of `config`, or resume an earlier run of the same config; returns the image's path.

    `force`, `stop`, and the errors: as in `run`.
    """
    started, cancel = time.monotonic(), CancelToken(stop)
    config = resolved(config)
    with storage(config.work_dir), ExitStack() as stack:
        exists = config.work_dir.exists()
        if exists:
            lock = stack.enter_context(locked_folder(config.work_dir))
        device = run_device(config.compute, cancel, lambda message: sink(Note(message)))
        planned = plan_apply(config, device)
        for note in planned.plan.notes:
            sink(Note(note))
        identify = cache(lambda: _identity(config, cancel))
        begin = check_start(config, planned.plan, identify, force=force, cancel=cancel)
        if not exists:  # after all refusals, so that a refused start creates nothing
            lock = stack.enter_context(locked_folder(config.work_dir))
            begin = check_start(config, planned.plan, identify, force=force, cancel=cancel)  # as in `run`
        # inside the lock: its tasks have ended before another run can lock the directory
        files = _network_files(config, identify())
        executor = stack.enter_context(executor_for(config, device, files, lock.descriptor, sink, cancel))
        refuse_links(config.work_dir)
        open_run(config, planned.plan, identify, begin.state)
        commits = Commits(config, begin.state.journal, begin.state.position)
        application = _Application(config, planned, device, executor, commits, identify(), sink)
        application.apply()
        Outputs(config, planned.plan, executor, sink, force, commits).write()
    outputs = list(planned.plan.outputs)
    sink(RunDone(", ".join(outputs), time.monotonic() - started, str(config.work_dir), state_bytes(config.work_dir)))
    return Path(outputs[0])


@process_settings()
def apply_outlook(config: ApplyConfig, planned: ApplyPlan, *, stop: threading.Event | None = None) -> str:
    """What `apply` would do with this config now, in words, or why it would refuse; as `outlook` of a run."""
    cancel = CancelToken(stop)
    try:
        config = resolved(config)
        if config.work_dir.exists():
            refuse_locked(config.work_dir)
            check_work_dir(config.work_dir)
        return check_start(config, planned.plan, lambda: _identity(config, cancel), cancel=cancel).text
    except Stopped:
        raise
    except PipelineError as error:
        return f"is refused: {error}"


def _identity(config: ApplyConfig, cancel: CancelToken) -> Identity:
    return Identity(result_fields(config), {dotted(key): sha256_of(path, cancel) for key, path in input_files(config)})


def _network_files(config: ApplyConfig, identity: Identity) -> list[tuple[Path, str]]:
    """(path, SHA-256) of each network's file."""
    return [(use.file, identity.inputs[f"networks.{index}.file"]) for index, use in enumerate(config.networks)]


@dataclass
class _Application:
    """The state of a run of `apply` in this process."""

    config: ApplyConfig
    planned: ApplyPlan
    device: Device
    executor: Executor
    _commits: Commits
    identity: Identity
    sink: Sink

    @property
    def position(self) -> Position:
        """What is done."""
        return self._commits.position

    def apply(self) -> None:
        """Run every pass that is not done, in smaller tiles if those of the plan do not fit in the device's memory."""
        if self.position.stage_done:
            return
        plan = self.planned.plan
        tiles = TileWork(plan.tile_px, plan.tile_step_px, self.device.name, "pass")
        tiles.do(self._apply_in_tiles, self._commits, self.sink)

    def _apply_in_tiles(self, tile_px: int) -> None:
        passes, stage = self._passes(tile_px), self.planned.stage
        done = self.position.iteration
        check_stage_space(self.config, self.planned.plan, self.position, 0)
        self.sink(StageStarted(0, 1, *stage.size, len(passes.tiles), done, stage.max_iterations))
        if not self.position.prepared:
            sums = passes.prepare()
            self.commit(records.StagePrepared(stage=0, tile_px=tile_px, content_energies={}, checksums=sums))
        else:
            if done:
                self.sink(Note(f"resuming after {count(done, 'pass')} of {stage.max_iterations}"))
            passes.check(self.position.checksums[0])
        for number in range(self.position.iteration, stage.max_iterations):
            self.executor.cancel.raise_if_set()
            self._pass(passes, number)
        self.commit(records.StageDone(stage=0, iterations=stage.max_iterations, reason="applied"))
        at = self.position
        store.delete_arrays(passes.stage_dir, set(kept_files(at.slots[0], at.checksums[0])))
        self.sink(StageDone(0, stage.max_iterations, "applied"))

    def _pass(self, passes: Passes, number: int) -> None:
        begun = time.monotonic()
        result = passes.run(number, self.position.statistics, self.position.checksums[0])
        wall = {"wall": time.monotonic() - begun}
        self.commit(
            records.Pass(
                stage=0,
                iteration=number,
                network=result.network,
                norm=result.norm,
                mean=list(result.mean),
                variance=list(result.variance),
                checksums=dict(result.checksums),
                seconds=wall,
                busy=wall,
            )
        )

    def _passes(self, tile_px: int) -> Passes:
        # these import torch, which other commands start without
        from pipeline.feedforward.passes import NetworkPasses  # noqa: PLC0415
        from pipeline.feedforward.wct_passes import WctPasses  # noqa: PLC0415

        config = self.config
        kind = NetworkPasses if self.planned.wct is None else WctPasses
        return kind(
            config,
            self.planned,
            tuple(sha256 for _, sha256 in _network_files(config, self.identity)),
            self.device.name,
            threads_of(config),
            process_gpu_bytes(config, self.planned.plan, self.device),
            stage_path(config.work_dir, 0),
            self.executor,
            self.sink,
            tile_px,
        )

    def commit(self, record: records.Record) -> None:
        """Append a record to the journal."""
        self._commits.commit(record)
