"""The config of a training: its keys, defaults and limits, and the rules between them. Lengths are in px.

Keys marked HARMLESS may change when a training is resumed; all others decide the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.config import read_overridden, refuse_other_command, validated
from pipeline.config.fields import MAX_THREADS, Device, File, Float, Int, Layers, Share
from pipeline.config.messages import Conflict, ConflictsError, allowed
from pipeline.config.sections import COMPARED_BY_CONTENT, HARMLESS, LimitsConfig, NetworkConfig, Section, new
from pipeline.core.files import real, same_file
from pipeline.core.text import shown
from pipeline.core.vgg_layers import ALIGN_PX, min_side_px

NETWORK_SUFFIX = ".safetensors"
# Crops of style transfer and of super-resolution, in the paper.
_CROP_PX = {"style": 256, "super-resolution": 288}
_MAX_TRAINED_STYLES = 64
# Crops and styles go through the loss network as a whole, without tiles.
_WholePx = Annotated[Int, Field(ge=ALIGN_PX, le=4096)]


def _network_suffix(path: Path) -> Path:
    if path.suffix != NETWORK_SUFFIX:
        raise ValueError(f"the trained network is a {NETWORK_SUFFIX} file; {allowed(path.suffix, (NETWORK_SUFFIX,))}")
    return path


class TrainedStyle(Section):
    """A style that the network learns."""

    image: File = Field(description="style image", json_schema_extra=COMPARED_BY_CONTENT)
    size: _WholePx = Field(
        512, description="its long side in px, at which it is compared: the size of the strokes in the result"
    )
    name: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(
        None, description="name by which `apply` selects it; null: that of the file", json_schema_extra=HARMLESS
    )


class TransformConfig(Section):
    """The network to be trained (Johnson et al. 2016)."""

    width: Float = Field(
        0.5, gt=0, le=8, description="channels relative to the paper's 32, 64, 128 (64 for super-resolution)"
    )
    blocks: Annotated[Int, Field(ge=0, le=64)] | None = Field(
        None, description="residual blocks; null: 5 for a style, 4 for super-resolution"
    )
    norm: Literal["instance", "batch", "none"] | None = Field(
        None, description="norm of the features; null: instance for a style, batch for super-resolution"
    )
    upsampling: Literal["nearest", "fractional"] = Field(
        "nearest", description="nearest: no checkerboard; fractional: as in the paper"
    )
    skip: Literal["bicubic", "none"] | None = Field(
        None,
        description="what the output is added to: bicubic enlargement; null: bicubic for super-resolution",
        json_schema_extra=HARMLESS,  # what it stands for is compared
    )


class LossNetworkConfig(NetworkConfig):
    """The feature network of the losses, and the layers that they use."""

    content_layers: Layers = Field({"conv3_3": 1.0}, description="layers of the content loss and their weights")
    style_layers: Layers = Field(
        {"conv1_2": 0.3, "conv2_2": 0.3, "conv3_3": 0.2, "conv4_3": 0.2},
        description="layers of the style loss and their weights",
    )


class TrainingLossConfig(Section):
    """The losses and their weights."""

    content: Literal["features", "pixels"] = Field(
        "features", description="what is compared with the photograph; pixels is for super-resolution"
    )
    kind: Literal["wasserstein", "normalized", "gatys"] = Field(
        "wasserstein", description="style loss; wasserstein compares mean and covariance; others: Gram matrices"
    )
    content_weight: Share = Field(0.3, description="weight of the content loss")
    style_weight: Share = Field(1.0, description="weight of the style loss")
    tv_weight: Share = Field(0.2, description="total variation, against grain; 0: off")
    pixel_weight: Share = Field(
        0.0,
        description="weight of the pixels' mean square beside the features, for super-resolution: keeps colours",
        json_schema_extra=new(0.0),
    )


class ScheduleConfig(Section):
    """Steps, batches and Adam."""

    steps: Int = Field(
        40_000, ge=1, le=10_000_000, description="steps of Adam, of a batch each", json_schema_extra=HARMLESS
    )
    batch: Int = Field(4, ge=1, le=256, description="photographs in a step")
    crop_px: _WholePx | None = Field(
        None, description="side of a crop in px; null: 256 for a style, 288 for super-resolution"
    )
    learning_rate: Float = Field(1e-3, gt=0, le=1, description="learning rate of Adam")
    halve_every: Int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="steps after which the learning rate is halved, each time anew; 0: never",
        json_schema_extra=new(0),
    )
    checkpoint_every: Int = Field(
        250, ge=1, le=1_000_000, description="steps between two checkpoints", json_schema_extra=HARMLESS
    )
    sample_every: Int = Field(
        1000, ge=0, le=10_000_000, description="steps between two sample pictures; 0: none", json_schema_extra=HARMLESS
    )


class TrainingComputeConfig(Section):
    """Device, precision and threads."""

    device: Device = Field("auto", description="device", json_schema_extra=HARMLESS)  # the device itself is compared
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="number format of the convolutions; auto: bfloat16 on CUDA, float32 on a CPU"
    )
    threads: Annotated[Int, Field(ge=1, le=MAX_THREADS)] | Literal["auto"] = Field(
        "auto",
        description="CPU threads; a resume keeps their number, on which the last bits depend",
        json_schema_extra=HARMLESS,
    )


def _default_train_dir(data: dict[str, Any]) -> Path:
    output: Path = data.get("output", Path("refused"))  # absent if it was invalid; then the config is refused
    return output.with_name(f"{output.stem}.train")


class TrainConfig(Section):
    """The keys of a training's config file. All paths are absolute."""

    task: Literal["style", "super-resolution"] = Field("style", description="what the network learns")
    factor: Literal[4, 8] = Field(4, description="enlargement of super-resolution")
    styles: tuple[TrainedStyle, ...] = Field(
        (), max_length=_MAX_TRAINED_STYLES, description="styles; several share one network, by conditional norm"
    )
    photographs: File = Field(
        description="folder of photographs, read with its subfolders",
        examples=["photographs"],
        json_schema_extra=COMPARED_BY_CONTENT,
    )
    output: Annotated[File, AfterValidator(_network_suffix)] = Field(
        description="trained network, .safetensors", examples=["style.safetensors"], json_schema_extra=HARMLESS
    )
    work_dir: File = Field(
        default_factory=_default_train_dir,
        description="folder of the checkpoint, the losses and the samples; by default beside the output",
        json_schema_extra=HARMLESS,
    )
    network: TransformConfig = Field(TransformConfig(), description="network to be trained")
    loss_network: LossNetworkConfig = Field(LossNetworkConfig(), description="feature network of the losses")
    loss: TrainingLossConfig = Field(TrainingLossConfig(), description="losses")
    training: ScheduleConfig = Field(ScheduleConfig(), description="schedule")
    samples: tuple[File, ...] = Field(
        (),
        max_length=16,
        description="pictures shown in the samples; by default the first photographs",
        json_schema_extra=HARMLESS,
    )
    compute: TrainingComputeConfig = Field(TrainingComputeConfig(), description="device, precision and threads")
    limits: LimitsConfig = Field(LimitsConfig(), description="limits of the inputs", json_schema_extra=HARMLESS)
    seed: Int = Field(0, ge=0, lt=2**63, description="seed of the first weights and of the crops")

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        if conflicts := list(_conflicts(self)):
            raise ConflictsError(conflicts)
        return self

    @property
    def crop_px(self) -> int:
        """Side of a crop of the photographs in px."""
        return self.training.crop_px or _CROP_PX[self.task]

    @property
    def style_names(self) -> tuple[str, ...]:
        """The names of the styles."""
        return tuple(style.name or shown(style.image.stem) for style in self.styles)


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config of a training in the YAML file `path`; otherwise as load_config, with inputs checked."""
    file = Path(path)
    document = read_overridden(file, overrides)
    refuse_other_command(document, "train")
    return validated(TrainConfig, document, Path.cwd() / file.parent, check_inputs=True)


def _conflicts(config: TrainConfig) -> Iterator[Conflict]:
    if config.task == "style":
        yield from _style_conflicts(config)
    elif config.styles:
        yield Conflict((("styles",), ("task",)), "super-resolution has no styles; remove them, or use task: style")
    if config.crop_px % ALIGN_PX:
        text = f"a crop must be a multiple of {ALIGN_PX} px, to which the layers of the losses are aligned"
        yield Conflict((("training", "crop_px"),), text)
    yield from _place_conflicts(config)
    loss, network = config.loss, config.loss_network
    layers = {**network.content_layers, **network.style_layers}
    least = min_side_px(tuple(layers), network.padding)
    if config.crop_px < least:
        text = f"{config.crop_px} px is too small for the layers of the losses, which need {least} px"
        yield Conflict((("training", "crop_px"), ("loss_network",)), text)
    weights = (loss.content_weight, loss.style_weight if config.task == "style" else 0.0, loss.pixel_weight)
    if not any(weights):
        yield Conflict((("loss",),), "content and style have no weight, so there is nothing to learn")


def _place_conflicts(config: TrainConfig) -> Iterator[Conflict]:
    folder, work_dir = real(config.photographs), real(config.work_dir)
    if work_dir == folder or folder in work_dir.parents:
        text = "is inside the folder of the photographs, and its samples would be taken for such; choose another folder"
        yield Conflict((("work_dir",), ("photographs",), ("output",)), text)
    if config.loss_network.weights is not None and same_file(config.output, config.loss_network.weights):
        text = "the trained network would replace the weights of the loss network; choose another name"
        yield Conflict((("output",), ("loss_network", "weights")), text)


def _style_conflicts(config: TrainConfig) -> Iterator[Conflict]:
    if not config.styles:
        yield Conflict((("styles",),), "a style network needs a style, such as styles: [{image: style.jpg}]")
    if config.loss.content == "pixels":
        text = "the pixels of a stylised picture are not those of the photograph; use features"
        yield Conflict((("loss", "content"), ("task",)), text)
    if config.network.skip == "bicubic":
        text = "a style paints anew what super-resolution adds to; remove skip"
        yield Conflict((("network", "skip"), ("task",)), text)
    if config.loss.pixel_weight:
        text = "the pixels of a stylised picture are not those of the photograph; remove pixel_weight"
        yield Conflict((("loss", "pixel_weight"), ("task",)), text)
    if len(config.styles) > 1 and config.network.norm not in (None, "instance"):
        text = "several styles need norm: instance, whose scale and shift are each style's own"
        yield Conflict((("network", "norm"), ("styles",)), text)
    names = config.style_names
    if len(set(names)) < len(names):
        text = f"two styles have the name {shown(next(n for n in names if names.count(n) > 1))!r}; give each its own"
        yield Conflict((("styles",),), text)
