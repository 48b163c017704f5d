"""A part of the picture at full resolution, before the run has come that far.

The run has finished a stage, f. Of the stages behind it, only a region is rendered: the crop, with enough around it
that the region's own border, which the network takes for that of a picture, does not reach into it. What a stage knows
of the whole picture is estimated from stage f, where both are known, and the region, which changes on its own:

    G_whole(i)  =  G_whole(f) + (G_region(i) − G_region(f))              Gram matrices, at every iteration of stage i
    E_whole(i)  =  E_whole(f) · E_region(i) / E_region(f)                energy of the content's features, per position

All else is the region's own: every number of the objective is per pixel. So it is with masks (guidance.py): n_r,l, what
there is of a mask r in the whole picture, cancels in N · (n_r,l/n_l) · (4/n_r,l), and the seed at a position x is

    w_s · (N/n_l) · Σ_r 4·λ_l/‖G_r(s)‖² · (G_r,whole − G_r(s)) · M_r,l(x) φ_l(x)                     N/n_l = stride²

Only G_r,whole is not the region's. It is estimated as above, mask by mask, from means that the mask weighs: the sums of
M_r·φφ^T and of M_r are both the whole picture's, or both the region's. So a region with little of a mask paints neither
stronger nor weaker there, and one with nothing of it needs nothing of it. What stage f has nothing of, the region says
for the whole. The map of the content's weight is a factor at x, and in none of these numbers.

The run itself is only read, and may go on.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import store
from pipeline.commands.export import finished_stage
from pipeline.commands.preview.cut import cut_canvas, cut_file
from pipeline.commands.preview.folder import claimed, folder_of
from pipeline.commands.run import end_reason
from pipeline.config.config import Config
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError
from pipeline.core.events import Note, Sink, WorkDone, ignore
from pipeline.core.files import taken
from pipeline.core.image_formats import RGB8
from pipeline.core.tiling import Rect, Size
from pipeline.core.vgg_layers import ALIGN_PX, ceil_to, halo_px
from pipeline.executors.threads import Engine
from pipeline.images.output_check import check_output
from pipeline.network.weights import WeightsSource, find_weights, widths_for_plan
from pipeline.plan.device import Device, resolve_device
from pipeline.plan.memory import WORKERS, StageWork
from pipeline.plan.network_cost import layers_in_use
from pipeline.plan.plan import Plan, plan_stage
from pipeline.render import adam, ingest
from pipeline.render.context import RenderContext, iteration_record, make_stage, prepared_record, render_context
from pipeline.render.resample import Region, enlarge, needed, whole
from pipeline.rundir.journal import Journal, standing
from pipeline.rundir.manifest import trusted_manifest
from pipeline.rundir.open import identity, newest_canvas, refuse_changes, refuse_other_stages
from pipeline.rundir.paths import journal_path, manifest_path, refuse_links, refuse_missing_folder
from pipeline.rundir.position import Position
from pipeline.rundir.preflight import plan_on
from pipeline.rundir.process_settings import process_settings
from pipeline.rundir.records import Iteration
from pipeline.store import integrity
from pipeline.store.layout import CONTENT

if TYPE_CHECKING:
    from pipeline.commands.preview.whole_image import WholeImage
    from pipeline.losses.color import ColorStatistics
    from pipeline.render.iteration import IterationResult
    from pipeline.render.stage import Stage

CANVAS = "canvas_0"
# Of the region's border, beyond what one iteration sees across it: what is wrong there spreads from one to the next.
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
    """Render a part of the picture as the run of `config` will, from the last stage that it has finished.

    `rect`: in px of the finished picture. `stage`: up to which stage; default the last. The result has the size of
    `rect` at that stage. `output`: default beside the config's output. `force`: overwrite a picture that no preview of
    this config made. Raises ConfigError if no stage of the run is finished, and the errors of errors.py.
    """
    picture = output or folder_of(config).with_name(f"{config.output.stem}.crop.png")
    device = resolve_device(config.compute.device)
    planned = _planned(config, device)
    last = len(planned.stages) - 1
    target = last if stage is None else stage
    if not 0 <= target <= last:
        raise ConfigError(f"--stage {target}: the run's stages are 0 to {last}.")
    _refuse_outside(rect, planned.stages[last].size)
    own = scaled(rect, planned.stages[last].size, planned.stages[target].size)
    if output is not None:
        refuse_missing_folder(output)
    check_output(picture, own.width, own.height, 8, "deflate")
    with Engine(WORKERS, CancelToken(stop)) as engine:
        weights = find_weights(config.network.name, config.network.weights, config.seed, sink, engine.cancel)
        finished = _finished(config, planned, weights, target, engine)
        with claimed(config, picture, force) as claim, _emptied(claim.folder / "crop") as aside:
            context = render_context(config, planned, device, weights, engine, sink)
            rendering = Crop(config, planned, context, finished, aside)
            found = rendering.render(rect, target)
            cut_canvas(found, own, picture, engine.cancel, claim.record)
            claim.done()
    return picture


def scaled(rect: Rect, size: Size, target: Size) -> Rect:
    """A rectangle of a picture of `size` in the same picture at `target`: as many px as it covers, at least one."""
    y0, x0 = rect.y0 * target[0] // size[0], rect.x0 * target[1] // size[1]
    y1, x1 = -(-rect.y1 * target[0] // size[0]), -(-rect.x1 * target[1] // size[1])
    return Rect(y0, min(max(y1, y0 + 1), target[0]), x0, min(max(x1, x0 + 1), target[1]))


def regions(rect: Rect, sizes: Sequence[Size], around_px: Sequence[int]) -> list[Rect]:
    """What has to be rendered at each size for `rect`, which is of the last: with `around_px` more on every side.

    Every region holds what the next one is enlarged from. Edges are aligned as those of tiles are.
    """
    found: list[Rect] = []
    for size, around in reversed(list(zip(sizes, around_px, strict=True))):
        region = scaled(rect, sizes[-1], size).grown(around, *size)
        if found:
            below = needed(found[-1], sizes[len(sizes) - len(found)], size)
            region = Rect(
                min(region.y0, below.y0), max(region.y1, below.y1), min(region.x0, below.x0), max(region.x1, below.x1)
            )
        found.append(_aligned(region, size))
    return found[::-1]


def _aligned(rect: Rect, size: Size) -> Rect:
    """The rectangle grown to whole windows of every pooling, or to the border."""
    y0, x0 = (edge // ALIGN_PX * ALIGN_PX for edge in (rect.y0, rect.x0))
    return Rect(y0, min(ceil_to(rect.y1, ALIGN_PX), size[0]), x0, min(ceil_to(rect.x1, ALIGN_PX), size[1]))


def _refuse_outside(rect: Rect, size: Size) -> None:
    if not rect.area or rect.y0 < 0 or rect.x0 < 0 or rect.y1 > size[0] or rect.x1 > size[1]:
        raise ConfigError(
            f"--crop {rect.x0},{rect.y0},{rect.width},{rect.height}: is not a part of the picture, which has "
            f"{size[1]}×{size[0]} px. Give x,y,width,height within it, x and y of the upper left corner."
        )


def _planned(config: Config, device: Device) -> Plan:
    """The run's plan, in tiles that leave room for what a crop holds besides: Grams of whole and part, and the rest.

    Raises ConfigError if none do.
    """
    widths = widths_for_plan(config.network.name, config.network.weights, config.limits.max_weights_bytes)
    sizes = [max(stage.size) for stage in plan_on(config, device).stages]
    held = 3 * max(layers_in_use(config.for_stage(size), widths).grams_bytes() for size in sizes)
    memory = config.memory.model_copy(update={"limit": config.memory.limit_bytes - held})
    try:
        return plan_on(config.model_copy(update={"memory": memory}), device)
    except ConfigError as error:
        raise ConfigError(
            f"--crop: {held / 2**20:.0f} MiB of memory.limit are for the Grams of the whole picture, which leaves too "
            f"little for the rest. {error}"
        ) from error


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """An empty folder, and none at the end: what a killed preview left there is nobody's."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Finished:
    """The last stage that a run has finished, or the one asked for, if it is: its canvas, and the run's threads.

    `first_max_u`: max|u| of its first iteration.
    """

    stage: int
    canvas: store.StageArray
    first_max_u: float
    threads: int
    tile_px: int | None


