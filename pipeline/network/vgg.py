"""The feature network: VGG-19's topology, built from the layer table, with the widths that the weights have.

The backward pass is written out instead of left to autograd: it gives the same bits in half the memory. Axes in names:
1 batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.tiling import Rect
from pipeline.core.vgg_layers import AFTER_POOLING, CONV_NAMES, LAYERS, Layer, needed_layers, pooling_at
from pipeline.network.padding import PADDINGS, Cut, padded, unpadded
from pipeline.network.pooling import Pooled, Pooling
from pipeline.network.weights import WeightsSource
from pipeline.network.weights_file import conv_key

# torchvision's weights expect RGB in [0, 1], shifted and scaled per channel.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FeatureMap:
    """φ_l: the features of one layer after ReLU, (1, C, H, W), at the positions `region` of the layer."""

    layer: Layer
    features_1CHW: Tensor
    region: Rect


@dataclass
class Step:
    """One layer of a forward pass on the tape, with what its backward pass needs.

    `padded_shape`: of a convolution's input after padding. `pooled`: a pooling's; None of a convolution.
    """

    output: FeatureMap
    cut: Cut
    padded_shape: torch.Size
    pooled: Pooled | None = None


class Network:
    """Runs an image, or a tile cut from one, through the layers of the table, and a gradient back to the pixels."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        *,
        padding: str,
        pooling: str,
        dtype: torch.dtype,
        device: str,
        pooling_scale: float = 1.0,
    ):
        """Copy the convolutions of `state`, under our names or torchvision's (see conv_key), to the device.

        `pooling_scale`: factor behind every pooling, here of the weights of the convolution that follows.
        """
        self._dtype = dtype
        self._device = torch.device(device)
        self._padding = padding
        pools = (layer.name for layer in LAYERS if layer.kind == "pool")
        self._poolings = {name: Pooling(pooling_at(pooling, name), padding) for name in pools}
        # cuDNN convolves, adds the bias and applies ReLU in one kernel: separately the bias alone costs 40 % of a
        # convolution. AMD's library has no such kernel, and neither has one for float64.
        self._fused = self._device.type == "cuda" and torch.version.hip is None and dtype != torch.float64
        # Pixels 0..255 do not fit into a bfloat16 mantissa of 8 bits, so they are scaled before they are converted.
        self._input = self._on_device(*_input_convolution(state), torch.promote_types(dtype, torch.float32))
        self._convs = {
            name: self._on_device(
                _scaled(state[f"{key}.weight"], pooling_scale if name in AFTER_POOLING else 1.0),
                state[f"{key}.bias"],
                dtype,
            )
            for name in CONV_NAMES
            if (key := conv_key(name, set(state))) is not None
        }
        self._flipped = {name: _flipped(weight) for name, (weight, _) in self._convs.items()} if self._fused else {}

    def _on_device(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weight = weight.to(self._device, dtype, memory_format=torch.channels_last)
        return weight, bias.to(self._device, dtype)

    def features(
        self,
        pixels_1CHW: Tensor,
        outer: Rect,
        size: tuple[int, int],
        names: set[str],
        required: Rect,
        tape: list[Step] | None = None,
    ) -> Iterator[FeatureMap]:
        """Yield the feature maps of the layers `names` of one tile, shallowest first.

        `pixels_1CHW`: RGB 0..255 of the pixel rectangle `outer` of an image of `size` (height, width); float64 for a
        float64 network, else float32.
        A side of `outer` on the border of the image is padded; any other side is a cut, where convolutions pad
        nothing and the map shrinks (see tiling.py; eq. 12 gives the halo).
        `required`: the pixels whose positions the caller needs; the pass ends at the first layer without one there.
        `tape`: receives every layer that was run, for `gradient`. With gradients enabled, autograd records instead.
        """
        height, width = size
        cut = (outer.y0 > 0, outer.y1 < height, outer.x0 > 0, outer.x1 < width)
        region = outer
        x = F.conv2d(pixels_1CHW, *self._input).to(self._dtype)
        for layer in needed_layers(names):
            if required.positions(layer).area == 0:
                return
            if layer.kind == "conv":
                step = self._conv(layer, x, region, cut)
            else:
                step = self._pooled(layer, x, region, cut, tape is not None)
            x, region = step.output.features_1CHW, step.output.region
            if tape is not None:
                tape.append(step)
            del step  # without a tape, this frees a pooling's input before the next layer allocates
            if layer.name in names:
                yield FeatureMap(layer, x, region)

    def _conv(self, layer: Layer, x: Tensor, region: Rect, cut: Cut) -> Step:
        weight, bias = self._convs[layer.name]
        top, bottom, left, right = cut
        autograd = torch.is_grad_enabled()
        x = PADDINGS[self._padding](x, cut) if autograd else padded(x, cut, self._padding)
        shape = x.shape
        if self._fused and not autograd:
            x = torch.cudnn_convolution_relu(x, weight, bias, [1, 1], [0, 0], [1, 1], 1)
        else:
            x = F.relu_(F.conv2d(x, weight, bias))
        region = Rect(region.y0 + top, region.y1 - bottom, region.x0 + left, region.x1 - right)
        return Step(FeatureMap(layer, x, region), cut, shape)

    def _pooled(self, layer: Layer, x: Tensor, region: Rect, cut: Cut, with_tape: bool) -> Step:
        pooling = self._poolings[layer.name]
        positions = pooling.positions(region, cut)
        cells = Rect(*(2 * edge for edge in positions)).within(region)
        pooled = pooling.forward(x, cells, with_tape)
        return Step(FeatureMap(layer, pooled.features_1CHW, positions), cut, x.shape, pooled)

    def gradient(self, tape: list[Step], seed: Callable[[FeatureMap], Tensor | None]) -> Tensor:
        """dJ/dp of the pixels at the start of `tape`, (1, 3, H, W), of their size.

        `seed` returns dJ/dφ of a layer that J depends on directly, (1, C, H, W), else None (algorithm.md, "Tiles give
        the exact gradient"; in place of eq. 20). Empties `tape`, to free each layer's tensors once they are used.
        """
        gradient: Tensor | None = None
        not_padded: Cut = (True, True, True, True)
        cut = not_padded  # by the layer whose input `gradient` belongs to
        while tape:
            step = tape.pop()
            own = seed(step.output) if step.pooled is None else None
            if gradient is not None:
                gradient = unpadded(gradient, cut, self._padding, own)
            elif own is None:
                continue
            else:
                gradient = own
            del own
            gradient = self._backward(step, gradient)
            cut = step.cut if step.pooled is None else not_padded
        assert gradient is not None, "J depends on no layer of the tape"
        weight, _ = self._input
        gradient = unpadded(gradient, cut, self._padding).to(weight.dtype)
        return _conv_backward(gradient, gradient.shape, weight)

    def _backward(self, step: Step, gradient: Tensor) -> Tensor:
        """The gradient of a layer's input, after padding, from that of its output."""
        if step.pooled is not None:
            return self._poolings[step.output.layer.name].backward(step.pooled, gradient)
        name, features = step.output.layer.name, step.output.features_1CHW
        if gradient.is_contiguous(memory_format=torch.channels_last):
            torch.ops.aten.threshold_backward.grad_input(gradient, features, 0, grad_input=gradient)
        else:  # a view into a padded gradient: the kernel in place needs a contiguous one
            gradient = torch.ops.aten.threshold_backward(gradient, features, 0)
        if name in self._flipped:
            return F.conv2d(gradient, self._flipped[name], padding=2)
        return _conv_backward(gradient, step.padded_shape, self._convs[name][0])


def _conv_backward(gradient: Tensor, shape: torch.Size, weight: Tensor) -> Tensor:
    """The gradient of a convolution's input, which has this shape."""
    like = torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)
    arguments = (weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False])
    result: Tensor = torch.ops.aten.convolution_backward(gradient, like, *arguments)[0]  # uses no value of `like`
    return result


