"""The sections of a config: frozen models of its keys, with their defaults, limits and what they are for.

Error messages, the `pipeline init` template and the resume check are all made from them. Lengths are in px, sizes in
bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_serializer

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
    File,
    Float,
    Int,
    Layers,
    Pixels,
    Share,
    SidePx,
)
from pipeline.core.image_formats import Bits, Compression
from pipeline.core.vgg_layers import ALIGN_PX

NetworkName = Literal["vgg19", "vgg19-lite", "random"]
# Both are left out of `result_fields`; files of the second kind decide the picture by their content, not their name.
HARMLESS: dict[str, Any] = {"resume": "harmless"}
COMPARED_BY_CONTENT: dict[str, Any] = {"resume": "compared by content hash"}
# Keys that came later: a run from before them did what their defaults do.
NEW: dict[str, Any] = {"resume": "compared unless it has its default"}


class Section(BaseModel):
    """Frozen, and strict: unknown keys and numbers that are none are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StyleConfig(Section):
    """A style image and its share; shares are relative to their sum."""

    image: File = Field(description="style image", json_schema_extra=COMPARED_BY_CONTENT)
    weight: Share = Field(1.0, description="share among the styles")
    scale: Float = Field(
        1.0, gt=0, le=100, description="size of the style beside the canvas; small: finer detail", json_schema_extra=NEW
    )
    max_size: SidePx | None = Field(
        None, description="largest long side of the style in px; null: its own", json_schema_extra=NEW
    )
    mask: File | None = Field(
        None,
        description="where it paints: a picture of the content's proportions, white there, black elsewhere",
        json_schema_extra=COMPARED_BY_CONTENT,
    )


class NetworkConfig(Section):
    """The feature network, and which of its layers the losses look at."""

    name: NetworkName = Field("vgg19", description="feature network; vgg19-lite needs no download, random is for tests")
    weights: File | None = Field(
        None, description="weights file; null takes the network's own", json_schema_extra=COMPARED_BY_CONTENT
    )
    padding: Literal["replicate", "zeros", "reflect"] = Field("replicate", description="padding at the image border")
    pooling: Literal["max", "average"] = Field("max", description="pooling of the network; average draws cleaner lines")
    content_layers: Layers = Field({"conv4_2": 1.0}, description="layers that keep the content")
    style_layers: Layers = Field(
        {f"conv{block}_1": 0.2 for block in range(1, 6)}, description="layers whose statistics make the style"
    )


class LossConfig(Section):
    """Family of losses and the weights between content and style."""

    kind: Literal["normalized", "gatys"] = Field("normalized", description="how layer losses are scaled")
    content_weight: Share = Field(0.05, description="how much the content is kept")
    style_weight: Share = Field(1.0, description="how strongly the style is applied")
    tv_weight: Share = Field(
        0.0, description="total variation: smooths grain; 0.1 to 3, 0 not at all", json_schema_extra=NEW
    )
    content_mask: File | None = Field(
        None,
        description="where the content is kept: a picture of its proportions, white there, black where it is not",
        json_schema_extra=COMPARED_BY_CONTENT,
    )


def _default_stop(data: dict[str, Any]) -> float:
    return 0.1 if data.get("schedule") == "constant" else 0.0


class OptimizerConfig(Section):
    """Adam and its schedule."""

    schedule: Literal["cosine", "constant"] = Field("cosine", description="step size over a stage's iterations")
    max_iterations: Int = Field(60, ge=1, le=MAX_ITERATIONS, description="iterations of each stage")
    target_pixel_change: Float = Field(
        12.8, gt=0, le=255, description="largest change of a pixel by the first step, of 255"
    )
    stop_condition: Float = Field(
        default_factory=_default_stop, ge=0, description="ends a stage when mean|u| falls below; with constant 0.1"
    )
    beta1: Float = Field(0.9, ge=0, lt=1, description="decay of Adam's first moment")
    beta2: Float = Field(0.99, ge=0, lt=1, description="decay of Adam's second moment")
    epsilon: Float = Field(1e-6, gt=0, le=1e6, description="added to the second moment, under the root")
    clip: Bool = Field(True, description="keep the canvas within 0..255 after each step")
    average: Float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the average of a stage's canvases, which is its result; 0: the last one, 0.95 is calmer",
        json_schema_extra=NEW,
    )


