"""What a run, a crop and a repair need to render stages, and the journal records of their results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.core.events import Sink
from pipeline.executors import Executor
from pipeline.network import NetworkSpec, WeightsSource
from pipeline.plan import Device, Plan, StagePlan, layers_in_use
from pipeline.rundir import Iteration, StagePrepared, manifest_path, read_manifest, stage_path

if TYPE_CHECKING:
    from pipeline.render.measurements import IterationResult
    from pipeline.render.preparation import Prepared
    from pipeline.render.stage import Stage


@dataclass(frozen=True)
class RenderContext:
    """Device, weights, executor and event sink. `gpu_bytes`: GPU memory that one process may use."""

    device: Device
    weights: WeightsSource
    executor: Executor
    sink: Sink
    gpu_bytes: int


def render_context(
    config: Config, planned: Plan, device: Device, weights: WeightsSource, executor: Executor, sink: Sink
) -> RenderContext:
    """The context of a run of `config`; the plan's device memory is shared by all its worker processes."""
    return RenderContext(device, weights, executor, sink, planned.device_bytes // max(1, config.compute.workers))


def make_stage(config: Config, plan: StagePlan, context: RenderContext, tile_px: int) -> Stage:
    """A stage of the run of `config`, with the stage's own settings, in tiles of `tile_px`."""
    from pipeline.render.stage import Stage  # noqa: PLC0415 - brings torch, which export and status do without

    config = config.for_stage(max(plan.size))  # `stages:` may set other styles, layers and weights for this size
    network = NetworkSpec(
        context.weights,
        config.network.padding,
        config.network.pooling,
        config.compute.dtype,
        context.device.name,
        _threads(config),
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


def _threads(config: Config) -> int:
    """CPU threads per tile: those that the run began with, because results depend on their number in the last bit."""
    asked = config.compute.threads
    return read_manifest(manifest_path(config.work_dir)).threads if asked == "auto" else asked


def prepared_record(stage: int, tile_px: int, prepared: Prepared) -> StagePrepared:
    """The journal record of a prepared stage; its fields are those of `Prepared`, and where it is."""
    return StagePrepared(stage=stage, tile_px=tile_px, **vars(prepared))


def iteration_record(stage: int, iteration: int, result: IterationResult) -> Iteration:
    """The journal record of an iteration; its fields are those of `IterationResult`, and where it is."""
    return Iteration(stage=stage, iteration=iteration, **vars(result))