def _scaled(weight: Tensor, factor: float) -> Tensor:
    """`weight` times `factor`, in float64, so that a float64 network loses nothing."""
    return weight if factor == 1 else weight.double() * factor


def _flipped(weight: Tensor) -> Tensor:
    """The kernel whose convolution is the backward pass of `weight`.

    cuDNN's forward convolutions are faster than its backward ones: measured, 33 to 38 instead of 4 to 9 TFLOP/s with
    64 and 128 channels in float32.
    """
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def _input_convolution(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the 1×1 convolution from RGB 0..255 to the input of conv1_1."""
    if "input.weight" in state:
        return state["input.weight"].double() / 255, state["input.bias"].double()
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (_IMAGENET_MEAN, _IMAGENET_STD))
    return torch.diag(1 / (255 * std))[:, :, None, None], -mean / std


def random_state(source: WeightsSource) -> dict[str, Tensor]:
    """Seeded He-normal weights with the widths of `source`: features without meaning, for tests."""
    generator = torch.Generator().manual_seed(source.seed)
    state: dict[str, Tensor] = {}
    channels = 3
    for name, width in source.widths.items():
        scale = (2 / (9 * channels)) ** 0.5
        state[f"{name}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * scale
        state[f"{name}.bias"] = torch.zeros(width)
        channels = width
    return state
