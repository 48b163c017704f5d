"""The images of a sweep: the run of each, and its place on the contact sheet."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pipeline.commands.preview.at_size import at_size
from pipeline.commands.preview.sweep import Axis, Variation
from pipeline.config import Config, dotted, input_files, result_fields
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError
from pipeline.core.events import Note, Sink
from pipeline.core.text import shown, size_text
from pipeline.core.tiling import Size
from pipeline.images import ContactSheet, Label, Row, SheetImage, read_header
from pipeline.network import sha256_of
from pipeline.plan import BASE_BYTES, Device, Plan, fit
from pipeline.rundir import plan_on, resolved, with_initial_size

T = TypeVar("T")

_MAX_ACROSS = 6  # a row of more images is wrapped
_MAX_REFERENCES = 8


@dataclass(frozen=True)
class PlannedImage:
    """A variation as it will be rendered: its own config and plan, and its (height, width) on the sheet in px."""

    variation: Variation
    config: Config
    plan: Plan
    shown: Size


class Grid:
    """All variations of a preview, row by row as on the sheet: the first axis runs across, all others down."""

    def __init__(self, axes: Sequence[Axis], variations: Sequence[Variation], size_px: int, device: Device) -> None:
        self._axes = axes
        self._variations = [
            replace(variation, config=with_initial_size(resolved(_on_this_machine(variation.config))))
            for variation in variations
        ]
        self._size_px = size_px
        self._device = device
        self.images: list[PlannedImage] = []

    @property
    def across(self) -> int:
        """Images side by side: one per value of the first axis; a single long axis is wrapped."""
        if len(self._axes) == 1 and (number := len(self._axes[0].values)) > _MAX_ACROSS:
            return min(_MAX_ACROSS, math.ceil(math.sqrt(1.5 * number)))
        return len(self._axes[0].values) if self._axes else 1

    @property
    def rendered_px(self) -> int:
        """Long side at which the images are rendered: at least the largest initial_size."""
        initial = [variation.config.initial_size for variation in self._variations]
        return max(self._size_px, *(side_px for side_px in initial if side_px != "auto"))  # none is

    def plan(self, folder: Path, cancel: CancelToken) -> None:
        """Plan all images. Raises ConfigError, InputError for any that cannot be rendered, before the first is."""
        hashes: dict[Path, str] = {}
        for variation in self._row_by_row():
            config = at_size(_without_unused_seed(variation.config), self.rendered_px)
            # Planning reads the headers, so unusable files are reported before they are hashed.
            plan = plan_on(_in_folder(config, folder), self._device)
            for _, path in input_files(config):
                hashes[path] = hashes.get(path) or sha256_of(path, cancel)
            config = _in_folder(config, folder / _name(config, hashes))
            canvas = plan.stages[-1].size
            self.images.append(PlannedImage(variation, config, plan, fit(canvas, min(self._size_px, max(canvas)))))
        self._refuse_ineffective(hashes)

    def _row_by_row(self) -> list[Variation]:
        down = len(self._variations) // len(self._axes[0].values) if self._axes else 1
        return [variation for row in range(down) for variation in self._variations[row::down]]

    def _along(self, number: int, values: Mapping[tuple[str, ...], T]) -> dict[tuple[str, ...], set[T]]:
        """The distinct values along axis `number`, by the settings of the other axes."""
        groups: dict[tuple[str, ...], set[T]] = {}
        for settings, value in values.items():
            groups.setdefault((*settings[:number], *settings[number + 1 :]), set()).add(value)
        return groups

    def _refuse_ineffective(self, hashes: Mapping[Path, str]) -> None:
        """Raise ConfigError for a key whose values all give the same images."""
        names = {image.variation.settings: image.config.work_dir.parent.name for image in self.images}
        runs = {
            variation.settings: _name(_without_unused_seed(variation.config), hashes) for variation in self._variations
        }
        for number, axis in enumerate(self._axes):
            if len(set(axis.values)) == 1 or any(len(group) > 1 for group in self._along(number, names).values()):
                continue
            if any(len(group) > 1 for group in self._along(number, runs).values()):
                raise ConfigError(
                    f"--vary {shown(axis.key)}: changes nothing at {self.rendered_px} px, so all images would be the "
                    "same; it may change the run at larger sizes. Give a larger --size, or vary another key."
                )
            raise ConfigError(
                f"--vary {shown(axis.key)}: does not change the image, so all images would be the same. Vary another "
                "key."
            )

    def report_ineffective(self, sink: Sink, cancel: CancelToken) -> None:
        """Report the keys that made no difference in the rendered images."""
        hashes = {image.variation.settings: sha256_of(image.config.output, cancel) for image in self.images}
        for number, axis in enumerate(self._axes):
            groups = self._along(number, hashes)
            same = [", ".join(others) for others, group in groups.items() if len(group) == 1]
            if len(set(axis.values)) == 1 or not same:
                continue
            where = "" if len(same) == len(groups) else f" with {_shortened_list(same)}"
            sink(Note(f"{shown(axis.key)} made no difference{where}: its images are the same, byte for byte"))

    def sheet(self, name: str, overrides: Sequence[str]) -> ContactSheet:
        """The sheet of all images. `name`: of the config. `overrides`: its `--set`s.

        Raises ConfigError if it would need too much memory.
        """
        images, across = self.images, self.across
        wrapped = across < (len(self._axes[0].values) if self._axes else 1)
        labels = [_label(self._axes, image.variation.settings) for image in images]
        rows = []
        for start in range(0, len(images), across):
            part = slice(start, start + across)
            above = tuple(label[:1] for label in labels[part]) if wrapped or not start else ()
            row = tuple(SheetImage(image.config.output, image.shown) for image in images[part])
            rows.append(Row(labels[start][1:], above, row))
        sizes = sorted({max(image.plan.stages[-1].size) for image in images})
        title = f"{name}, rendered at {' and '.join(map(str, sizes))} px"
        sheet = ContactSheet(
            title, self._references(), rows, [f"--set {shlex.quote(setting)}" for setting in overrides]
        )
        needed, limit = BASE_BYTES["cpu"] + sheet.strip_bytes, images[0].config.memory.limit_bytes
        if needed > limit:
            raise ConfigError(
                f"--size {self._size_px}: a row of the sheet takes {size_text(needed)} of memory, but "
                f"{size_text(limit)} is the limit. Choose a smaller --size, or raise memory.limit."
            )
        return sheet

    def _references(self) -> list[tuple[Label, SheetImage]]:
        """The contents and styles of all images, shown smaller than these."""
        named = {
            path: key[0].removesuffix("s")
            for image in self.images
            for key, path in input_files(image.config)
            if key[0] in ("content", "styles") and key[-1] in ("content", "image")
        }
        references: list[tuple[Label, SheetImage]] = []
        for path, what in list(named.items())[:_MAX_REFERENCES]:
            header = read_header(path, self.images[0].config.limits)
            size = header.height_px, header.width_px
            shown_px = min(max(size), max(max(image.shown) for image in self.images) * 2 // 5)
            references.append((((what, path.name),), SheetImage(path, fit(size, shown_px))))
        return references


def _in_folder(config: Config, folder: Path) -> Config:
    """The config with its image and its run directory in a folder of their own."""
    # without the digest of its config, an image that a key does not change is the same file as the others
    export = config.export.model_copy(update={"metadata": "none"})
    return config.model_copy(update={"output": folder / "picture.png", "work_dir": folder / "run", "export": export})


def _name(config: Config, hashes: Mapping[Path, str]) -> str:
    """The folder name of an image: a hash of all settings and inputs that determine it."""
    inputs = {dotted(key): hashes.get(path, str(path)) for key, path in input_files(config)}
    text = json.dumps([result_fields(config), inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_unused_seed(config: Config) -> Config:
    """The config with the default seed if nothing is random: no noise, random weights or stochastic rounding."""
    random_weights = config.network.name == "random" and config.network.weights is None
    noise = config.init == "noise" or (config.start_noise > 0 and config.init != "gray")
    if noise or random_weights or config.state == "compact":
        return config
    return config.model_copy(update={"seed": Config.model_fields["seed"].default})


def _shortened_list(texts: Sequence[str], max_texts: int = 3) -> str:
    more = [f"{len(texts) - max_texts} more"] if len(texts) > max_texts else []
    return "; ".join([*texts[:max_texts], *more])


def _label(axes: Sequence[Axis], settings: Sequence[str]) -> Label:
    return tuple((axis.key, setting.removeprefix(f"{axis.key}=")) for axis, setting in zip(axes, settings, strict=True))


def _on_this_machine(config: Config) -> Config:
    """A preview is too small for a cluster."""
    return config.model_copy(update={"compute": config.compute.model_copy(update={"scheduler": "none"})})
