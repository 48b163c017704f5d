"""Previews at low resolution: the effect of settings is seen before a run that may take a day.

A preview is the run itself up to a size: if the run has a stage of that size, the preview is its canvas, and at the
size of the result the preview is the result (at_size.py). So keys in px mean the same as in the run, and `initial_size`
has its effect: no image is rendered smaller than the largest `initial_size` of all, however small it is shown. Detail
that the run adds at larger sizes, finer than the pixels of a preview, is missing.
"""

from __future__ import annotations

import math
import shlex
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.commands.preview.folder import claimed, folder_of
from pipeline.commands.preview.grid import Grid, PlannedImage
from pipeline.commands.preview.sweep import Axis, load_variations
from pipeline.commands.run import run
from pipeline.config import variation_text
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError
from pipeline.core.events import (
    Event,
    IterationDone,
    Note,
    PictureDone,
    Sink,
    StageDone,
    StageStarted,
    WorkDone,
    ignore,
)
from pipeline.core.image_formats import PREVIEW_PX
from pipeline.core.text import count, shown, work_text
from pipeline.core.tiling import Size
from pipeline.images import check_output
from pipeline.plan import Plan, resolve_device
from pipeline.rundir import named_inputs, refuse_inputs, refuse_missing_folder
from pipeline.rundir.process_settings import process_settings
from pipeline.viewer.comparison import ComparedPicture, refuse_taken, write_comparison

# Keys that the preview sets itself.
_FIXED = {
    "size": "--size sets the size of the images",
    "output": "-o names the sheet",
    "work_dir": "every image has its own",
}


@dataclass(frozen=True)
class Rendered:
    """One image of a preview: its settings as `key=value`, its file, and its (height, width) in px."""

    settings: tuple[str, ...]
    picture: Path
    size: Size


@dataclass(frozen=True)
class Preview:
    """A contact sheet, and its images row by row, `across` in each. `page`: the folder of a web page of them."""

    sheet: Path
    pictures: tuple[Rendered, ...]
    across: int
    size_px: int
    page: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """The preview as JSON-able data."""
        pictures = [
            {
                "row": index // self.across,
                "column": index % self.across,
                "set": list(rendered.settings),
                "picture": str(rendered.picture),
                "width_px": rendered.size[1],
                "height_px": rendered.size[0],
            }
            for index, rendered in enumerate(self.pictures)
        ]
        page = {} if self.page is None else {"page": str(self.page)}
        return {"sheet": str(self.sheet), **page, "shown_px": self.size_px, "pictures": pictures}


@dataclass(frozen=True)
class GridSpec:
    """The images of a preview: every combination of the values in `vary`.

    `vary`: `key=value,value`, one key each. `overrides`: of the config, as in load_config. `size_px`: long side of each
    image as shown. `output`: the sheet; default beside the config's output. `page`: a new folder, for a web page of the
    images. `force`: overwrite a sheet that no preview of this config wrote.
    """

    vary: Sequence[str] = ()
    overrides: Sequence[str] = ()
    size_px: int = PREVIEW_PX
    output: Path | None = None
    page: Path | None = None
    force: bool = False


