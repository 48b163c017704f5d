"""The sections of a config: frozen models of its keys, with their defaults, limits and what they are for.

Error messages, the `pipeline init` template and the resume check are all made from them. Lengths are in px, sizes in
bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline._fields import (
    MAX_CHUNK_PX,
    MAX_ITERATIONS,
    MAX_SIDE_PX,
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
)
from pipeline.layers import ALIGN_PX

NetworkName = Literal["vgg19", "vgg19-lite", "random"]
# Both are left out of `result_fields`; the second kind decides the picture through the file's content, not its name.
HARMLESS: dict[str, Any] = {"resume": "harmless"}
COMPARED_BY_CONTENT: dict[str, Any] = {"resume": "compared by content hash"}


class Section(BaseModel):
    """Frozen, and strict: unknown keys and numbers that are none are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StyleConfig(Section):
    """A style image and its share; shares are relative to their sum."""

    image: File = Field(description="style image", json_schema_extra=COMPARED_BY_CONTENT)
    weight: Share = Field(1.0, description="share among the styles")


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


def _default_stop(data: dict[str, Any]) -> float:
    return 0.1 if data.get("schedule") == "constant" else 0.0


class OptimizerConfig(Section):
    """Adam and its schedule, the same at every stage."""

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

    bits: Literal[8, 16] = Field(8, description="bits per channel")
    compression: Literal["deflate", "zstd", "jpeg", "none"] = Field("deflate", description="compression of a TIFF")
    quality: Int = Field(95, ge=1, le=100, description="JPEG quality")
