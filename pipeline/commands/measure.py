"""Measures for a few seconds how fast this machine renders, by rendering noise with the settings of a run.

The iterations are the run's own: its network, losses, device, number format and executor, on the disk of its run
directory, at the sizes of its first stages. What they take is extrapolated to its other stages (plan/duration.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import Config, StyleConfig
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError, PipelineError, Stopped
from pipeline.core.events import Note, Sink, ignore
from pipeline.core.files import new_partial, remove
from pipeline.core.image_formats import RGB8
from pipeline.core.text import duration, energy_text
from pipeline.core.tiling import Size
from pipeline.core.vgg_layers import ALIGN_PX, ceil_to, min_side_px
from pipeline.images import write_rows
from pipeline.network import find_weights
from pipeline.plan import (
    Plan,
    Speed,
    StagePlan,
    StageWork,
    export_s,
    layers_in_use,
    plan_stage,
    run_device,
    slowness,
    tile_threads,
)
from pipeline.plan.power import Power, PowerMeter
from pipeline.render.context import RenderContext, executor_for, make_stage, render_context, settings_of
from pipeline.rundir import output_colors, resolved
from pipeline.rundir.process_settings import process_settings

if TYPE_CHECKING:
    from pipeline.render.measurements import IterationResult
    from pipeline.render.stage import Stage

BUDGET_S = 5.0
# A larger canvas would take more of the disk than a measurement should, and a GPU is busy with this one.
_LARGEST_PX = 1536
_ITERATIONS = 3  # of each size at least, of which the first does not count
# A run of fewer seconds, with a guess of the speed, is over before a measurement of it is worth its time.
_WORTH_MEASURING_S = 60.0
_FLOP_PER_S, _ITERATION_S = {"cpu": 3e10, "gpu": 2e13}, 0.1


@dataclass(frozen=True)
class Forecast:
    """Seconds of every stage and of writing the image, and the power that the machine draws meanwhile."""

    stages_s: tuple[float, ...]
    export_s: float
    power: Power

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(self.stages_s) + self.export_s

    @property
    def text(self) -> str:
        """The whole run in one line."""
        needs = f"about {duration(self.seconds)} and {energy_text(self.seconds * self.power.watts)}"
        return f"the run takes {needs}, at {self.power.watts:.0f} W ({self.power.source})"

    def as_dict(self) -> dict[str, Any]:
        """The forecast as JSON-able data."""
        energy_kwh = self.seconds * self.power.watts / 3.6e6
        return {**asdict(self), "seconds": self.seconds, "energy_kwh": energy_kwh}


def is_worth_measuring(planned: Plan) -> bool:
    """Whether a run takes so long that its start may take a few seconds more."""
    iterations = sum(stage.max_iterations for stage in planned.stages)
    work_s = planned.flop / _FLOP_PER_S["cpu" if planned.device == "cpu" else "gpu"]
    return work_s + _ITERATION_S * iterations > _WORTH_MEASURING_S


def forecast(
    config: Config, planned: Plan, context: RenderContext, watts: float | None = None
) -> tuple[Speed, Forecast] | None:
    """What was measured, and the time and energy of a whole run; None if nothing could be measured.

    `watts`: the power of the machine while it works, measured or assumed if not given.
    Raises Stopped; whatever was written is deleted.
    """
    context.sink(Note(f"measuring the speed of {context.device.name} for {BUDGET_S:.0f} s"))
    speed = Speed()
    try:
        with PowerMeter(context.device.name) as meter, _folder_beside(config.work_dir) as folder:
            _measure(config, planned, replace(context, sink=ignore), folder, speed)
    except Stopped:
        raise
    except (PipelineError, OSError) as error:  # the run itself will report what concerns it too
        context.sink(Note(f"the speed could not be measured: {error}"))
        return None
    stages = [speed.stage_s(stage) for stage in planned.stages]
    known = tuple(seconds for seconds in stages if seconds is not None)
    power = meter.power() if watts is None else Power(watts, "as given")
    speed.export_s = _image_s(config, planned)
    return (speed, Forecast(known, speed.export_s * slowness(), power)) if known else None


def starting_speed(
    config: Config, planned: Plan, context: RenderContext, watts: float | None, *, begins: bool
) -> Speed:
    """What is known of this machine's speed when a run starts: measured, and told, if the run `begins` and is long."""
    if begins and is_worth_measuring(planned) and (measured := forecast(config, planned, context, watts)):
        speed, expected = measured
        context.sink(Note(expected.text))
        return speed
    return Speed(export_s=_image_s(config, planned))


def _image_s(config: Config, planned: Plan) -> float:
    """Seconds that writing the images of a run takes, if no other program runs."""
    colors = output_colors(config.export, config.canvas_space, config.content)
    return export_s(planned, config.export.compression, colors.by_tables)


