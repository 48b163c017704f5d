"""The sections of a config: frozen models of its keys, with their defaults, limits and descriptions.

Error messages, the `pipeline init` template and the resume check are generated from them. Lengths are in px, sizes in
bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, model_validator

from pipeline.config.fields import (
    MAX_CHUNK_PX,
    MAX_ITERATIONS,
    MAX_SIDE_PX,
    MAX_STYLES,
    MAX_THREADS,
    MAX_WORKERS,
    Bool,
    Bytes,
    Device,
    Devices,
    Dpi,
    File,
    Float,
    Int,
    Layers,
    Length,
    NetworkFile,
    Pixels,
    Scheduler,
    Seconds,
    Share,
    SidePx,
)
from pipeline.core.vgg_layers import ALIGN_PX, PoolingKind

NetworkName = Literal["vgg19", "vgg19-lite", "random"]
# A resume may change these keys: they do not affect the result.
HARMLESS: dict[str, Any] = {"resume": "harmless"}
# Files: a resume compares their content, not their names.
COMPARED_BY_CONTENT: dict[str, Any] = {"resume": "compared by content hash"}
ADDED_LATER = "compared unless it has the value of the runs from before it"


def new(before: object) -> dict[str, Any]:
    """The mark of a key that was added after the first release. `before`: what the runs from before it do.

    Not the default: that may change, and a run on disk keeps what it began with.
    """
    return {"resume": ADDED_LATER, "before": before}


class Section(BaseModel):
    """Frozen and strict: unknown keys, NaN and infinity are refused. Serialised under the names of the keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, serialize_by_alias=True)


class PrintSize(Section):
    """The size of the output on paper. A length alone is that of the long side."""

    long_side: Length | None = Field(None, description="the longer side")
    width: Length | None = Field(None, description="width; the height follows from the content")
    height: Length | None = Field(None, description="height; the width follows from the content")
    dpi: Dpi | None = Field(None, description="px per inch; null: export.dpi, or 300")

    @model_validator(mode="before")
    @classmethod
    def _of_a_length(cls, data: object) -> object:
        # digits alone are px in quotes, or 1_000, of which the whole union's message is clearer
        return {"long_side": data} if isinstance(data, str) and not data.replace("_", "").isdigit() else data


class StyleConfig(Section):
    """A style image and its weight, relative to the sum of all weights."""

    image: File = Field(description="style image", json_schema_extra=COMPARED_BY_CONTENT)
    weight: Share = Field(1.0, description="weight relative to the other styles")
    scale: Float = Field(
        1.0, gt=0, le=100, description="size relative to the canvas; smaller: finer detail", json_schema_extra=new(1.0)
    )
    max_size: SidePx | None = Field(
        None, description="maximum long side in px; null: no limit", json_schema_extra=new(None)
    )
    mask: File | None = Field(
        None,
        description="mask for this style: same aspect ratio as the content; white = apply, black = leave",
        json_schema_extra=COMPARED_BY_CONTENT,
    )


class InitNetwork(Section):
    """A start picture: the content through an image transformation network. Written `apply:net.safetensors`."""

    apply: NetworkFile = Field(description="network, as for `pipeline apply`", json_schema_extra=COMPARED_BY_CONTENT)


class InitWct(Section):
    """A start picture: the content with the features' moments of the styles. Written `wct:pairs.safetensors`."""

    wct: File = Field(
        description="encoder-decoder pairs, as for `pipeline apply --style`", json_schema_extra=COMPARED_BY_CONTENT
    )


def parse_init(value: object) -> object:
    """`apply:net.safetensors` or `wct:pairs.safetensors` as the section that it stands for."""
    if isinstance(value, str):
        for key in ("apply", "wct"):
            if value.startswith(f"{key}:"):
                return {key: type(value)(value.removeprefix(f"{key}:").strip())}
    return value


