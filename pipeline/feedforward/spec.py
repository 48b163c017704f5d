"""The table of an image transformation network: what it is made of, as data. Loads no torch.

Training builds a torch module from the list of layers; the tiled pass takes its geometry from the same list.
Johnson et al. 2016: `c9s1-32, d64, d128, R128 ×5, u64, u32, c9s1-3` for styles, `c9s1-64, R64 ×4, u64 ×2 or ×3, c9s1-3`
for super-resolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

Padding = Literal["reflect", "zeros", "none"]
Upsampling = Literal["none", "nearest", "zeros"]
NormKind = Literal["instance", "batch", "none"]

# Widths of both tasks at `width: 1`.
_STYLE_CHANNELS = (32, 64, 128)
_SUPER_RESOLUTION_CHANNELS = 64
_LEAST_CHANNELS = 4


@dataclass(frozen=True)
class Conv:
    """A convolution with what precedes it (×2 enlargement, padding) and what follows it (norm, ReLU)."""

    name: str
    channels_in: int
    channels_out: int
    kernel: int = 3
    stride: int = 1
    upsampling: Upsampling = "none"
    padding: Padding = "reflect"
    has_norm: bool = True
    has_relu: bool = True

    @property
    def padding_px(self) -> int:
        """Positions that are padded on each side."""
        return 0 if self.padding == "none" else self.kernel // 2

    @property
    def enlargement(self) -> int:
        """How many times the convolution's grid is that of its input."""
        return 1 if self.upsampling == "none" else 2

    def size(self, before: int) -> int:
        """Positions of its output along one axis, from those of its input."""
        return (before * self.enlargement + 2 * self.padding_px - self.kernel) // self.stride + 1


@dataclass(frozen=True)
class Residual:
    """Two convolutions whose output is added to their input."""

    convs: tuple[Conv, Conv]

    def size(self, before: int) -> int:
        """Positions of its output along one axis, from those of its input."""
        return self.convs[1].size(self.convs[0].size(before))


@dataclass(frozen=True)
class Pool:
    """The maximum of each 2×2 cell; at an odd border of what there is of it."""

    def size(self, before: int) -> int:
        """Cells along one axis."""
        return (before + 1) // 2


Layer = Conv | Residual | Pool


class Layered(Protocol):
    """What the geometry and the cost of a network follow from."""

    @property
    def layers(self) -> tuple[Layer, ...]: ...  # noqa: D102
    @property
    def factor(self) -> int: ...  # noqa: D102
    @property
    def start_padding_px(self) -> int: ...  # noqa: D102


def convs_of(layers: Iterable[Layer]) -> Iterator[Conv]:
    """The convolutions of layers, in order, with those of residual blocks."""
    for layer in layers:
        if isinstance(layer, Conv):
            yield layer
        elif isinstance(layer, Residual):
            yield from layer.convs


class TransformSpec(BaseModel):
    """What a network's file says about it, as JSON in the file's metadata."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["style", "super-resolution"] = "style"
    factor: Literal[1, 4, 8] = Field(1, description="enlargement: 1 for a style, 4 or 8 for super-resolution")
    width: float = Field(1.0, gt=0, le=8, description="channels relative to the paper's")
    blocks: int = Field(5, ge=0, le=64, description="residual blocks; the paper: 5 for styles, 4 for super-resolution")
    norm: NormKind = "instance"
    upsampling: Literal["nearest", "fractional"] = Field(
        "nearest", description="nearest: enlarged, then convolved (no checkerboard); fractional: strided by 1/2"
    )
    output: Literal["tanh", "linear"] = Field("tanh", description="tanh: scaled to 0..255")
    skip: Literal["none", "bicubic"] = Field(
        "none", description="bicubic: the output is added to the bicubic enlargement of the input"
    )
    pixels: Literal["unit", "bytes"] = Field("unit", description="the network's numbers: -1..1, or 0..255")
    styles: tuple[str, ...] = Field(("style",), min_length=1, max_length=1000)
    start_padding_px: int = Field(0, ge=0, le=1000, description="reflection before the first layer; the paper: 40")
    block_padding: bool = Field(True, description="false: residual blocks shrink by 4 positions, as in the paper")

    @model_validator(mode="after")
    def _consistent(self) -> TransformSpec:
        if (self.factor == 1) != (self.task == "style"):
            raise ValueError("factor is 1 for a style, and 4 or 8 for super-resolution")
        if self.skip != "none" and (self.factor == 1 or self.start_padding_px or not self.block_padding):
            raise ValueError("skip is for super-resolution with padded blocks, whose output lies over its input")
        if self.skip != "none" and self.output != "linear":
            raise ValueError("skip needs output: linear, in levels that are added")
        if len(self.styles) > 1 and self.norm != "instance":
            raise ValueError("several styles need norm: instance, whose scale and shift are each style's own")
        if len(set(self.styles)) < len(self.styles):
            raise ValueError("styles have different names")
        return self

    @property
    def layers(self) -> tuple[Conv | Residual, ...]:
        """Its layers, in order."""
        first, *down = self._channels() if self.task == "style" else (self._wide(_SUPER_RESOLUTION_CHANNELS),)
        layers: list[Conv | Residual] = [Conv("first", 3, first, kernel=9)]
        before = first
        for number, channels in enumerate(down, start=1):
            layers.append(Conv(f"down{number}", before, channels, stride=2))
            before = channels
        layers += [self._block(number, before) for number in range(1, self.blocks + 1)]
        up = [first, *down][-2::-1] if self.task == "style" else [before] * (self.factor.bit_length() - 1)
        for number, channels in enumerate(up, start=1):
            layers.append(self._up(number, before, channels))
            before = channels
        return (*layers, Conv("last", before, 3, kernel=9, has_norm=False, has_relu=False))

    def convs(self) -> Iterator[Conv]:
        """Its convolutions, in order, with those of the residual blocks."""
        return convs_of(self.layers)

    def norms(self) -> list[Conv]:
        """The convolutions that a norm with parameters follows, in order."""
        return [conv for conv in self.convs() if conv.has_norm and self.norm != "none"]

    def measured_norms(self) -> list[Conv]:
        """Those whose mean and variance are the image's, so that each needs a pass over it; none with batch norm."""
        return self.norms() if self.norm == "instance" else []

    def least_side_px(self) -> int:
        """The least side of a picture, for which every padding finds the positions that it reflects."""
        side = self.start_padding_px + 1
        while not _fits(self, side):
            side += 1
        return side

    def _channels(self) -> tuple[int, ...]:
        return tuple(map(self._wide, _STYLE_CHANNELS))

    def _wide(self, channels: int) -> int:
        return max(_LEAST_CHANNELS, round(channels * self.width))

    def _block(self, number: int, channels: int) -> Residual:
        padding: Padding = "reflect" if self.block_padding else "none"
        first = Conv(f"block{number}.conv1", channels, channels, padding=padding)
        second = Conv(f"block{number}.conv2", channels, channels, padding=padding, has_relu=False)
        return Residual((first, second))

    def _up(self, number: int, before: int, channels: int) -> Conv:
        if self.upsampling == "nearest":
            return Conv(f"up{number}", before, channels, upsampling="nearest")
        return Conv(f"up{number}", before, channels, upsampling="zeros", padding="zeros")


def _fits(spec: TransformSpec, side_px: int) -> bool:
    size = side_px + 2 * spec.start_padding_px
    for conv in spec.convs():
        if conv.padding == "reflect" and conv.padding_px >= size * conv.enlargement:
            return False
        size = conv.size(size)
        if size < 1:
            return False
    return size >= side_px * spec.factor
