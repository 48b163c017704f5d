"""The file of encoder–decoder pairs for whitening and colouring, and their layers. Loads no torch.

Keys `encoder3.conv2_1.weight`, `decoder3.conv2_1.bias`, …: encoder l is VGG-19's topology up to convl_1 with max
pooling, and `encoderl.input`, a 1×1 convolution on RGB 0..1; decoder l mirrors it, with ×2
enlargements in place of poolings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import InputError
from pipeline.feedforward.spec import Conv, Layer, Pool
from pipeline.network.weights_file import check_file, safetensors_shapes

_CONVS_PER_BLOCK = (2, 2, 4, 4, 1)  # VGG-19's up to conv5_1
LEVELS = (5, 4, 3, 2, 1)


@dataclass(frozen=True)
class WctLevel:
    """Encoder and decoder of a level."""

    number: int
    encoder: tuple[Layer, ...]
    decoder: tuple[Layer, ...]
    factor: int = 1
    start_padding_px: int = 0

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, in order."""
        return *self.encoder, *self.decoder

    @property
    def least_side_px(self) -> int:
        """The least side of an image, of which the deepest map has two positions to reflect."""
        return (1 << self.number - 1) + 1


@dataclass(frozen=True)
class WctHeader:
    """The levels of a file, deepest first."""

    path: Path
    levels: tuple[WctLevel, ...]
    size_bytes: int


def is_wct_file(path: Path) -> bool:
    """Whether a .safetensors file has encoders and decoders. Raises InputError if it cannot be read."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return "encoder1.conv1_1.weight" in safetensors_shapes(path)


def read_wct_header(path: Path, max_bytes: int) -> WctHeader:
    """The levels of a file. Raises InputError if they do not fit together."""
    check_file(path, max_bytes)
    shapes = safetensors_shapes(path)
    found = tuple(level for level in LEVELS if f"encoder{level}.conv1_1.weight" in shapes)
    return WctHeader(path, tuple(_level(path, shapes, level) for level in found), path.stat().st_size)


def _level(path: Path, shapes: Mapping[str, tuple[int, ...]], level: int) -> WctLevel:
    counts = [*_CONVS_PER_BLOCK[: level - 1], 1]
    names = [f"conv{block}_{number + 1}" for block, count in enumerate(counts, start=1) for number in range(count)]
    encoder: list[Layer] = []
    for name in names:
        if name.endswith("_1") and encoder:
            encoder.append(Pool())
        encoder.append(_conv(path, shapes, f"encoder{level}.{name}"))
    decoder: list[Layer] = []
    for name, before in zip(reversed(names), [None, *reversed(names[1:])], strict=True):
        enlarged = before is not None and before.endswith("_1")
        decoder.append(_conv(path, shapes, f"decoder{level}.{name}", enlarged=enlarged, has_relu=name != "conv1_1"))
    convs = [layer for layer in (*encoder, *decoder) if isinstance(layer, Conv)]
    channels = [3, *(conv.channels_out for conv in convs)]
    if [conv.channels_in for conv in convs] != channels[:-1] or channels[-1] != 3:
        raise InputError(f"network file {path}: encoder and decoder {level} do not fit together. Use an intact copy.")
    first = shapes.get(f"encoder{level}.input.weight"), shapes.get(f"encoder{level}.input.bias")
    if first != ((3, 3, 1, 1), (3,)):
        raise InputError(f"network file {path}: encoder{level}.input is no 1×1 convolution of RGB. Use an intact copy.")
    return WctLevel(level, tuple(encoder), tuple(decoder))


def _conv(
    path: Path, shapes: Mapping[str, tuple[int, ...]], name: str, *, enlarged: bool = False, has_relu: bool = True
) -> Conv:
    shape, bias = shapes.get(f"{name}.weight", ()), shapes.get(f"{name}.bias", ())
    if len(shape) != 4 or shape[2:] != (3, 3) or bias != shape[:1]:
        raise InputError(f"network file {path}: {name} is no 3×3 convolution with a bias. Use an intact copy.")
    upsampling = "nearest" if enlarged else "none"
    return Conv(name, shape[1], shape[0], upsampling=upsampling, has_norm=False, has_relu=has_relu)  # type: ignore[arg-type]