class NetworkConfig(Section):
    """The feature network, and the layers that the losses use."""

    name: NetworkName = Field("vgg19", description="feature network; vgg19-lite needs no download, random is for tests")
    weights: File | None = Field(
        None, description="weights file; null uses those of the network", json_schema_extra=COMPARED_BY_CONTENT
    )
    padding: Literal["replicate", "zeros", "reflect"] = Field(
        "reflect", description="padding at the image border; reflect: borders as calm as the inside"
    )
    pooling: PoolingKind = Field(
        "mixed", description="pooling of the network; mixed: average in the first, against grain, max in the others"
    )
    pooling_scale: Float = Field(
        1.0,
        gt=0,
        le=100,
        description="factor behind every pooling; docs/networks.md has those that keep the magnitudes of max pooling",
        json_schema_extra=new(1.0),
    )
    content_layers: Layers = Field({"conv4_2": 1.0}, description="layers of the content loss and their weights")
    style_layers: Layers = Field(
        {"conv1_1": 0.3, "conv2_1": 0.25, "conv3_1": 0.2, "conv4_1": 0.15, "conv5_1": 0.1},
        description="layers of the style loss and their weights",
    )


class LossConfig(Section):
    """The kind of losses, and the weights of content, style and total variation."""

    kind: Literal["normalized", "gatys", "wasserstein"] = Field(
        "wasserstein",
        description="style loss; wasserstein compares mean and covariance; gatys, normalized: Gram matrices",
    )
    content_weight: Share = Field(0.3, description="weight of the content loss")
    style_weight: Share = Field(1.0, description="weight of the style loss")
    tv_weight: Share = Field(
        0.2, description="total variation, against grain; 0.05 to 1, 0: off", json_schema_extra=new(0.0)
    )
    tv_kind: Literal["squared", "absolute"] = Field(
        "absolute",
        description="differences of total variation; absolute: flat areas and clear edges, squared: soft ones",
        json_schema_extra=new("squared"),
    )
    scales: Literal[1, 2, 3, 4] = Field(
        1,
        description="compare the canvas also at 1/2, 1/4, 1/8 of its size, down to initial_size; 3: longer strokes",
        json_schema_extra=new(1),
    )
    content_mask: File | None = Field(
        None,
        description="mask for the content loss: same aspect ratio as the content; white = keep, black = ignore",
        json_schema_extra=COMPARED_BY_CONTENT,
    )

    @property
    def compares_means(self) -> bool:
        """Whether the style loss compares the features' means too, and not Gram matrices alone."""
        return self.kind == "wasserstein"


def _default_stop(data: dict[str, Any]) -> float:
    return 0.1 if data.get("schedule") == "constant" else 0.0


class OptimizerConfig(Section):
    """Adam and its schedule."""

    schedule: Literal["cosine", "constant"] = Field("cosine", description="step size over the iterations of a stage")
    max_iterations: Int = Field(40, ge=1, le=MAX_ITERATIONS, description="iterations of each stage")
    coarse_iterations: Float = Field(
        5.0,
        ge=1,
        le=100,
        description="times max_iterations, at most, in small stages before the last, where colours and forms arise",
        json_schema_extra=new(1.0),
    )
    target_pixel_change: Float = Field(
        8.0, gt=0, le=255, description="largest change in the first step, in levels of each coordinate"
    )
    stop_condition: Float = Field(
        default_factory=_default_stop, ge=0, description="end a stage when mean|u| is below this; 0.1 if constant"
    )
    beta1: Float = Field(0.9, ge=0, lt=1, description="decay of Adam's first moment")
    beta2: Float = Field(0.99, ge=0, lt=1, description="decay of Adam's second moment")
    epsilon: Float = Field(1e-6, gt=0, le=1e6, description="added to the second moment, under the square root")
    clip: Bool = Field(True, description="clip the canvas to 0..255 after each step")
    color_space: Literal["rgb", "decorrelated"] = Field(
        "decorrelated",
        description="coordinates of Adam's steps; decorrelated: luminance and two colours, for less coloured grain",
        json_schema_extra=new("rgb"),
    )
    carry: Bool = Field(
        False,
        description="start from the moments and the step size of the stage before; false: a fresh start per stage",
        json_schema_extra=new(False),
    )
    average: Float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of a moving average of the canvas, the stage's result; 0: off, 0.95: smoother",
        json_schema_extra=new(0.0),
    )


class StageLayersConfig(Section):
    """The layers that the losses use in some stages. All stages have the same network."""

    content_layers: Layers | None = Field(None, description="layers of the content loss in these stages")
    style_layers: Layers | None = Field(None, description="layers of the style loss in these stages")


