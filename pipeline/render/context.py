"""What a run, a crop and a repair need to render stages, and the journal records of their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import AnyConfig, Config
from pipeline.core.cancel import CancelToken
from pipeline.core.events import Note, Sink
from pipeline.executors import Executor, ThreadExecutor
from pipeline.network import NetworkSpec, WeightsSource
from pipeline.plan import (
    WORKERS,
    Device,
    Plan,
    StagePlan,
    layers_in_use,
    most_ahead,
    update_processes,
    update_threads,
)
from pipeline.rundir import Iteration, StagePrepared, manifest_path, read_manifest, stage_path
from pipeline.rundir.process_settings import enter_process_settings

if TYPE_CHECKING:
    from pipeline.render.measurements import IterationResult
    from pipeline.render.preparation import Prepared
    from pipeline.render.stage import Stage


@dataclass(frozen=True)
class RenderContext:
    """Device, weights, executor and event sink. `gpu_bytes`: GPU memory of the tiles of one process."""

    device: Device
    weights: WeightsSource
    executor: Executor
    sink: Sink
    gpu_bytes: int


def render_context(
    config: Config, planned: Plan, device: Device, weights: WeightsSource, executor: Executor, sink: Sink
) -> RenderContext:
    """The context of a run of `config`."""
    return RenderContext(device, weights, executor, sink, process_gpu_bytes(config, planned, device))


def process_gpu_bytes(config: AnyConfig, planned: Plan, device: Device) -> int:
    """GPU memory of the tiles of one process: worker processes share what is planned, listed devices have it each."""
    return planned.tile_device_bytes // (1 if device.processes else max(1, config.compute.workers))


def executor_for(
    config: AnyConfig,
    device: Device,
    files: Sequence[tuple[Path, str]],
    lock: int | None,
    sink: Sink,
    cancel: CancelToken,
) -> Executor:
    """The threads of this process, worker processes, which inherit the descriptor `lock` of a run's lock, or a cluster.

    A cluster's workers share the run directory, which exists, and `files`: path and SHA-256 of each network.
    Raises ConfigError for an unusable scheduler.
    """
    if not (config.compute.workers or device.processes or device.cluster):
        return ThreadExecutor(WORKERS, cancel, update_threads(device.name))
    # they bring distributed, for these cases only
    from pipeline.executors.addresses import find_scheduler  # noqa: PLC0415
    from pipeline.executors.processes import ClusterExecutor, ProcessExecutor  # noqa: PLC0415
    from pipeline.executors.worker import Role  # noqa: PLC0415

    def note(message: str) -> None:
        sink(Note(message))

    if device.cluster:
        return ClusterExecutor(
            find_scheduler(config.compute.scheduler, config.compute.cluster_key),
            config.work_dir,
            tuple(files),
            WORKERS,
            most_ahead(device),
            device.name != "cpu",
            cancel,
            note,
        )
    roles: int | list[Role] = config.compute.workers
    if device.processes:
        roles = [Role(WORKERS, 0, name) for name in device.processes]
        if isinstance(config, Config):  # `apply` has only passes over tiles
            updating = update_processes(config.compute, device)
            roles += [Role(0, update_threads(device.name, updating), "cpu")] * updating
    return ProcessExecutor(roles, WORKERS, cancel, lock, note, enter_process_settings)


def settings_of(config: Config, plan: StagePlan) -> Config:
    """The config of one stage: `stages:` may set other styles, layers and weights for its size.

    A stage that was added to a finished run has a number of iterations of its own.
    """
    own = config.for_stage(max(plan.size))
    optimizer = own.optimizer.model_copy(update={"max_iterations": plan.max_iterations})
    return own.model_copy(update={"optimizer": optimizer})


def make_stage(config: Config, plan: StagePlan, context: RenderContext, tile_px: int) -> Stage:
    """A stage of the run of `config`, with the stage's own settings, in tiles of `tile_px`."""
    from pipeline.render.stage import Stage  # noqa: PLC0415 - brings torch, which export and status do without

    config = settings_of(config, plan)
    network = NetworkSpec(
        context.weights,
        config.network.padding,
        config.network.pooling,
        config.compute.dtype,
        context.device.name,
        threads_of(config),
        context.gpu_bytes,
        config.network.pooling_scale,
    )
    return Stage(
        config=config,
        plan=plan,
        layer_use=layers_in_use(config, context.weights.widths, plan.scales),
        network=network,
        stage_dir=stage_path(config.work_dir, plan.index),
        executor=context.executor,
        sink=context.sink,
        tile_px=tile_px,
    )


def threads_of(config: AnyConfig) -> int:
    """CPU threads per tile: those that the run began with, because results depend on their number in the last bit."""
    asked = config.compute.threads
    return read_manifest(manifest_path(config.work_dir)).threads if asked == "auto" else asked


def prepared_record(stage: int, tile_px: int, prepared: Prepared) -> StagePrepared:
    """The journal record of a prepared stage; its fields are those of `Prepared`, and where it is."""
    return StagePrepared(stage=stage, tile_px=tile_px, **vars(prepared))


def iteration_record(stage: int, iteration: int, result: IterationResult) -> Iteration:
    """The journal record of an iteration; its fields are those of `IterationResult`, and where it is."""
    return Iteration(stage=stage, iteration=iteration, **vars(result))