class StageLayersConfig(Section):
    """The layers that the losses look at in some stages: all stages have the same network."""

    content_layers: Layers | None = Field(None, description="layers that keep the content there")
    style_layers: Layers | None = Field(None, description="layers whose statistics make the style there")


class StageConfig(Section):
    """What differs in the stages up to a size; a key that is not given here is as for the others.

    Of the sections, only the keys that are given count; they are written back like that.
    """

    up_to: SidePx = Field(description="stages whose canvas has at most this long side in px, and none before says so")
    styles: tuple[StyleConfig, ...] | None = Field(None, max_length=MAX_STYLES, description="their styles")
    network: StageLayersConfig | None = Field(None, description="their layers")
    loss: LossConfig | None = Field(None, description="their losses")
    optimizer: OptimizerConfig | None = Field(None, description="their optimizer")

    @field_serializer("network", "loss", "optimizer")
    def _given_keys(self, section: Section | None) -> dict[str, Any] | None:
        return None if section is None else section.model_dump(mode="json", exclude_unset=True)


class ComputeConfig(Section):
    """Where and in what numbers to compute."""

    device: Device = Field("auto", description="where to compute", json_schema_extra=HARMLESS)
    dtype: Literal["float32", "float64", "tf32", "bfloat16"] = Field("float32", description="number format")
    tile_px: Annotated[Int, Field(gt=0, le=2 * MAX_SIDE_PX)] | Literal["auto"] = Field(
        "auto", description="side of a tile in px, a multiple of store.chunk_px", json_schema_extra=HARMLESS
    )
    workers: Int = Field(
        0, ge=0, le=MAX_WORKERS, description="worker processes; 0 computes in the run's own", json_schema_extra=HARMLESS
    )
    threads: Annotated[Int, Field(ge=1, le=MAX_THREADS)] | Literal["auto"] = Field(
        "auto",
        description="CPU threads for one tile; auto keeps those that the run began with",
        json_schema_extra=HARMLESS,
    )


class MemoryConfig(Section):
    """What the run may take of the host's memory."""

    limit: Bytes = Field(4 * 2**30, description="most host memory the run may take")

    @property
    def limit_bytes(self) -> int:
        """The limit in bytes."""
        return self.limit


class StoreConfig(Section):
    """How the state lies on disk; fixed for the life of a run."""

    chunk_px: Int = Field(
        512, ge=ALIGN_PX, le=MAX_CHUNK_PX, multiple_of=ALIGN_PX, description="side of a chunk on disk in px"
    )
    codec: Literal["none", "zstd", "lz4"] = Field("none", description="compression of the state; for slow disks")
    state_dtype: Literal["float", "compact"] = Field(
        "float", description="numbers of the state; compact: 16 bits each, half the disk"
    )
    durability: Literal["process", "power"] = Field(
        "process",
        description="what a run survives: process, any crash; power, also a power cut",
        json_schema_extra=HARMLESS,
    )


class LimitsConfig(Section):
    """What is refused before it costs anything: files may come from a stranger, and numbers be mistyped.

    Inputs are judged by their size and their header, before a pixel or a weight of them is decoded.
    """

    max_pixels: Pixels = Field(10**10, description="largest input image in px; 10000000000 is 100,000×100,000")
    # 100,000×100,000 px of 16-bit RGB are 56 GiB
    max_file_bytes: Bytes = Field(64 * 2**30, description="largest file of an input image")
    max_decode_bytes: Bytes = Field(
        2 * 2**30, description="most memory to decode an input that cannot be streamed, such as a progressive JPEG"
    )
    # VGG-19 with its classifier is 0.54 GiB, in float64 twice that
    max_weights_bytes: Bytes = Field(2 * 2**30, description="largest weights file")
    max_result_pixels: Pixels = Field(10**10, description="largest result in px")


class ExportConfig(Section):
    """How the finished picture is written."""

    bits: Bits = Field("auto", description="bits per channel; auto: 16 where content and format have them, else 8")
    compression: Compression = Field("deflate", description="compression of a TIFF")
    quality: Int = Field(95, ge=1, le=100, description="JPEG quality")
    pyramid: StrictBool = Field(
        True, description="smaller levels in a TIFF, for viewers; a third more on the disk, twice while it is written"
    )

    @property
    def changed(self) -> dict[str, Any]:
        """What differs from its default: a config may give any format a default, because `pipeline init` writes all."""
        return self.model_dump(exclude_defaults=True)
