"""The `preview --crop` command, and what it shares with `--proof`: which runs can be cropped, and from which stage."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from pipeline.commands.export import finished_stage
from pipeline.commands.preview.crop_rendering import Crop, Finished
from pipeline.commands.preview.cut import cut_canvas
from pipeline.commands.preview.folder import Claim, claimed, folder_of
from pipeline.commands.preview.regions import scaled
from pipeline.commands.status import refuse_cleaned
from pipeline.config import Config
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError
from pipeline.core.events import Sink, ignore
from pipeline.core.files import taken
from pipeline.core.tiling import Rect, Size
from pipeline.executors import Executor, ThreadExecutor
from pipeline.images import check_output
from pipeline.network import WeightsSource, find_weights, widths_for_plan
from pipeline.plan import WORKERS, Device, Plan, layers_in_use, resolve_device, with_added_stages
from pipeline.render.context import render_context
from pipeline.render.resample import Region
from pipeline.rundir import (
    Journal,
    Position,
    Record,
    identity,
    iterations_of,
    journal_path,
    manifest_path,
    newest_canvas,
    plan_on,
    refuse_changes,
    refuse_links,
    refuse_missing_folder,
    refuse_other_stages,
    resolved,
    standing,
    trusted_manifest,
)
from pipeline.rundir.process_settings import process_settings


@dataclass(frozen=True)
class CropSpec:
    """What to crop, and the file to write.

    `rect`: in px of the finished image. `stage`: index of the last stage to render; default the run's last. `output`:
    default beside the config's output. `force`: overwrite a file that no preview of this config wrote.
    """

    rect: Rect
    stage: int | None = None
    output: Path | None = None
    force: bool = False


@process_settings()
def crop(config: Config, spec: CropSpec, *, sink: Sink = ignore, stop: threading.Event | None = None) -> Path:
    """Render a part of the image as the run of `config` will, starting from the last stage that it has finished.

    The result has the size of the part at the last stage that is rendered. Raises ConfigError if no stage of the run is
    finished, and the errors of errors.py.
    """
    rect = spec.rect
    target_file = spec.output or folder_of(config).with_name(f"{config.output.stem}.crop.png")
    crops = Crops.of(resolved(config), sink, stop)
    last = len(crops.plan.stages) - 1
    target = last if spec.stage is None else spec.stage
    if not 0 <= target <= last:
        raise ConfigError(f"--stage {target + 1}: the run's stages are 1 to {last + 1}.")
    _refuse_outside(rect, crops.plan.stages[last].size)
    _refuse_carried(config, crops.plan)
    own = scaled(rect, crops.plan.stages[last].size, crops.plan.stages[target].size)
    if spec.output is not None:
        refuse_missing_folder(spec.output)
    check_output(target_file, own.width, own.height, 8, "deflate")
    claim_of = partial(claimed, crops.config, target_file, spec.force)
    with crops.rendered([rect], target, claim_of) as (canvases, claim, _folder):
        space = crops.config.canvas_space
        cut_canvas(canvases[0], own, target_file, CancelToken(stop), claim.record, space)
        claim.done()
    return target_file


@dataclass(frozen=True)
class Crops:
    """Renders parts of the image of a run.

    `plan`: with less memory than the run's own, and with the stages that were added to it; `begun_with`: without those.
    `run`: its records and its position, None if it has not begun.
    """

    config: Config
    device: Device
    plan: Plan
    begun_with: Plan
    run: tuple[list[Record], Position] | None
    sink: Sink
    stop: threading.Event | None

    @classmethod
    def of(cls, config: Config, sink: Sink, stop: threading.Event | None) -> Self:
        """Plan the crops of a config. Raises ConfigError, InputError."""
        device = resolve_device(config.compute.device)
        begun_with = _planned(config, device)
        run = standing(Journal(journal_path(config.work_dir))) if taken(manifest_path(config.work_dir)) else None
        plan = begun_with if run is None else with_added_stages(begun_with, run[1].added)
        return cls(config, device, plan, begun_with, run, sink, stop)

    @contextmanager
    def rendered(
        self, rects: Sequence[Rect], target: int, claim_of: Callable[[], AbstractContextManager[Claim]]
    ) -> Iterator[tuple[list[Region], Claim, Path]]:
        """The canvas of stage `target` around each of `rects`, which are of the finished image.

        With the claim of the file to write, and a folder for files that are deleted at the end. Raises ConfigError if
        the run cannot be cropped.
        """
        config = self.config
        with ThreadExecutor(WORKERS, CancelToken(self.stop)) as executor:
            weights = find_weights(config.network.name, config.network.weights, config.seed, self.sink, executor.cancel)
            finished = self._finished(weights, target, executor)
            if finished.stage < target:
                _refuse_carried(config, self.plan)
            with claim_of() as claim, _temporary_folder(claim.folder / "crop") as folder:
                context = render_context(config, self.plan, self.device, weights, executor, self.sink)
                canvases: list[Region] = []
                for index, rect in enumerate(rects):
                    if canvases and finished.stage == target:
                        canvases.append(canvases[0])  # the whole canvas
                        continue
                    own_folder = folder / str(index)
                    own_folder.mkdir()
                    canvases.append(Crop(config, self.plan, context, finished, own_folder).render(rect, target))
                yield canvases, claim, folder

    def _finished(self, weights: WeightsSource, target: int, executor: Executor) -> Finished:
        """The last finished stage, up to `target`. Raises ConfigError if there is none or the config differs."""
        work_dir = self.config.work_dir
        remedy = (
            "A crop starts from a finished stage: start `pipeline run`, and stop it with Ctrl-C after its first stage."
        )
        if self.run is None:
            raise ConfigError(f"{work_dir}: there is no run of this config yet, so no stage is finished. {remedy}")
        records, position = self.run
        stages = [index for index in position.slots if finished_stage(position, index) and index <= target]
        refuse_cleaned(work_dir, position)
        if not stages:
            raise ConfigError(f"{work_dir}: the run has not finished its first stage yet. {remedy}")
        manifest = trusted_manifest(manifest_path(work_dir), records)
        refuse_changes(self.config, manifest, identity(self.config, weights, executor.cancel))
        refuse_other_stages(self.config, manifest, self.begun_with)
        refuse_links(work_dir)
        newest = max(stages)
        canvas = newest_canvas(work_dir, position, newest)
        iterations = iterations_of(records, newest)
        first_max_u = next((record.max_abs_u for record in reversed(iterations) if record.iteration == 0), 0.0)
        return Finished(newest, canvas, first_max_u, manifest.threads, position.tile_px)


def _refuse_outside(rect: Rect, size: Size) -> None:
    if not rect.area or rect.y0 < 0 or rect.x0 < 0 or rect.y1 > size[0] or rect.x1 > size[1]:
        raise ConfigError(
            f"--crop {rect.x0},{rect.y0},{rect.width},{rect.height}: is not inside the image, which has "
            f"{size[1]}×{size[0]} px. Give x,y,width,height within it; x,y is the upper left corner."
        )


def _refuse_carried(config: Config, planned: Plan) -> None:
    if any(config.for_stage(max(stage.size)).optimizer.carry for stage in planned.stages[1:]):
        raise ConfigError(
            "--crop, --proof: a crop starts every stage with fresh moments, and optimizer.carry continues those of the "
            "stage before, so that the crop would not look like the run. Preview without it, or switch carry off."
        )


def _planned(config: Config, device: Device) -> Plan:
    """The run's plan with less memory, because a crop also keeps the Gram matrices of the whole and of the region.

    Raises ConfigError if no tile size fits.
    """
    widths = widths_for_plan(config.network.name, config.network.weights, config.limits.max_weights_bytes)
    stages = [(config.for_stage(max(stage.size)), stage.scales) for stage in plan_on(config, device).stages]
    grams_bytes = 4 * max(layers_in_use(own, widths, scales).grams_bytes() for own, scales in stages)
    memory = config.memory.model_copy(update={"limit": config.memory.limit_bytes - grams_bytes})
    try:
        return plan_on(config.model_copy(update={"memory": memory}), device)
    except ConfigError as error:
        raise ConfigError(
            f"--crop: {grams_bytes / 2**20:.0f} MiB of memory.limit are for the whole image's Gram matrices, which "
            f"leaves too little for the rest. {error}"
        ) from error


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """Create an empty folder, deleted afterwards; what a killed preview left there is discarded."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