def _finished(config: Config, planned: Plan, weights: WeightsSource, target: int, engine: Engine) -> _Finished:
    """Looks at the run of `config`. Raises ConfigError if it has finished no stage, or is another config's."""
    remedy = "A crop goes on from there: give `pipeline run`, and stop it with Ctrl-C once its first stage has ended."
    if not taken(manifest_path(config.work_dir)):
        raise ConfigError(
            f"{config.work_dir}: there is no run of this config yet, so nothing of it is rendered. {remedy}"
        )
    records, position = standing(Journal(journal_path(config.work_dir)))
    stages = [one for one in position.slots if finished_stage(position, one) and one <= target]
    if not stages:
        raise ConfigError(f"{config.work_dir}: the run has not finished its first stage yet. {remedy}")
    manifest = trusted_manifest(manifest_path(config.work_dir), records)
    refuse_changes(config, manifest, identity(config, weights, engine.cancel))
    refuse_other_stages(config, manifest, planned)
    refuse_links(config.work_dir)
    newest = max(stages)
    canvas = newest_canvas(config.work_dir, position, newest)
    firsts = [one for one in records if isinstance(one, Iteration) and (one.stage, one.iteration) == (newest, 0)]
    first_max_u = firsts[-1].max_abs_u if firsts else 0.0
    return _Finished(newest, canvas, first_max_u, manifest.threads, position.tile_px)


