"""Rendering a crop of the image at full resolution, before the run has come that far.

The run has finished a stage, f. Of each later stage, only a region is rendered: the crop with a margin, so that the
region's own border, which the network treats as an image border, has no effect in the crop. The statistics of the
whole image are estimated from stage f, where the whole and the region are known, and from the changes of the region:

    G_whole(i)  =  G_whole(f) + (G_region(i) − G_region(f))              Gram matrices, at every iteration of stage i
    E_whole(i)  =  E_whole(f) · E_region(i) / E_region(f)                energy of the content's features, per position

For the Wasserstein loss, which needs covariances, the map between the region's normal distributions at f and at i is
applied to the whole's at f instead of the sum (wasserstein.carried).

All else can be computed in the region, because the objective is per pixel. This includes masks (losses/masks.py): the
area n_r,l of a mask r in the whole image cancels in N · (n_r,l/n_l) · (4/n_r,l), so the seed at a position x is

    w_s · (N/n_l) · Σ_r 4·λ_l/‖G_r(s)‖² · (G_r,whole − G_r(s)) · M_r,l(x) φ_l(x)                     N/n_l = stride²

Only G_r,whole is not the region's. It is estimated as above, per mask, from mask-weighted means: the sums of M_r·φφ^T
and of M_r are both taken over the whole image or both over the region. So a mask that covers little of the region has
its full effect there, and one that covers nothing of it needs no estimate. For a mask that stage f does not have, the
region's own Gram is used. The content's weight map is a factor at x and appears in none of these sums.

The run directory is only read, and the run may be active.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pipeline import store
from pipeline.commands.export import finished_stage
from pipeline.commands.preview.cut import cut_canvas, cut_file
from pipeline.commands.preview.folder import Claim, claimed, folder_of
from pipeline.commands.preview.regions import aligned, regions, scaled
from pipeline.commands.run import end_reason
from pipeline.commands.status import refuse_cleaned
from pipeline.config import Config
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError
from pipeline.core.events import Note, Sink, WorkDone, ignore
from pipeline.core.files import taken
from pipeline.core.image_formats import RGB8
from pipeline.core.text import stage_name
from pipeline.core.tiling import Rect, Size
from pipeline.core.vgg_layers import ALIGN_PX, ceil_to
from pipeline.executors import Executor, ThreadExecutor
from pipeline.images import check_output
from pipeline.network import WeightsSource, find_weights, widths_for_plan
from pipeline.plan import WORKERS, Device, Plan, StageWork, layers_in_use, plan_stage, resolve_device, with_added_stages
from pipeline.render import adam, ingest
from pipeline.render.context import (
    RenderContext,
    iteration_record,
    make_stage,
    prepared_record,
    render_context,
    settings_of,
)
from pipeline.render.resample import Filling, Region, enlarge, whole
from pipeline.rundir import (
    Iteration,
    Journal,
    Position,
    identity,
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
from pipeline.store import CONTENT, integrity

if TYPE_CHECKING:
    from pipeline.commands.preview.whole_image import WholeImage
    from pipeline.losses.color import ColorStatistics
    from pipeline.render.measurements import IterationResult
    from pipeline.render.stage import Stage

CANVAS = "canvas_0"
# Added to the margin, which is exact for one iteration only: an error at the region's border spreads inward with every
# iteration. 96 px gained 2.3 dB against the run; more was not tried (docs/log.md).
_SPREAD_PX = 96


@process_settings()
def crop(
    config: Config,
    rect: Rect,
    *,
    stage: int | None = None,
    output: Path | None = None,
    force: bool = False,
    sink: Sink = ignore,
    stop: threading.Event | None = None,
) -> Path:
    """Render a part of the image as the run of `config` will, starting from the last stage that it has finished.

    `rect`: in px of the finished image. `stage`: index of the last stage to render; default the run's last. The
    result has the size of `rect` at that stage. `output`: default beside the config's output. `force`: overwrite a file
    that no preview of this config wrote. Raises ConfigError if no stage of the run is finished, and the errors of
    errors.py.
    """
    target_file = output or folder_of(config).with_name(f"{config.output.stem}.crop.png")
    crops = Crops.of(resolved(config), sink, stop)
    last = len(crops.plan.stages) - 1
    target = last if stage is None else stage
    if not 0 <= target <= last:
        raise ConfigError(f"--stage {target + 1}: the run's stages are 1 to {last + 1}.")
    _refuse_outside(rect, crops.plan.stages[last].size)
    _refuse_carried(config, crops.plan)
    own = scaled(rect, crops.plan.stages[last].size, crops.plan.stages[target].size)
    if output is not None:
        refuse_missing_folder(output)
    check_output(target_file, own.width, own.height, 8, "deflate")
    claim_of = partial(claimed, crops.config, target_file, force)
    with crops.rendered([rect], target, claim_of) as (canvases, claim, _folder):
        space = crops.config.canvas_space
        cut_canvas(canvases[0], own, target_file, CancelToken(stop), claim.record, space)
        claim.done()
    return target_file


@dataclass(frozen=True)
class Crops:
    """Renders parts of the image of a run.

    `plan`: with less memory than the run's own, and with the stages that were added to it; `begun_with`: without those.
    """

    config: Config
    device: Device
    plan: Plan
    begun_with: Plan
    sink: Sink
    stop: threading.Event | None

    @classmethod
    def of(cls, config: Config, sink: Sink, stop: threading.Event | None) -> Self:
        """Plan the crops of a config. Raises ConfigError, InputError."""
        device = resolve_device(config.compute.device)
        begun_with = _planned(config, device)
        plan = with_added_stages(begun_with, _added(config.work_dir))
        return cls(config, device, plan, begun_with, sink, stop)

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
            finished = _finished(config, self.begun_with, weights, target, executor)
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


def _added(work_dir: Path) -> tuple[int, ...]:
    """The iterations of the stages that were added to the run, if there is one."""
    return standing(Journal(journal_path(work_dir)))[1].added if taken(manifest_path(work_dir)) else ()


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


@dataclass(frozen=True)
class _Finished:
    """The finished stage that a crop starts from: its canvas, and the run's threads and tile size.

    `first_max_u`: max|u| of its first iteration.
    """

    stage: int
    canvas: store.StageArray
    first_max_u: float
    threads: int
    tile_px: int | None


def _finished(config: Config, planned: Plan, weights: WeightsSource, target: int, executor: Executor) -> _Finished:
    """The last finished stage of the run, up to `target`. Raises ConfigError if there is none or the config differs."""
    remedy = "A crop starts from a finished stage: start `pipeline run`, and stop it with Ctrl-C after its first stage."
    if not taken(manifest_path(config.work_dir)):
        raise ConfigError(f"{config.work_dir}: there is no run of this config yet, so no stage is finished. {remedy}")
    records, position = standing(Journal(journal_path(config.work_dir)))
    stages = [index for index in position.slots if finished_stage(position, index) and index <= target]
    refuse_cleaned(config.work_dir, position)
    if not stages:
        raise ConfigError(f"{config.work_dir}: the run has not finished its first stage yet. {remedy}")
    manifest = trusted_manifest(manifest_path(config.work_dir), records)
    refuse_changes(config, manifest, identity(config, weights, executor.cancel))
    refuse_other_stages(config, manifest, planned)
    refuse_links(config.work_dir)
    newest = max(stages)
    canvas = newest_canvas(config.work_dir, position, newest)
    iterations = [record for record in records if isinstance(record, Iteration) and record.stage == newest]
    first_max_u = next((record.max_abs_u for record in reversed(iterations) if record.iteration == 0), 0.0)
    return _Finished(newest, canvas, first_max_u, manifest.threads, position.tile_px)


@dataclass
class Crop:
    """Renders a region, stage by stage, in a temporary run directory `folder`."""

    config: Config
    plan: Plan
    context: RenderContext
    finished: _Finished
    folder: Path
    _position: Position = field(default_factory=Position)

    def render(self, rect: Rect, target: int) -> Region:
        """The canvas of stage `target`, or a part of it that contains `rect`, which is of the finished image."""
        executor, first = self.context.executor, self.finished.stage + 1
        source = whole(self.finished.canvas)
        integrity.require_intact([source.array], executor, self._progress("check"))
        if target < first:
            self.context.sink(Note(f"{stage_name(target)} is finished: its canvas is cropped, and nothing is rendered"))
            return source
        sizes = [stage.size for stage in self.plan.stages[first : target + 1]]
        layer_uses = [self._stage(index, size).layer_use for index, size in enumerate(sizes, start=first)]
        own = scaled(rect, self.plan.stages[-1].size, sizes[-1])
        # at the coarsest scale a pixel depends on as many more px of the canvas
        around = [(2 * use.halo_px << use.scales - 1) + _SPREAD_PX for use in layer_uses]
        whole_image = self._whole_image()
        for index, region in enumerate(regions(own, sizes, around, self._align_px), start=first):
            size = self.plan.stages[index].size
            text = f"{stage_name(index)}: {region.width}×{region.height} px of {size[1]}×{size[0]} around the crop"
            self.context.sink(Note(text))
            source = self._render_stage(index, region, source, whole_image)
        return source

    @property
    def _align_px(self) -> int:
        """What the edges of a region are aligned to: whole pooling windows at every scale."""
        return ALIGN_PX << max(stage.scales for stage in self.plan.stages) - 1

    def _stage(self, index: int, size: Size) -> Stage:
        """The stage of the run with a canvas of this size, in the temporary run directory."""
        config = settings_of(self.config, self.plan.stages[index])
        compute = config.compute.model_copy(update={"threads": self.finished.threads})
        config = config.model_copy(update={"stages": (), "compute": compute, "work_dir": self.folder})
        layer_use = layers_in_use(config, self.context.weights.widths, self.plan.stages[index].scales)
        styles = self.plan.stages[index].style_sizes
        longest = ceil_to(max(side for sides in (size, *styles) for side in sides), self.plan.tile_step_px)
        tile_px = min(self.finished.tile_px or longest, self.plan.tile_px, longest)
        content = None if config.content is None else RGB8  # the crop's own copy of it has 8 bits and no alpha
        alphas = (True,) * len(styles)  # they may have
        plan = plan_stage(StageWork(config, layer_use, size, styles, content, alphas), index, tile_px)
        return make_stage(config, plan, self.context, tile_px)

    def _render_stage(self, index: int, region: Rect, source: Region, whole_image: WholeImage) -> Region:
        # These import torch, which `export` and `status` must not wait for.
        from pipeline.render.iteration import Iterations  # noqa: PLC0415
        from pipeline.render.preparation import prepare  # noqa: PLC0415

        stage = self._stage(index, (region.height, region.width))
        size = self.plan.stages[index].size
        estimate = whole_image.estimate(
            stage, aligned(scaled(region, size, whole_image.size), whole_image.size, self._align_px)
        )
        colors = self._cut(stage, region, size)
        prepared = prepare(stage, self._start(stage, source, region, size), colors, is_region=True)
        energies = {key: energy * estimate.energies.get(key, 1.0) for key, energy in prepared.content_energies.items()}
        record = prepared_record(index, stage.tile_px, replace(prepared, content_energies=energies))
        self._position = Position().after(record)
        least_max_u = 0.0 if stage.plan.size == size else self._least_max_u(stage)
        iterations = Iterations(stage, energies, prepared.areas, estimate.grams, least_max_u)
        while end_reason(self._position, stage.config.optimizer) is None:
            self.context.executor.cancel.raise_if_set()
            commit = partial(self._commit, stage)
            at = self._position
            iterations.iterate(at.iteration, at.alpha, at.checksums[index], commit)
        return Region(newest_canvas(self.folder, self._position, index), region, size)

    def _cut(self, stage: Stage, region: Rect, size: Size) -> ColorStatistics | None:
        """Cut the stage's content and masks to the region; returns the colour statistics of the whole content."""
        config, cancel = stage.config, self.context.executor.cancel
        # By path, so that styles with the same mask still share it.
        cuts = {path: self.folder / f"mask_{stage.plan.index}_{number}.png" for number, path in enumerate(config.masks)}
        for path, cut in cuts.items():
            cut_file(path, size, region, cut, cancel)
        styles = tuple(
            style.model_copy(update={"mask": cuts[style.mask]}) if style.mask else style for style in config.styles
        )
        content_mask = config.loss.content_mask
        loss = config.loss.model_copy(update={"content_mask": cuts[content_mask] if content_mask else None})
        content = None if config.content is None else self.folder / f"content_{stage.plan.index}.png"
        stage.config = config.model_copy(update={"content": content, "styles": styles, "loss": loss})
        if config.content is None or content is None:
            return None
        return cut_file(config.content, size, region, content, cancel, ingest.canvas_colors(config).space)

    def _least_max_u(self, stage: Stage) -> float:
        """A lower bound of max|u| in the whole image's first iteration: as close to the largest possible as at stage f.

        It sets the step size. A region that masks leave with small gradients would otherwise take too large steps.
        """
        own, finished = stage.config.optimizer, self.config.for_stage(max(self.plan.stages[self.finished.stage].size))
        limit, limit_then = (adam.first_max_update(at.beta1, at.beta2, 0.0, 1.0) for at in (own, finished.optimizer))
        return self.finished.first_max_u / limit_then * limit

    def _commit(self, stage: Stage, result: IterationResult) -> bool:
        """Advance the position, without a journal: a crop that is stopped starts again. Returns whether to continue."""
        settings, at = stage.config.optimizer, self._position
        self._position = at.after(iteration_record(stage.plan.index, at.iteration, result))
        self._progress(f"{stage_name(stage.plan.index)} of the crop")(self._position.iteration, settings.max_iterations)
        return end_reason(self._position, settings) is None

    def _start(self, stage: Stage, source: Region, region: Rect, size: Size) -> store.StageArray:
        """The region of the previous stage's canvas, enlarged."""
        canvas = self._new_array(CANVAS, stage.plan.size, "float64" if stage.config.state == "float64" else "float32")
        filling = Filling(smoothing=self.config.stage_smoothing)
        sums = enlarge(source, Region(canvas, region, size), self.context.executor, filling=filling)
        return store.open_array(canvas.path.parent, CANVAS, sums)

    def _new_array(self, name: str, size: Size, form: str) -> store.StageArray:
        """An RGB array of zeros in a stage folder of its own."""
        folder = self.folder / f"{name}_only"
        store.create_stage(folder)
        store.create_array(folder, name, (*size, 3), self.config.store.chunk_px, form, "none")
        return store.open_array(folder, name)

    def _whole_image(self) -> WholeImage:
        """The finished stage, and the content at its size."""
        from pipeline.commands.preview.whole_image import WholeImage  # noqa: PLC0415

        finished, masks = self.finished, self.folder / "whole_masks"
        return WholeImage(finished.stage, finished.canvas, self._whole_content(), self.plan.tile_px, masks)

    def _whole_content(self) -> store.StageArray | None:
        if self.config.content is None:
            return None
        content = self._new_array(CONTENT, self.plan.stages[self.finished.stage].size, "uint8")
        colors = ingest.canvas_colors(self.config)
        sums = ingest.ingest(self.config.content, content, self.context.executor, self._progress("content"), colors)
        return store.open_array(content.path.parent, CONTENT, sums)

    def _progress(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.context.sink(WorkDone(self.finished.stage, what, done, total))
