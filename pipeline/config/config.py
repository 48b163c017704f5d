"""The config of a run: read from YAML, with every problem told at once and where it is.

The models, here and in sections.py, are the only place that knows keys, defaults, limits and what a changed value does
to a resume. Lengths are in px, sizes in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from pipeline.config.fields import MAX_STAGES, MAX_STYLES, File, Int, Output, SidePx, Start
from pipeline.config.messages import Conflict, ConflictsError, validate
from pipeline.config.regions import regions_of, shared_masks
from pipeline.config.sections import (
    COMPARED_BY_CONTENT,
    HARMLESS,
    NEW,
    ComputeConfig,
    ExportConfig,
    LimitsConfig,
    LossConfig,
    MemoryConfig,
    NetworkConfig,
    OptimizerConfig,
    Section,
    StageConfig,
    StoreConfig,
    StyleConfig,
)
from pipeline.config.yaml_reader import Key, dotted, read, told
from pipeline.core.errors import ConfigError
from pipeline.core.files import real
from pipeline.core.image_formats import OUTPUT_SUFFIXES, format_of, is_jpeg_inside, unheeded


def _default_work_dir(data: dict[str, Any]) -> Path:
    # `output` is absent when it was refused; the run is refused then, and this value with it.
    output: Path = data.get("output", Path("refused"))
    return output.with_name(f"{output.stem}.run")


def _default_init(data: dict[str, Any]) -> Literal["content", "noise"]:
    return "content" if data.get("content") else "noise"


class Config(Section):
    """One run: what to paint, in which style, how, and with how much of the machine. All paths are absolute."""

    content: File | None = Field(
        None,
        description="image to paint; null, with loss.content_weight 0, makes a texture of the styles",
        examples=["content.jpg"],
        json_schema_extra=COMPARED_BY_CONTENT,
    )
    styles: tuple[StyleConfig, ...] = Field(
        max_length=MAX_STYLES,
        description="style images; none with loss.style_weight 0",
        examples=[[{"image": "style.jpg"}]],
    )
    output: Output = Field(
        description=f"finished picture, {' '.join(OUTPUT_SUFFIXES)}",
        examples=["result.tif"],
        json_schema_extra=HARMLESS,
    )
    work_dir: File = Field(
        default_factory=_default_work_dir,
        description="folder of the run's state; beside the output",
        json_schema_extra=HARMLESS,
    )
    size: SidePx | tuple[SidePx, SidePx] | None = Field(
        None, description="long side of the result in px, [width, height] of a texture; null takes the content's own"
    )
    initial_size: SidePx = Field(512, description="long side of the coarsest stage in px")
    network: NetworkConfig = Field(NetworkConfig(), description="feature network")
    loss: LossConfig = Field(LossConfig(), description="what is optimised")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="how it is optimised")
    stages: tuple[StageConfig, ...] = Field(
        (), max_length=MAX_STAGES, description="what differs at some sizes: styles, network layers, loss, optimizer"
    )
    color: Literal["style", "content", "luminance"] = Field(
        "style",
        description="whose colours the picture has; luminance: the content's own, and light and dark alone are painted",
        json_schema_extra=NEW,
    )
    init: Start = Field(
        default_factory=_default_init,
        description="what the coarsest stage starts from",
        json_schema_extra=COMPARED_BY_CONTENT,
    )
    compute: ComputeConfig = Field(ComputeConfig(), description="where it is computed")
    memory: MemoryConfig = Field(MemoryConfig(), description="host memory", json_schema_extra=HARMLESS)
    store: StoreConfig = Field(StoreConfig(), description="state on disk")
    limits: LimitsConfig = Field(
        LimitsConfig(), description="what is refused before it costs anything", json_schema_extra=HARMLESS
    )
    export: ExportConfig = Field(ExportConfig(), description="file format of the output", json_schema_extra=HARMLESS)
    seed: Int = Field(0, ge=0, lt=2**63, description="seed of the noise and of the random network")

    @property
    def state(self) -> str:
        """The numbers of the state on disk: float32, float64 or compact."""
        if self.store.state_dtype == "compact":
            return "compact"
        return "float64" if self.compute.dtype == "float64" else "float32"

    @property
    def masks(self) -> tuple[Path, ...]:
        """The files of all masks, of styles and of the content."""
        named = [*(style.mask for style in self.styles), self.loss.content_mask]
        return tuple(dict.fromkeys(path for path in named if path is not None))

    @property
    def target_px(self) -> int | None:
        """The long side of the result where the config gives it."""
        return max(self.size) if isinstance(self.size, tuple) else self.size

    def for_stage(self, long_px: int) -> Config:
        """The config of the stages whose canvas has this long side: this one, with what `stages` says of them."""
        stage = next((stage for stage in self.stages if long_px <= stage.up_to), None)
        return self if stage is None else self._with(stage)

    def _with(self, stage: StageConfig) -> Config:
        sections = {name: getattr(stage, name) for name in ("network", "loss", "optimizer")}
        changed: dict[str, Any] = {
            name: _overridden(getattr(self, name), section) for name, section in sections.items() if section is not None
        }
        if stage.styles is not None:
            changed["styles"] = stage.styles
        return self.model_copy(update=changed)

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Config:
        checks = (
            self._stage_conflicts,
            self._start_conflicts,
            self._grid_conflicts,
            self._state_conflicts,
            self._format_conflicts,
            self._path_conflicts,
        )
        found = [conflict for check in checks for conflict in check()]
        if found:
            raise ConflictsError(found)
        return self

    def _stage_conflicts(self) -> Iterator[Conflict]:
        yield from self._loss_conflicts()
        for index, stage in enumerate(self.stages):
            key = ("stages", index)
            if index and stage.up_to <= self.stages[index - 1].up_to:
                text = (
                    f"{stage.up_to} is not above the entry before ({self.stages[index - 1].up_to}); order them by size"
                )
                yield Conflict(((*key, "up_to"),), text)
            for conflict in self._with(stage)._loss_conflicts():
                yield Conflict(tuple((*key, *one) for one in conflict.keys), conflict.text)

    def _start_conflicts(self) -> Iterator[Conflict]:
        """What a run begins with: the size of its canvas, and the pixels of the coarsest one."""
        content, size, init = ("content",), ("size",), ("init",)
        first = self.for_stage(self.initial_size)
        if self.content is None:
            if self.size is None and not self.loss.content_weight:  # else the content is what is missing
                yield Conflict((size, content), "null takes the content's size, and there is no content; give one")
            if self.init == "content":
                yield Conflict((init, content), "there is no content to start from; choose noise, or a picture")
            if self.color != "style":
                text = f"{self.color} takes the content's colours, and there is no content; choose style, or give one"
                yield Conflict((("color",), content), text)
        elif isinstance(self.size, tuple):
            text = "[width, height] is for a picture without content; with one, give the long side alone"
            yield Conflict((size, content), text)
        if self.init == "gray" and not first.loss.content_weight:
            text = "without content every pixel of a gray canvas has the same gradient, and it stays gray; choose noise"
            yield Conflict((init, ("loss", "content_weight")), text)

    def _loss_conflicts(self) -> Iterator[Conflict]:
        total = sum(style.weight for style in self.styles)
        if self.content is None and self.loss.content_weight:
            text = "missing; a path is wanted: image to paint. Only a texture (loss.content_weight: 0) needs none"
            yield Conflict((("content",),), text)
        if not self.styles:
            if self.loss.style_weight:
                text = "a list with at least one entry is wanted, unless loss.style_weight is 0"
                yield Conflict((("styles",), ("loss", "style_weight")), text)
        elif not 0 < total < math.inf:
            yield Conflict((("styles",),), f"the weights sum to {total}, so no style can be given its share")
        else:
            yield from self._region_conflicts()
        weights = self.loss.content_weight, self.loss.style_weight
        layers = self.network.content_layers, self.network.style_layers
        keys = (("loss", "style_weight"), ("loss", "content_weight"))
        layer_keys = (("network", "style_layers"), ("network", "content_layers"))
        nothing = "so there would be nothing to optimise"
        if not any(weights):
            yield Conflict(keys, f"0 here and in loss.content_weight, {nothing}")
        elif not any(layers):
            yield Conflict(layer_keys, f"no layer here nor in network.content_layers, {nothing}")
        elif not any(weight and names for weight, names in zip(weights, layers, strict=True)):
            yield Conflict(
                (*keys, *layer_keys), f"the only weight above 0 belongs to an empty list of layers, {nothing}"
            )
        if self.network.name == "random" and self.network.weights is not None:
            text = "network random makes its weights from the seed and would ignore this file; set it to null"
            yield Conflict((("network", "weights"), ("network", "name")), text)

    def _region_conflicts(self) -> Iterator[Conflict]:
        """Styles that share a mask share its region by their weights."""
        for region in regions_of(self.styles):
            if not sum(self.styles[index].weight for index in region.styles) > 0:
                keys = tuple(("styles", index, "weight") for index in region.styles)
                where = "without a mask" if region.mask is None else f"with the mask {region.mask}"
                text = (
                    f"0 for every style {where}, so that nothing would paint there; give one a weight, or leave it out"
                )
                yield Conflict(keys, text)

    def _grid_conflicts(self) -> Iterator[Conflict]:
        tile_px, chunk_px = self.compute.tile_px, self.store.chunk_px
        if tile_px != "auto" and tile_px % chunk_px:
            text = f"{tile_px} is no multiple of store.chunk_px = {chunk_px}; a tile is written as whole chunks"
            yield Conflict((("compute", "tile_px"), ("store", "chunk_px")), text)

    def _state_conflicts(self) -> Iterator[Conflict]:
        state, clip, dtype = ("store", "state_dtype"), ("optimizer", "clip"), ("compute", "dtype")
        if self.store.state_dtype == "compact" and not self.optimizer.clip:
            text = "compact keeps a canvas of 0..255, which optimizer.clip: false lets it leave; choose float, or clip"
            yield Conflict((state, clip), text)
        if self.store.state_dtype == "compact" and self.compute.dtype == "float64":
            text = "compact would round away what compute.dtype float64 computes; choose float, or float32"
            yield Conflict((state, dtype), text)

    def _format_conflicts(self) -> Iterator[Conflict]:
        form, export = format_of(self.output), self.export
        bits, compression = ("export", "bits"), ("export", "compression")
        if export.bits == 16 and form is not None and 16 not in form.bits:
            text = f"{form.suffixes[0]} pictures have 8 bits; choose 8, or a .tif, .png or .zarr output"
            yield Conflict((bits, ("output",)), text)
        if export.bits == 16 and is_jpeg_inside(self.output, export.compression):
            yield Conflict(
                (compression, bits, ("output",)), "jpeg stores 8 bits only; choose another, or export.bits 8"
            )
        for option, why in unheeded(self.output, export.changed):
            yield Conflict((("export", option), ("output",)), why)

    def _path_conflicts(self) -> Iterator[Conflict]:
        output_key, work_dir_key = ("output",), ("work_dir",)
        for key, path in input_files(self):
            if same_file(path, self.output):
                yield Conflict((output_key, key), f"the same file as {dotted(key)}, which would be overwritten")
            if same_file(path, self.work_dir):
                text = f"the same path as {dotted(key)}; the run needs a folder of its own"
                yield Conflict((work_dir_key, key, output_key), text)
        output, work_dir = real(self.output), real(self.work_dir)
        if output == work_dir or output in work_dir.parents:
            text = "at or inside the output, which is replaced as a whole at the end; choose another folder"
            yield Conflict((work_dir_key, output_key), text)


def _overridden(base: Section, override: Section) -> Section:
    """`base` with the given keys of `override`; a default that follows from another key follows again."""
    values = dict(base)
    for name, field in type(base).model_fields.items():
        if field.default_factory_takes_validated_data and values[name] == field.get_default(
            call_default_factory=True, validated_data=values
        ):
            del values[name]
    given = {name: getattr(override, name) for name in override.model_fields_set}
    values |= {name: value for name, value in given.items() if value is not None}
    return type(base).model_validate(values)


def same_file(one: Path, other: Path) -> bool:
    """Whether both names are of one file, as far as can be told."""
    if real(one) == real(other):
        return True
    try:
        return one.samefile(other)
    except OSError:  # one of them cannot be looked at, or is not there, which is for whoever opens it to say
        return False


def load_config(path: str | Path, overrides: Sequence[str] = (), varied: Sequence[str] = ()) -> Config:
    """The config in the YAML file `path`, with `key.inner=value` overrides applied; all its paths made absolute.

    Paths in the file are relative to its folder, paths in overrides to the current one. `varied`: overrides that a
    preview makes. Raises `ConfigError` with every problem, one per line, as `file:line:column: key: what`
    (`--set key=value: key: what` for an override, `--vary …` for a varied one), StorageError where a disk fails.
    """
    file = Path(path)
    document = read(file)
    settings = [*(("--set", setting) for setting in overrides), *(("--vary", setting) for setting in varied)]
    for number, (option, setting) in enumerate(settings):
        document.override(number, setting, option)
    config = None
    if document.readable:
        config = validate(Config, document, Path.cwd() / file.parent)
    if config is None or document.problems:
        raise ConfigError(told(document.problems))
    return config


def result_fields(config: Config) -> dict[str, object]:
    """Dotted key to JSON-able value of all that decides the picture; where it differs, a resume would mix two pictures.

    Left out are fields marked `HARMLESS`, and files, which are compared by their content elsewhere.
    """
    fields = {dotted(key): value for key, value, mark in _values(config) if _decides(value, mark)}
    fields |= shared_masks(config.styles, "")
    for index, stage in enumerate(config.stages):
        fields |= shared_masks(stage.styles or (), f"stages.{index}.")
    return fields


def input_files(config: Config) -> Iterator[tuple[Key, Path]]:
    """(key, path) of every file that the config reads."""
    for key, value, mark in _values(config):
        if mark == COMPARED_BY_CONTENT["resume"] and isinstance(value, Path):
            yield key, value


def _decides(value: object, mark: object) -> bool:
    if mark == COMPARED_BY_CONTENT["resume"]:
        return isinstance(value, str)  # the word of a key that takes a file too
    return mark is None


def _values(
    value: object, key: Key = (), mark: object = None, given: bool = False
) -> Iterator[tuple[Key, Any, object]]:
    """(key, value, its mark for a resume) of all that is no section or list; `given`: only keys that were given."""
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            inner, marks = getattr(value, name), field.json_schema_extra
            own = marks.get("resume") if isinstance(marks, dict) else None
            if own == NEW["resume"]:
                # in a stage, a default that is given differs from what it would be else
                own = HARMLESS["resume"] if inner == field.get_default() and not given else None
            if not given or name in value.model_fields_set:
                yield from _values(inner, (*key, name), mark or own, given or isinstance(value, StageConfig))
    elif isinstance(value, tuple):
        for index, entry in enumerate(value):
            yield from _values(entry, (*key, index), mark, given)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _values(entry, (*key, name), mark, given)
    else:
        yield key, value, mark