@process_settings()
def measured_time(
    config: Config,
    planned: Plan,
    *,
    watts: float | None = None,
    sink: Sink = ignore,
    stop: threading.Event | None = None,
) -> Forecast | None:
    """The time and energy of a whole run on this machine, measured for some seconds; None if that was not possible.

    `watts`: the power of the machine while it works, for the energy; measured or assumed if not given.
    Raises Stopped, and InputError for weights that cannot be used.
    """
    if config.compute.scheduler != "none":
        raise ConfigError(
            "--time measures this machine, and compute.scheduler names a cluster: start the run, which measures it."
        )
    config, cancel, device = resolved(config), CancelToken(stop), run_device(config.compute, CancelToken(stop))
    weights = find_weights(config.network.name, config.network.weights, config.seed, sink, cancel)
    with executor_for(config, device, weights.files, None, sink, cancel) as executor:
        found = forecast(config, planned, render_context(config, planned, device, weights, executor, sink), watts)
    return None if found is None else found[1]


@contextmanager
def _folder_beside(work_dir: Path) -> Iterator[Path]:
    """A folder on the disk of the run, deleted afterwards; what a killed measurement left there is deleted first."""
    with ExitStack() as stack:
        # folders that are made for it alone are removed with it
        for parent in [path for path in reversed(work_dir.parents) if not path.exists()]:
            parent.mkdir()
            stack.callback(_remove_empty, parent)
        folder = new_partial(work_dir)
        folder.mkdir()
        stack.callback(remove, folder)
        yield folder


def _remove_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


def _measure(config: Config, planned: Plan, context: RenderContext, folder: Path, speed: Speed) -> None:
    """Render noise at growing sizes for as long as the next size fits the budget."""
    end = time.monotonic() + BUDGET_S
    for number, (stage_plan, size) in enumerate(_sizes(config, planned, context)):
        stage = _stage(config, planned, stage_plan, size, context, folder / str(number))
        # preparing costs about as much as an iteration
        expected_s = speed.iterations.seconds_for(stage.plan.flop_per_iteration)
        if expected_s is not None and time.monotonic() + (_ITERATIONS + 1) * expected_s > end:
            return
        _iterate(stage, speed, end, is_warm=number > 0)


def _sizes(config: Config, planned: Plan, context: RenderContext) -> Iterator[tuple[StagePlan, Size]]:
    """(stage, size) of each canvas: half the first stage's, which tells what every iteration costs, then all."""
    first = planned.stages[0]
    layers = layers_in_use(settings_of(config, first), context.weights.widths, 1).names
    half = (ceil_to(first.size[0] // 2, ALIGN_PX), ceil_to(first.size[1] // 2, ALIGN_PX))
    if min(half) >= min_side_px(layers, config.network.padding):
        yield first, half
    for stage in planned.stages:
        if max(stage.size) > min(planned.tile_px, _LARGEST_PX):
            return
        yield stage, stage.size


def _stage(
    config: Config, planned: Plan, stage_plan: StagePlan, size: Size, context: RenderContext, folder: Path
) -> Stage:
    """A stage of the run with a canvas of this (height, width) and a style of noise, in a run directory of its own."""
    folder.mkdir()
    image = folder / "noise.png"
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    write_rows(iter([noise]), image, size, context.executor.cancel)
    own = settings_of(config, stage_plan)
    own = own.model_copy(
        update={
            "content": None if config.content is None else image,
            "styles": (StyleConfig(image=image),),
            "init": "noise",
            "stages": (),
            "work_dir": folder,
            "loss": own.loss.model_copy(update={"content_mask": None}),
            "compute": own.compute.model_copy(update={"threads": tile_threads(config.compute)}),
            "color": "style",
        }
    )
    content = None if config.content is None else RGB8
    tile_px = ceil_to(max(size), planned.tile_step_px)
    layer_use = layers_in_use(own, context.weights.widths)
    work = StageWork(own, layer_use, size, (size,), content, (False,))
    plan = plan_stage(work, stage_plan.index, tile_px, resident=stage_plan.resident_bytes)
    return make_stage(own, plan, context, tile_px)


def _iterate(stage: Stage, speed: Speed, end: float, is_warm: bool) -> None:
    """Iterate a few times, and count all iterations but the first.

    The stage is in memory if the run's is. `is_warm`: the weights are loaded, so that the preparation counts.
    """
    from pipeline.render.iteration import Iterations  # noqa: PLC0415 - brings torch
    from pipeline.render.preparation import prepare  # noqa: PLC0415 - likewise
    from pipeline.render.residency import resident  # noqa: PLC0415 - likewise

    begun = time.monotonic()
    prepared = prepare(stage, None)
    if is_warm:
        speed.preparations.add(stage.plan.prepare_flop, time.monotonic() - begun)
    iterations = Iterations(stage, prepared.content_energies, prepared.areas)
    alpha, checksums = None, dict(prepared.checksums)
    results: list[IterationResult] = []

    def commit(result: IterationResult) -> bool:
        results.append(result)
        return True

    most = min(4 * _ITERATIONS, stage.plan.max_iterations)
    with resident(stage, 0, checksums) if stage.plan.resident_bytes else nullcontext():
        while len(results) < most and (len(results) < _ITERATIONS or time.monotonic() < end):
            stage.executor.cancel.raise_if_set()
            iterations.iterate(len(results), alpha, checksums, commit)
            alpha, checksums = results[-1].alpha, {**checksums, **results[-1].checksums}
            if len(results) > 1 or most == 1:
                speed.iterations.add(stage.plan.flop_per_iteration, results[-1].busy["wall"])
