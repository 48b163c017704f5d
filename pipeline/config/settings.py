"""All settings of a run and their defaults, each valid by itself; `Config` adds the rules between them.

The models here and in sections.py are the only place that knows the keys, their defaults and limits, and what a changed
value means for a resume. Lengths are in px, sizes in bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field

from pipeline.config.fields import (
    MAX_STAGES,
    MAX_STYLES,
    Bool,
    File,
    Float,
    IccFile,
    Int,
    Output,
    SidePx,
    StartName,
    parse_px,
)
from pipeline.config.messages import Expected
from pipeline.config.output_sections import ExportConfig
from pipeline.config.sections import (
    COMPARED_BY_CONTENT,
    HARMLESS,
    ComputeConfig,
    InitNetwork,
    InitWct,
    LimitsConfig,
    LossConfig,
    MemoryConfig,
    NetworkConfig,
    OptimizerConfig,
    PrintSize,
    Section,
    StageConfig,
    StoreConfig,
    StyleConfig,
    new,
    parse_init,
)
from pipeline.core.color_spaces import SpaceName, WorkingSpace
from pipeline.core.image_formats import OUTPUT_SUFFIXES
from pipeline.core.presets import PresetName

Start = Annotated[
    StartName
    | Annotated[InitNetwork, Expected("apply:net.safetensors")]
    | Annotated[InitWct, Expected("wct:pairs.safetensors")]
    | File,
    Field(union_mode="left_to_right"),
    BeforeValidator(parse_init),
]
OnPaper = Annotated[PrintSize, Expected("a length such as 60cm or {width: 60cm, dpi: 150}")]


def default_work_dir(data: dict[str, Any]) -> Path:
    """The run directory beside the output."""
    # `output` is absent if it was invalid; then the whole config is refused, and this value is never used.
    output: Path = data.get("output", Path("refused"))
    return output.with_name(f"{output.stem}.run")


def _default_init(data: dict[str, Any]) -> Literal["content", "noise"]:
    return "content" if data.get("content") else "noise"


class Settings(Section):
    """The keys of a config file. All paths are absolute."""

    preset: PresetName | None = Field(
        None, description="values for the keys below that are not given; null: the defaults", json_schema_extra=HARMLESS
    )
    content: File | None = Field(
        None,
        description="content image; null, with loss.content_weight 0, makes a texture of the styles",
        examples=["content.jpg"],
        json_schema_extra=COMPARED_BY_CONTENT,
    )
    styles: tuple[StyleConfig, ...] = Field(
        max_length=MAX_STYLES,
        description="style images; may be empty if loss.style_weight is 0",
        examples=[[{"image": "style.jpg"}]],
    )
    output: Output = Field(
        description=f"output image, {' '.join(OUTPUT_SUFFIXES)}", examples=["result.tif"], json_schema_extra=HARMLESS
    )
    work_dir: File = Field(
        default_factory=default_work_dir,
        description="run directory, which holds the state; by default beside the output",
        json_schema_extra=HARMLESS,
    )
    size: Annotated[SidePx | tuple[SidePx, SidePx] | OnPaper | None, BeforeValidator(parse_px)] = Field(
        None, description="long side of the output, or [width, height] of a texture; null: as the content"
    )
    initial_size: SidePx | Literal["auto"] = Field(
        "auto", description="long side of the coarsest stage in px; auto: what the network sees at once"
    )
    stage_ratio: Float = Field(
        1.7, ge=1.2, le=4, description="size of a stage relative to the one before", json_schema_extra=new(2.0)
    )
    stage_smoothing: Bool = Field(
        False,
        description="smooth the canvas (1-2-1) before it is enlarged, against a lattice in the result",
        json_schema_extra=new(False),
    )
    style_stages: Bool = Field(
        False, description="more stages while a style is larger than the canvas", json_schema_extra=new(True)
    )
    network: NetworkConfig = Field(NetworkConfig(), description="feature network")
    loss: LossConfig = Field(LossConfig(), description="loss function")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer and its schedule")
    stages: tuple[StageConfig, ...] = Field(
        (), max_length=MAX_STAGES, description="overrides for some sizes: styles, network layers, loss, optimizer"
    )
    color: Literal["style", "content", "luminance"] = Field(
        "style",
        description="where the colours come from; luminance keeps the content's colours and stylises brightness only",
        json_schema_extra=new("style"),
    )
    working_space: WorkingSpace = Field(
        "auto",
        description="colours that the canvas can have; auto: sRGB, or more for a wider export.profile",
        json_schema_extra=new("srgb"),
    )
    proof: IccFile | None = Field(
        None,
        description="printer's profile; content and styles lose the colours that it cannot print",
        json_schema_extra=COMPARED_BY_CONTENT,
    )
    init: Start = Field(
        default_factory=_default_init,
        description="initial canvas of the coarsest stage",
        json_schema_extra=COMPARED_BY_CONTENT,
    )
    dequantize: Bool = Field(
        True,
        description="add noise of half a level to an initial canvas that is an image, so that no pixels are equal",
        json_schema_extra=new(False),
    )
    init_noise: Float = Field(
        32.0,
        ge=0,
        le=255,
        description="noise of up to so many levels in init: content, so that flat areas too get the style's forms",
        json_schema_extra=new(0.0),
    )
    compute: ComputeConfig = Field(ComputeConfig(), description="device, precision and parallelism")
    memory: MemoryConfig = Field(MemoryConfig(), description="host memory", json_schema_extra=HARMLESS)
    store: StoreConfig = Field(StoreConfig(), description="state on disk")
    limits: LimitsConfig = Field(LimitsConfig(), description="limits checked at the start", json_schema_extra=HARMLESS)
    export: ExportConfig = Field(ExportConfig(), description="file format of the output", json_schema_extra=HARMLESS)
    seed: Int = Field(0, ge=0, lt=2**63, description="seed of the noise and of the random network")

    @property
    def start_noise(self) -> float:
        """Half the width of the noise that is added to a start from an image, in levels."""
        least = 0.5 if self.dequantize else 0.0
        return max(least, self.init_noise) if self.init == "content" else least

    @property
    def canvas_space(self) -> SpaceName:
        """The colour space of the canvas; the working space is only `auto` until the run begins."""
        assert self.working_space != "auto" or self.export.profile == "srgb", "not resolved"
        return "srgb" if self.working_space == "auto" else self.working_space

    @property
    def state(self) -> str:
        """The number format of the state on disk: float32, float64 or compact."""
        if self.store.state_dtype == "compact":
            return "compact"
        return "float64" if self.compute.dtype == "float64" else "float32"

    @property
    def masks(self) -> tuple[Path, ...]:
        """The mask files of all styles and of the content, without duplicates."""
        paths = [*(style.mask for style in self.styles), self.loss.content_mask]
        return tuple(dict.fromkeys(path for path in paths if path is not None))

    @property
    def size_px(self) -> int | tuple[int, int] | None:
        """`size` of a config in which it is in px; see rundir.resolved."""
        assert not isinstance(self.size, PrintSize), "the size in px depends on the content's header"
        return self.size

    @property
    def target_px(self) -> int | None:
        """The long side of the output, or None if it is the content's."""
        return max(self.size_px) if isinstance(self.size_px, tuple) else self.size_px

    @property
    def for_first_stage(self) -> Self:
        """The config of the coarsest stage, whatever its size: a first entry of `stages` that it lacks is refused."""
        return self.overridden_by(self.stages[0]) if self.stages else self

    def for_stage(self, long_px: int) -> Self:
        """The config of a stage whose canvas has this long side: this one with the overrides of `stages`."""
        stage = self.override_at(long_px)
        return self if stage is None else self.overridden_by(stage)

    def override_at(self, long_px: int) -> StageConfig | None:
        """The entry of `stages` that applies to a canvas with this long side."""
        return next((stage for stage in self.stages if long_px <= stage.up_to), None)

    def overridden_by(self, stage: StageConfig) -> Self:
        """This config with the overrides of one entry of `stages`."""
        sections = {name: getattr(stage, name) for name in ("network", "loss", "optimizer")}
        changed: dict[str, Any] = {
            name: _overridden(getattr(self, name), section) for name, section in sections.items() if section is not None
        }
        if stage.styles is not None:
            changed["styles"] = stage.styles
        return self.model_copy(update=changed)


def _overridden(base: Section, override: Section) -> Section:
    """`base` with the given keys of `override`. Defaults that depend on another key are computed again."""
    values = dict(base)
    for name, field in type(base).model_fields.items():
        if field.default_factory_takes_validated_data and values[name] == field.get_default(
            call_default_factory=True, validated_data=values
        ):
            del values[name]
    values |= {name: value for name in override.model_fields_set if (value := getattr(override, name)) is not None}
    return type(base).model_validate(values)
