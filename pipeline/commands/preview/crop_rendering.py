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

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import store
from pipeline.commands.commits import end_reason
from pipeline.commands.preview.cut import cut_file
from pipeline.commands.preview.regions import aligned, regions, scaled
from pipeline.config import Config
from pipeline.core.events import Note, reporter
from pipeline.core.image_formats import RGB8
from pipeline.core.text import stage_name
from pipeline.core.tiling import Rect, Size
from pipeline.core.vgg_layers import ALIGN_PX, ceil_to
from pipeline.plan import Plan, StageWork, layers_in_use, plan_stage
from pipeline.render import adam, ingest
from pipeline.render.context import RenderContext, iteration_record, make_stage, prepared_record, settings_of
from pipeline.render.resample import Filling, Region, enlarge, whole
from pipeline.rundir import Position, newest_canvas
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


@dataclass(frozen=True)
class Finished:
    """The finished stage that a crop starts from: its canvas, and the run's threads and tile size.

    `first_max_u`: max|u| of its first iteration.
    """

    stage: int
    canvas: store.StageArray
    first_max_u: float
    threads: int
    tile_px: int | None


@dataclass
class Crop:
    """Renders a region, stage by stage, in a temporary run directory `folder`."""

    config: Config
    plan: Plan
    context: RenderContext
    finished: Finished
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
        return reporter(self.context.sink, self.finished.stage, what)