@dataclass
class Crop:
    """The rendering of a region, stage by stage, in a folder `aside` that is deleted afterwards."""

    config: Config
    plan: Plan
    context: RenderContext
    finished: _Finished
    aside: Path
    _position: Position = field(default_factory=Position)

    def render(self, rect: Rect, target: int) -> Region:
        """The canvas of stage `target`, or a part of it that holds `rect`, which is of the finished picture."""
        engine, first = self.context.engine, self.finished.stage + 1
        source = whole(self.finished.canvas)
        integrity.require_intact([source.array], engine, self._told("check"))
        if target < first:
            self.context.sink(Note(f"stage {target} is finished: its canvas is cut, and nothing is rendered"))
            return source
        sizes = [stage.size for stage in self.plan.stages[first : target + 1]]
        models = [self._stage(index, size).layer_use for index, size in enumerate(sizes, start=first)]
        own = scaled(rect, self.plan.stages[-1].size, sizes[-1])
        around = [2 * halo_px(layer_use.names) + _SPREAD_PX for layer_use in models]
        before = self._whole()
        for index, region in enumerate(regions(own, sizes, around), start=first):
            size = self.plan.stages[index].size
            text = f"stage {index}: {region.width}×{region.height} px of {size[1]}×{size[0]} around the crop"
            self.context.sink(Note(text))
            source = self._render_stage(index, region, source, before)
        return source

    def _stage(self, index: int, size: Size) -> Stage:
        """The stage of the run, but of a canvas of this size, in a store of its own."""
        config = self.config.for_stage(max(self.plan.stages[index].size))
        compute = config.compute.model_copy(update={"threads": self.finished.threads})
        config = config.model_copy(update={"stages": (), "compute": compute, "work_dir": self.aside})
        layer_use = layers_in_use(config, self.context.weights.widths)
        styles = self.plan.stages[index].style_sizes
        longest = ceil_to(max(side for one in (size, *styles) for side in one), config.store.chunk_px)
        tile_px = min(self.finished.tile_px or longest, self.plan.tile_px, longest)
        content = None if config.content is None else RGB8  # as the crop's own cut of it has
        plan = plan_stage(StageWork(config, layer_use, size, styles, content), index, tile_px)
        return make_stage(config, plan, self.context, tile_px)

    def _render_stage(self, index: int, region: Rect, source: Region, before: WholeImage) -> Region:
        # these bring torch, which export and status do without
        from pipeline.render.iteration import Iterations  # noqa: PLC0415
        from pipeline.render.preparation import prepare  # noqa: PLC0415

        stage = self._stage(index, (region.height, region.width))
        size = self.plan.stages[index].size
        known = before.known(stage, _aligned(scaled(region, size, before.size), before.size))
        colors = self._cut(stage, region, size)
        prepared = prepare(stage, self._start(stage, source, region, size), colors, is_part=True)
        energies = {name: energy * known.energies[name] for name, energy in prepared.content_energies.items()}
        known_prepared = replace(prepared, content_energies=energies)
        self._position = Position().after(prepared_record(index, stage.tile_px, known_prepared))
        least_max_u = 0.0 if stage.plan.size == size else self._least_max_u(stage)
        iterations = Iterations(stage, energies, prepared.areas, known.grams, least_max_u)
        while end_reason(self._position, stage.config.optimizer) is None:
            self.context.engine.cancel.raise_if_set()
            commit = partial(self._commit, stage)
            at = self._position
            iterations.iterate(at.iteration, at.alpha, at.checksums[index], commit)
        return Region(newest_canvas(self.aside, self._position, index), region, size)

    def _cut(self, stage: Stage, region: Rect, size: Size) -> ColorStatistics | None:
        """Gives the stage the region of its content and masks; gives the colours of the whole content."""
        config, cancel = stage.config, self.context.engine.cancel
        # a mask that several styles share stays one
        cuts = {path: self.aside / f"mask_{stage.plan.index}_{number}.png" for number, path in enumerate(config.masks)}
        for path, cut in cuts.items():
            cut_file(path, size, region, cut, cancel)
        styles = tuple(one.model_copy(update={"mask": cuts[one.mask]}) if one.mask else one for one in config.styles)
        guide = config.loss.content_mask
        loss = config.loss.model_copy(update={"content_mask": cuts[guide] if guide else None})
        content = None if config.content is None else self.aside / f"content_{stage.plan.index}.png"
        stage.config = config.model_copy(update={"content": content, "styles": styles, "loss": loss})
        if config.content is None or content is None:
            return None
        return cut_file(config.content, size, region, content, cancel)

    def _least_max_u(self, stage: Stage) -> float:
        """What max|u| of the whole's first iteration will be at least: as near to the largest possible as at stage f.

        A region that masks leave little to is calm; alone, it would step as far as the liveliest part of the picture.
        """
        own, finished = stage.config.optimizer, self.config.for_stage(max(self.plan.stages[self.finished.stage].size))
        most, most_then = (adam.first_max_update(one.beta1, one.beta2, 0.0, 1.0) for one in (own, finished.optimizer))
        return self.finished.first_max_u / most_then * most

    def _commit(self, stage: Stage, result: IterationResult) -> bool:
        """Nothing is recorded: a crop that is stopped begins anew. Gives whether another iteration follows."""
        settings, at = stage.config.optimizer, self._position
        self._position = at.after(iteration_record(stage.plan.index, at.iteration, result))
        self._told(f"stage {stage.plan.index} of the crop")(self._position.iteration, settings.max_iterations)
        return end_reason(self._position, settings) is None

    def _start(self, stage: Stage, source: Region, region: Rect, size: Size) -> store.StageArray:
        """The region of the stage before, enlarged."""
        folder, form = self.aside / "start", "float64" if stage.config.state == "float64" else "float32"
        store.create_stage(folder)
        store.create_array(folder, CANVAS, (*stage.plan.size, 3), stage.config.store.chunk_px, form, "none")
        sums = enlarge(source, Region(store.open_array(folder, CANVAS), region, size), self.context.engine)
        return store.open_array(folder, CANVAS, sums)

    def _whole(self) -> WholeImage:
        """What the whole picture is compared with its parts at: the finished stage, and the content at its size."""
        from pipeline.commands.preview.whole_image import WholeImage  # noqa: PLC0415

        found = self.finished
        return WholeImage(
            found.stage, found.canvas, self._whole_content(), self.plan.tile_px, self.aside / "whole_masks"
        )

    def _whole_content(self) -> store.StageArray | None:
        if self.config.content is None:
            return None
        folder, size = self.aside / "whole", self.plan.stages[self.finished.stage].size
        store.create_stage(folder)
        store.create_array(folder, CONTENT, (*size, 3), self.config.store.chunk_px, "uint8", "none")
        array = store.open_array(folder, CONTENT)
        sums = ingest.ingest(self.config.content, array, self.context.engine, self._told("content"))
        return store.open_array(folder, CONTENT, sums)

    def _told(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.context.sink(WorkDone(self.finished.stage, what, done, total))