@process_settings()
def preview(
    path: str | Path, spec: GridSpec = GridSpec(), *, sink: Sink = ignore, stop: threading.Event | None = None
) -> Preview:
    """Render the images of a config at low resolution, onto one contact sheet.

    Raises the errors of errors.py. After Stopped, or any crash, the same call resumes; finished images are not rendered
    again.
    """
    axes, variations = load_variations(path, spec.overrides, spec.vary, check_inputs=True)
    first = variations[0].config
    sheet = spec.output or folder_of(first).with_name(f"{folder_of(first).name}.png")
    _refuse_fixed(axes)
    cancel = CancelToken(stop)
    grid = Grid(axes, variations, spec.size_px, resolve_device(first.compute.device))
    grid.plan(folder_of(first), cancel)
    contact_sheet = grid.sheet(Path(path).name, spec.overrides)
    height, width = contact_sheet.size
    for path_given in filter(None, (spec.output, spec.page)):
        refuse_missing_folder(path_given)
    if spec.page is not None:
        refuse_taken(spec.page)
    check_output(sheet, width, height, 8, "deflate")
    for variation in variations:  # each may have a content or styles of its own
        refuse_inputs(sheet, named_inputs(variation.config))
    with claimed(first, sheet, spec.force) as claim:
        _render(grid.images, sink, stop)
        grid.report_ineffective(sink, cancel)
        contact_sheet.write(
            sheet, cancel, lambda share: sink(WorkDone(0, "contact sheet", math.floor(share * 100), 100)), claim.record
        )
        claim.done()
    if spec.page is not None:
        compared = [_compared(Path(path), spec.overrides, image) for image in grid.images]
        write_comparison(spec.page, contact_sheet.title, compared, grid.across)
    pictures = (
        Rendered(image.variation.settings, image.config.output, image.plan.stages[-1].size) for image in grid.images
    )
    return Preview(sheet, tuple(pictures), grid.across, spec.size_px, spec.page)


def _compared(path: Path, overrides: Sequence[str], image: PlannedImage) -> ComparedPicture:
    """An image of the page, with what renders it as a run."""
    settings = image.variation.settings
    options = [part for setting in (*overrides, *settings) for part in ("--set", setting)]
    command = shlex.join(["pipeline", "run", "-c", str(path), *options])
    text = f"# {path.name} as chosen from a preview: {shown(', '.join(settings) or 'as it was', 500)}\n"
    text += variation_text(path, [*overrides, *settings])
    return ComparedPicture(image.config.output, image.plan.stages[-1].size, settings, command, text)


def _refuse_fixed(axes: Sequence[Axis]) -> None:
    for axis in axes:
        if (key := axis.key.partition(".")[0]) in _FIXED:
            raise ConfigError(f"--vary {shown(axis.key)}: {_FIXED[key]}. Vary a key that changes the image.")


def _render(images: Sequence[PlannedImage], sink: Sink, stop: threading.Event | None) -> None:
    """Render every image that is not finished yet."""
    height, width = images[0].plan.stages[-1].size
    flop = sum(image.plan.flop for image in {image.config.work_dir: image for image in images}.values())
    sink(Note(f"{count(len(images), 'image')} of {width}×{height} px, {work_text(flop)} if none is finished"))
    for index, image in enumerate(images, start=1):
        started = time.monotonic()
        preview_sink = _PreviewSink(sink, f"image {index} of {len(images)}", image.plan)
        run(image.config, sink=preview_sink, stop=stop)
        seconds = time.monotonic() - started if preview_sink.rendering else None
        sink(PictureDone(index, len(images), image.variation.settings, str(image.config.output), seconds))


class _PreviewSink:
    """Forwards a run's events to the preview's sink: its progress as one percentage, and notes while it renders."""

    def __init__(self, sink: Sink, what: str, plan: Plan) -> None:
        self._sink = sink
        self._what = what
        flops = [stage.flop_per_iteration * stage.max_iterations for stage in plan.stages]
        self._shares = [flop / sum(flops) for flop in flops]
        self.rendering = False
        self._rendered = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self.rendering = True
        elif isinstance(event, StageDone):
            self._rendered = event.stage == len(self._shares) - 1
        elif isinstance(event, IterationDone):
            share = sum(self._shares[: event.stage])
            share += self._shares[event.stage] * (event.iteration + 1) / event.max_iterations
            self._sink(WorkDone(event.stage, self._what, math.floor(100 * share), 100))
        elif isinstance(event, Note) and self.rendering and not self._rendered:
            self._sink(event)  # earlier notes, of what a resume found, would repeat the line of the image
        elif isinstance(event, WorkDone) and event.what == "download":
            self._sink(event)