class StageConfig(Section):
    """Overrides for the stages up to a size. A key that is not given keeps its value of the config's top level.

    Only the given keys of a section count, and only they are serialised.
    """

    up_to: SidePx = Field(description="largest long side, in px, of these stages; the first matching entry applies")
    styles: tuple[StyleConfig, ...] | None = Field(None, max_length=MAX_STYLES, description="styles of these stages")
    network: StageLayersConfig | None = Field(None, description="layers of these stages")
    loss: LossConfig | None = Field(None, description="losses of these stages")
    optimizer: OptimizerConfig | None = Field(None, description="optimizer of these stages")

    @field_serializer("network", "loss", "optimizer")
    def _given_keys(self, section: Section | None) -> dict[str, Any] | None:
        return None if section is None else section.model_dump(mode="json", exclude_unset=True)


class ComputeConfig(Section):
    """Device, precision and parallelism."""

    device: Device = Field("auto", description="device", json_schema_extra=HARMLESS)
    dtype: Literal["float32", "float64", "tf32", "bfloat16"] = Field("float32", description="number format")
    tile_px: Annotated[Int, Field(gt=0, le=2 * MAX_SIDE_PX)] | Literal["auto"] = Field(
        "auto", description="side of a tile in px, a multiple of store.chunk_px", json_schema_extra=HARMLESS
    )
    workers: Int = Field(0, ge=0, le=MAX_WORKERS, description="worker processes; 0: none", json_schema_extra=HARMLESS)
    devices: Devices = Field(
        "auto", description="a process for each device listed; auto: all GPUs if alike", json_schema_extra=HARMLESS
    )
    scheduler: Scheduler = Field(
        "none", description="cluster to compute on: address of a scheduler, or its file", json_schema_extra=HARMLESS
    )
    cluster_key: File | None = Field(
        None, description="key of the cluster; null: cluster.pem beside its scheduler file", json_schema_extra=HARMLESS
    )
    threads: Annotated[Int, Field(ge=1, le=MAX_THREADS)] | Literal["auto"] = Field(
        "auto",
        description="CPU threads per tile; auto chooses at the start and keeps the number on resume",
        json_schema_extra=HARMLESS,
    )

    @property
    def tile_processes(self) -> int:
        """Worker processes on this machine that compute tiles, as far as the config says; 0: none."""
        return self.workers if self.devices == "auto" else len(self.devices)


class MemoryConfig(Section):
    """Host memory of the run."""

    limit: Bytes = Field(4 * 2**30, description="maximum host memory of the run")

    @property
    def limit_bytes(self) -> int:
        """The limit in bytes."""
        return self.limit


class StoreConfig(Section):
    """Format of the state on disk. It cannot change during a run, except for `durability` and `commit_interval`."""

    chunk_px: Int = Field(512, ge=ALIGN_PX, le=MAX_CHUNK_PX, multiple_of=ALIGN_PX, description="side of a chunk in px")
    codec: Literal["none", "zstd", "lz4"] = Field("none", description="compression of the state, for slow disks")
    state_dtype: Literal["float", "compact"] = Field(
        "float", description="number format of the state; compact: 16 bits per value, half the disk space"
    )
    durability: Literal["process", "power"] = Field(
        "process",
        description="what the state survives; process: any crash of the program; power: also a power failure",
        json_schema_extra=HARMLESS,
    )
    commit_interval: Seconds = Field(
        30.0,
        description="how often a stage that fits in memory goes to the disk; 0: every iteration, of every stage",
        json_schema_extra=HARMLESS,
    )


class LimitsConfig(Section):
    """Limits that guard against untrusted files and mistyped numbers.

    They are checked before the run starts, against the size and the header of each input, before decoding it.
    """

    max_pixels: Pixels = Field(10**10, description="largest input image in pixels; 10000000000 is 100,000×100,000")
    # A 16-bit RGB image of 100,000×100,000 px has 56 GiB.
    max_file_bytes: Bytes = Field(64 * 2**30, description="maximum file size of an input image")
    max_decode_bytes: Bytes = Field(
        2 * 2**30, description="maximum memory to decode an input that cannot be streamed, such as a progressive JPEG"
    )
    # VGG-19 with its classifier has 0.54 GiB, and twice that in float64.
    max_weights_bytes: Bytes = Field(2 * 2**30, description="maximum size of a weights file")
    max_result_pixels: Pixels = Field(10**10, description="maximum size of the output in pixels")
