"""Pictures at low resolution: what settings do is seen, and chosen, before the run that takes a day.

A preview is the run itself, up to a size: where one of the run's stages has that size, its canvas is the picture, and
at the size of the result the picture is the result (run_to_size.py). So a key in px means what it means in the run, and
`initial_size` has its effect: no picture is rendered smaller than the largest `initial_size` of all, however small it
is shown. What the run adds at larger sizes, detail finer than the pixels of a preview, is not there.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.commands.preview.at_size import at_size
from pipeline.commands.preview.folder import claimed, folder_of
from pipeline.commands.preview.sweep import Axis, Variation, load_variations
from pipeline.commands.run import run
from pipeline.config.config import Config, input_files, result_fields
from pipeline.config.yaml_reader import dotted
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError
from pipeline.core.events import Event, IterationDone, Note, PictureDone, Sink, StageStarted, WorkDone, ignore
from pipeline.core.image_formats import PREVIEW_PX
from pipeline.core.text import shown
from pipeline.core.tiling import Size
from pipeline.images.header import read_header
from pipeline.images.output_check import check_output
from pipeline.images.sheet import ContactSheet, Label, Picture, Row
from pipeline.network.weights import sha256_of
from pipeline.plan.device import Device, resolve_device
from pipeline.plan.memory import BASE_BYTES
from pipeline.plan.plan import Plan, fit
from pipeline.rundir.paths import refuse_missing_folder
from pipeline.rundir.preflight import plan_on
from pipeline.rundir.process_settings import process_settings

T = TypeVar("T")

# A row of more pictures than this is shown as several.
_MOST_ACROSS = 6
_MOST_REFERENCES = 8
# What a preview says itself, and no variation.
_FIXED = {
    "size": "--size says how large the pictures are",
    "output": "-o names the sheet",
    "work_dir": "every picture has its own",
}


@dataclass(frozen=True)
class Rendered:
    """One picture of a preview: what was set for it, as `key=value`, its file, and its (height, width) in px."""

    settings: tuple[str, ...]
    picture: Path
    size: Size


@dataclass(frozen=True)
class Preview:
    """A contact sheet, and its pictures row by row, `across` in each."""

    sheet: Path
    pictures: tuple[Rendered, ...]
    across: int
    size_px: int

    def as_dict(self) -> dict[str, Any]:
        """The preview as JSON-able data."""
        pictures = [
            {
                "row": index // self.across,
                "column": index % self.across,
                "set": list(one.settings),
                "picture": str(one.picture),
                "width_px": one.size[1],
                "height_px": one.size[0],
            }
            for index, one in enumerate(self.pictures)
        ]
        return {"sheet": str(self.sheet), "shown_px": self.size_px, "pictures": pictures}


@process_settings()
def preview(
    path: str | Path,
    *,
    vary: Sequence[str] = (),
    overrides: Sequence[str] = (),
    size_px: int = PREVIEW_PX,
    output: Path | None = None,
    force: bool = False,
    sink: Sink = ignore,
    stop: threading.Event | None = None,
) -> Preview:
    """Render every combination of the values in `vary` at low resolution, onto one contact sheet.

    `path`, `overrides`: of the config, as in load_config. `vary`: `key=value,value`, one key each. `size_px`: long side
    of each picture as shown. `output`: the sheet; default beside the config's output. `force`: overwrite a sheet that
    no preview of this config made.
    Raises the errors of errors.py. After Stopped, or any crash, the same call goes on: what is rendered stays so.
    """
    axes, variations = load_variations(path, overrides, vary)
    first = variations[0].config
    sheet = output or folder_of(first).with_name(f"{folder_of(first).name}.png")
    _refuse_fixed(axes)
    cancel = CancelToken(stop)
    grid = _Grid(Path(path).name, axes, variations, size_px, resolve_device(first.compute.device))
    grid.plan(folder_of(first), cancel)
    contact_sheet = grid.sheet()
    height, width = contact_sheet.size
    if output is not None:
        refuse_missing_folder(output)
    check_output(sheet, width, height, 8, "deflate")
    with claimed(first, sheet, force) as claim:
        grid.render(sink, stop)
        grid.tell_idle(sink, cancel)
        contact_sheet.write(
            sheet, cancel, lambda share: sink(WorkDone(0, "contact sheet", math.floor(share * 100), 100)), claim.record
        )
        claim.done()
    return Preview(sheet, grid.rendered(), grid.across, size_px)


@dataclass(frozen=True)
class _Planned:
    """A variation as it will be rendered: its own config, plan, and (height, width) on the sheet."""

    variation: Variation
    config: Config
    plan: Plan
    shown: Size

    @property
    def picture(self) -> Picture:
        return Picture(self.config.output, self.shown)


class _Grid:
    """All variations of a preview: what each is rendered from, and where it stands on the sheet."""

    def __init__(
        self, name: str, axes: Sequence[Axis], variations: Sequence[Variation], size_px: int, device: Device
    ) -> None:
        self._name = name
        self._axes = axes
        self._variations = variations
        self._size_px = size_px
        self._device = device
        self._planned: list[_Planned] = []

    @property
    def across(self) -> int:
        """Pictures side by side: the values of the first axis, or what makes a sheet of a single long one."""
        if len(self._axes) == 1 and (number := len(self._axes[0].values)) > _MOST_ACROSS:
            return min(_MOST_ACROSS, math.ceil(math.sqrt(1.5 * number)))
        return len(self._axes[0].values) if self._axes else 1

    @property
    def rendered_px(self) -> int:
        """Long side at which all pictures are rendered that can be: no stage of the coarsest size may be left out."""
        return max(self._size_px, *(one.config.initial_size for one in self._variations))

    def plan(self, folder: Path, cancel: CancelToken) -> None:
        """Plan every picture. Raises ConfigError, InputError, for any that cannot be rendered, before the first is."""
        hashes: dict[Path, str] = {}
        for variation in self._row_by_row():
            config = at_size(_without_idle_seed(variation.config), self.rendered_px)
            # before any is hashed, files that cannot serve are told
            plan = plan_on(_in_folder(config, folder), self._device)
            for _, path in input_files(config):
                hashes[path] = hashes.get(path) or sha256_of(path, cancel)
            config = _in_folder(config, folder / _name(config, hashes))
            canvas = plan.stages[-1].size
            self._planned.append(_Planned(variation, config, plan, fit(canvas, min(self._size_px, max(canvas)))))
        self._refuse_idle(hashes)

    def _row_by_row(self) -> list[Variation]:
        """The variations as they stand on the sheet: the first axis runs across, all others down."""
        down = len(self._variations) // len(self._axes[0].values) if self._axes else 1
        return [one for row in range(down) for one in self._variations[row::down]]

    def _along(self, number: int, found: Mapping[tuple[str, ...], T]) -> dict[tuple[str, ...], set[T]]:
        """What was found for the variations that differ in axis `number` alone, by their other settings."""
        together: dict[tuple[str, ...], set[T]] = {}
        for settings, value in found.items():
            together.setdefault((*settings[:number], *settings[number + 1 :]), set()).add(value)
        return together

    def _refuse_idle(self, hashes: Mapping[Path, str]) -> None:
        """Raise ConfigError for a key whose values all give the same pictures."""
        names = {one.variation.settings: one.config.work_dir.parent.name for one in self._planned}
        runs = {one.settings: _name(_without_idle_seed(one.config), hashes) for one in self._variations}
        for number, axis in enumerate(self._axes):
            if len(set(axis.values)) == 1 or any(len(found) > 1 for found in self._along(number, names).values()):
                continue
            if any(len(found) > 1 for found in self._along(number, runs).values()):
                raise ConfigError(
                    f"--vary {shown(axis.key)}: changes nothing at {self.rendered_px} px, so all pictures would be the "
                    "same; the run it may change later, at larger sizes. Give a larger --size, or vary another key."
                )
            raise ConfigError(
                f"--vary {shown(axis.key)}: changes nothing in the picture, so all would be the same. Vary a key "
                "that decides it."
            )

    def tell_idle(self, sink: Sink, cancel: CancelToken) -> None:
        """Tell which keys made no difference, as the pictures show: nobody should look for one that is not there."""
        pictures = {one.variation.settings: sha256_of(one.config.output, cancel) for one in self._planned}
        for number, axis in enumerate(self._axes):
            together = self._along(number, pictures)
            same = [", ".join(others) for others, found in together.items() if len(found) == 1]
            if len(set(axis.values)) == 1 or not same:
                continue
            where = "" if len(same) == len(together) else f" with {_some(same)}"
            sink(Note(f"{shown(axis.key)} made no difference{where}: its pictures are the same, byte for byte"))

    def sheet(self) -> ContactSheet:
        """The sheet of all pictures. Raises ConfigError if it would take more memory than the config allows."""
        planned, across = self._planned, self.across
        wrapped = across < (len(self._axes[0].values) if self._axes else 1)
        labels = [_label(self._axes, one.variation.settings) for one in planned]
        rows = []
        for start in range(0, len(planned), across):
            part = slice(start, start + across)
            above = tuple(label[:1] for label in labels[part]) if wrapped or not start else ()
            rows.append(Row(labels[start][1:], above, tuple(one.picture for one in planned[part])))
        sizes = sorted({max(one.plan.stages[-1].size) for one in planned})
        title = f"{self._name}, rendered at {' and '.join(map(str, sizes))} px"
        sheet = ContactSheet(title, self._references(), rows)
        if (needed := BASE_BYTES["cpu"] + sheet.strip_bytes) > (limit := planned[0].config.memory.limit_bytes):
            raise ConfigError(
                f"--size {self._size_px}: a row of the sheet takes {needed / 2**30:.2f} GiB of memory, but "
                f"{limit / 2**30:.2f} GiB is the limit. Choose a smaller --size, or raise memory.limit."
            )
        return sheet

    def _references(self) -> list[tuple[Label, Picture]]:
        """Contents and styles of all pictures, smaller than these."""
        named = {
            path: key[0].removesuffix("s")
            for one in self._planned
            for key, path in input_files(one.config)
            if key[0] in ("content", "styles") and key[-1] in ("content", "image")
        }
        references: list[tuple[Label, Picture]] = []
        for path, what in list(named.items())[:_MOST_REFERENCES]:
            header = read_header(path, self._planned[0].config.limits)
            size = header.height_px, header.width_px
            shown_px = min(max(size), max(max(one.shown) for one in self._planned) * 2 // 5)
            references.append((((what, path.name),), Picture(path, fit(size, shown_px))))
        return references

    def render(self, sink: Sink, stop: threading.Event | None) -> None:
        """Render every picture that is not rendered yet."""
        number = len(self._planned)
        height, width = self._planned[0].plan.stages[-1].size
        flop = sum(one.plan.flop for one in {one.config.work_dir: one for one in self._planned}.values())
        pictures = "1 picture" if number == 1 else f"{number} pictures"
        sink(Note(f"{pictures} of {width}×{height} px, {flop / 1e12:,.1f} TFLOP if none is rendered yet"))
        for index, one in enumerate(self._planned, start=1):
            started = time.monotonic()
            told = _PreviewSink(sink, f"picture {index} of {number}", one.plan)
            run(one.config, sink=told, stop=stop)
            seconds = time.monotonic() - started if told.rendering else None
            sink(PictureDone(index, number, one.variation.settings, str(one.config.output), seconds))

    def rendered(self) -> tuple[Rendered, ...]:
        """What lies where, once it is rendered."""
        return tuple(
            Rendered(one.variation.settings, one.config.output, one.plan.stages[-1].size) for one in self._planned
        )


def _refuse_fixed(axes: Sequence[Axis]) -> None:
    for axis in axes:
        if (key := axis.key.partition(".")[0]) in _FIXED:
            raise ConfigError(f"--vary {shown(axis.key)}: {_FIXED[key]}. Vary a key that decides the picture.")


def _in_folder(config: Config, folder: Path) -> Config:
    """The config with its picture and its run in a folder of their own."""
    return config.model_copy(update={"output": folder / "picture.png", "work_dir": folder / "run"})


def _name(config: Config, hashes: Mapping[Path, str]) -> str:
    """The folder of a picture: the same for the same settings and inputs, another for any others."""
    inputs = {dotted(key): hashes.get(path, str(path)) for key, path in input_files(config)}
    text = json.dumps([result_fields(config), inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_idle_seed(config: Config) -> Config:
    """The config, with the default seed where nothing is drawn from it: no noise, no weights, no rounding by chance."""
    random_weights = config.network.name == "random" and config.network.weights is None
    if config.init == "noise" or random_weights or config.state == "compact":
        return config
    return config.model_copy(update={"seed": Config.model_fields["seed"].default})


def _some(texts: Sequence[str], most: int = 3) -> str:
    more = [f"{len(texts) - most} more"] if len(texts) > most else []
    return "; ".join([*texts[:most], *more])


def _label(axes: Sequence[Axis], settings: Sequence[str]) -> Label:
    return tuple((axis.key, one.removeprefix(f"{axis.key}=")) for axis, one in zip(axes, settings, strict=True))


class _PreviewSink:
    """The sink of one picture's run: of its events the preview tells how far it is, and what is worth a line."""

    def __init__(self, sink: Sink, what: str, plan: Plan) -> None:
        self._sink = sink
        self._what = what
        flops = [stage.flop_per_iteration * stage.max_iterations for stage in plan.stages]
        self._shares = [flop / sum(flops) for flop in flops]
        self.rendering = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self.rendering = True
        elif isinstance(event, IterationDone):
            share = sum(self._shares[: event.stage])
            share += self._shares[event.stage] * (event.iteration + 1) / event.max_iterations
            self._sink(WorkDone(event.stage, self._what, math.floor(100 * share), 100))
        elif (isinstance(event, Note) and self.rendering) or (isinstance(event, WorkDone) and event.what == "download"):
            self._sink(event)  # what a Note before tells, what a resume found, is in the line of the picture
