"""The feature network: VGG-19's topology, built from the layer table and the weights' own widths.

Axes in names: 1 batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core import callers
from pipeline.core.errors import ConfigError
from pipeline.core.tiling import Rect
from pipeline.core.vgg_layers import CONV_NAMES, Layer, needed_layers
from pipeline.network.padding import PADDINGS, Cut, padded, unpadded
from pipeline.network.weights import NetworkSpec, WeightsSource
from pipeline.network.weights_file import conv_key, load_state

# What torchvision's weights expect: RGB in [0, 1], shifted and scaled per channel.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class FeatureMap:
    """Features of one layer after ReLU, (1, C, H, W), and the positions of the layer that they cover."""

    layer: Layer
    features_1CHW: Tensor
    region: Rect


@dataclass
class Step:
    """One layer of a forward pass, with what the way back through it needs.

    `shape`: of a convolution's padded input, or of all that a pooling could have taken. `source_1CHW`: what it took,
    (rows, columns) `taken` of it; `indices`: where its maxima were.
    """

    found: FeatureMap
    cut: Cut
    shape: torch.Size
    source_1CHW: Tensor | None = None
    taken: tuple[slice, slice] = (slice(None), slice(None))
    indices: Tensor | None = None


class Network:
    """Runs an image, or a tile cut from one, through the layers of the table, and a gradient back."""

    def __init__(self, state: Mapping[str, Tensor], *, padding: str, pooling: str, dtype: torch.dtype, device: str):
        """Take the convolutions of `state` (our names or torchvision's; see weights.conv_key)."""
        self._dtype = dtype
        self._device = torch.device(device)
        self._padding, self._pooling = padding, pooling
        # cuDNN's convolution with bias and ReLU in one kernel; AMD's library has it not, and nobody for float64
        self._fused = self._device.type == "cuda" and torch.version.hip is None and dtype != torch.float64
        # pixels 0..255 do not fit the 8 bits of a bfloat16 mantissa: they are scaled before they are narrowed
        self._input = self._on_device(*_input_convolution(state), torch.promote_types(dtype, torch.float32))
        self._convs = {
            name: self._on_device(state[f"{key}.weight"], state[f"{key}.bias"], dtype)
            for name in CONV_NAMES
            if (key := conv_key(name, set(state))) is not None
        }
        self._turned = {name: _turned(weight) for name, (weight, _) in self._convs.items()} if self._fused else {}

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
        A side of `outer` on the border of the image is padded, any other is a cut and shrinks (see tiling.py).
        `required`: the pixels whose positions the caller needs; layers without a position there are left out.
        `tape`: gets every layer that was run, for `gradient`. Autograd serves where it is enabled, at its own price.
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
            x, region = step.found.features_1CHW, step.found.region
            if tape is not None:
                tape.append(step)
            del step  # without a way back its input is not needed any more
            if layer.name in names:
                yield FeatureMap(layer, x, region)

    def _conv(self, layer: Layer, x: Tensor, region: Rect, cut: Cut) -> Step:
        weight, bias = self._convs[layer.name]
        top, bottom, left, right = cut
        by_autograd = torch.is_grad_enabled()
        x = PADDINGS[self._padding](x, cut) if by_autograd else padded(x, cut, self._padding)
        shape = x.shape
        if self._fused and not by_autograd:
            x = torch.cudnn_convolution_relu(x, weight, bias, [1, 1], [0, 0], [1, 1], 1)
        else:
            x = F.relu_(F.conv2d(x, weight, bias))
        region = Rect(region.y0 + top, region.y1 - bottom, region.x0 + left, region.x1 - right)
        return Step(FeatureMap(layer, x, region), cut, shape)

    def _pooled(self, layer: Layer, x: Tensor, region: Rect, cut: Cut, both_ways: bool) -> Step:
        """Pool 2×2, after dropping what a cut left of a window that starts or ends outside the region."""
        top, bottom, left, right = cut
        whole = Rect(
            region.y0 + (top and region.y0 % 2),
            region.y1 - (bottom and region.y1 % 2),
            region.x0 + (left and region.x0 % 2),
            region.x1 - (right and region.x1 % 2),
        )
        rows, columns = whole.within(region)
        source, indices = x[:, :, rows, columns], None
        if self._pooling == "average":
            pooled = F.avg_pool2d(source, 2)
        elif both_ways:
            pooled, indices = F.max_pool2d_with_indices(source, (2, 2))
        else:
            pooled = F.max_pool2d(source, 2)
        found = FeatureMap(layer, pooled, Rect(*(edge // 2 for edge in whole)))
        return Step(found, cut, x.shape, source, (rows, columns), indices)

    def gradient(self, tape: list[Step], seed: Callable[[FeatureMap], Tensor | None]) -> Tensor:
        """The derivative of J by the pixels that `tape` began with, (1, 3, H, W) as large as they were.

        `seed` gives dJ/dφ of a layer where J looks at it directly, (1, C, H, W), or None. `tape` is emptied: what is
        passed is freed. It gives the same bits as autograd, in half its memory.
        """
        gradient: Tensor | None = None
        not_padded: Cut = (True, True, True, True)
        cut = not_padded  # of the layer that `gradient` comes from
        while tape:
            step = tape.pop()
            own = seed(step.found) if step.source_1CHW is None else None
            if gradient is not None:
                gradient = unpadded(gradient, cut, self._padding, own)
            elif own is None:
                continue
            else:
                gradient = own
            del own
            gradient = self._back(step, gradient)
            cut = step.cut if step.source_1CHW is None else not_padded
        assert gradient is not None, "nothing that J looks at"
        weight, _ = self._input
        gradient = unpadded(gradient, cut, self._padding).to(weight.dtype)
        return _back_through(gradient, gradient.shape, weight)

    def _back(self, step: Step, gradient: Tensor) -> Tensor:
        """From the gradient of a layer's output to that of its input, padding included."""
        if step.source_1CHW is not None:
            return self._back_through_pool(step, step.source_1CHW, gradient)
        name, features = step.found.layer.name, step.found.features_1CHW
        if gradient.is_contiguous(memory_format=torch.channels_last):
            torch.ops.aten.threshold_backward.grad_input(gradient, features, 0, grad_input=gradient)
        else:  # what was padded is a view
            gradient = torch.ops.aten.threshold_backward(gradient, features, 0)
        if name in self._turned:
            turned: Tensor = F.conv2d(gradient, self._turned[name], padding=2)
            return turned
        return _back_through(gradient, step.shape, self._convs[name][0])

    def _back_through_pool(self, step: Step, source: Tensor, gradient: Tensor) -> Tensor:
        if step.indices is not None:
            gradient = torch.ops.aten.max_pool2d_with_indices_backward(
                gradient, source, [2, 2], [2, 2], [0, 0], [1, 1], False, step.indices
            )
        else:
            gradient = torch.ops.aten.avg_pool2d_backward(gradient, source, [2, 2], [2, 2], [0, 0], False, True, None)
        if gradient.shape == step.shape:
            return gradient
        whole = gradient.new_zeros(step.shape).contiguous(memory_format=torch.channels_last)
        rows, columns = step.taken
        whole[:, :, rows, columns] = gradient
        return whole


def _back_through(gradient: Tensor, shape: torch.Size, weight: Tensor) -> Tensor:
    """The gradient of a convolution's input of this shape."""
    like = torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)
    arguments = (weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False])
    found: Tensor = torch.ops.aten.convolution_backward(gradient, like, *arguments)[0]  # not a value of `like` is read
    return found


def _turned(weight: Tensor) -> Tensor:
    """The kernel that convolves the gradient back: cuDNN's forward convolutions are faster than its backward ones."""
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def _input_convolution(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The 1×1 convolution from RGB 0..255 to what conv1_1 expects."""
    if "input.weight" in state:
        return state["input.weight"].double() / 255, state["input.bias"].double()
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (_IMAGENET_MEAN, _IMAGENET_STD))
    return torch.diag(1 / (255 * std))[:, :, None, None], -mean / std


@dataclass(frozen=True)
class _TorchSettings:
    """What is torch's for the whole process, and set by `get_network`."""

    threads: int
    cudnn_tf32: bool
    matmul_tf32: bool
    deterministic: bool

    @classmethod
    def now(cls) -> _TorchSettings:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        return cls(torch.get_num_threads(), cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic)

    def set(self) -> None:
        torch.set_num_threads(self.threads)
        torch.backends.cudnn.allow_tf32 = self.cudnn_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.matmul_tf32
        torch.backends.cudnn.deterministic = self.deterministic


@dataclass
class _Process:
    """The networks of this process, the one asked for last at the end. `before`: torch's settings until the first."""

    networks: list[tuple[NetworkSpec, Network]] = field(default_factory=list)
    before: _TorchSettings | None = None
    bounded_devices: set[str] = field(default_factory=set)


_process = _Process()
_lock = threading.Lock()


def get_network(spec: NetworkSpec) -> Network:
    """The network of `spec`, kept until another is asked for, or `release`: one, as the plan counts.

    Where several threads run something, as many are kept. Raises InputError for unusable weights, ConfigError for a
    dtype that the device has not.
    """
    with _lock:
        _process.before = _process.before or _TorchSettings.now()
        _bound_memory(spec)
        found = next((one for one in _process.networks if one[0] == spec), None)
        if found is not None:
            _process.networks.remove(found)  # put back behind all others
        else:
            del _process.networks[: max(0, len(_process.networks) + 1 - max(1, callers.number()))]  # freed before
            state = random_state(spec.source) if spec.source.path is None else load_state(spec.source.path)
            network = Network(
                state, padding=spec.padding, pooling=spec.pooling, dtype=_DTYPES[spec.dtype], device=spec.device
            )
            found = spec, network
        _process.networks.append(found)
    if spec.threads:
        torch.set_num_threads(spec.threads)  # for this thread and those that follow, so on every call
    _set_precision(spec)  # the process's, so on every call: it may have been another network's turn
    return found[1]


def release() -> None:
    """Free the networks, and put back what `get_network` has set; to be called when nothing computes any more."""
    with _lock:
        _process.networks.clear()
        for device in _process.bounded_devices:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        _process.bounded_devices.clear()
        if _process.before is not None:
            _process.before.set()
            _process.before = None


def _bound_memory(spec: NetworkSpec) -> None:
    """Let this process take of a GPU what was planned for it, and little more.

    Without a bound cuDNN tries kernels whose workspace is all that the device has (132 GiB for a tile of 1,024 px in
    float32): slow ones, and whether they are to be had, and with them the last bits, would change from run to run.
    """
    if not (spec.on_gpu and spec.gpu_bytes):
        return
    total = torch.cuda.get_device_properties(spec.device).total_memory
    allowed = max(spec.gpu_bytes * 5 // 4, spec.gpu_bytes + 2 * 2**30)
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), spec.device)
    _process.bounded_devices.add(spec.device)


def _set_precision(spec: NetworkSpec) -> None:
    """Make CUDA compute in the precision asked for, by the same algorithm every time (exact resume needs both)."""
    on_cuda = torch.device(spec.device).type == "cuda"
    if spec.dtype == "tf32" and not (on_cuda and torch.cuda.get_device_capability(spec.device) >= (8, 0)):
        raise ConfigError(
            f"compute.dtype: tf32 needs a CUDA device of the Ampere generation or later, not {spec.device}."
        )
    torch.backends.cudnn.allow_tf32 = spec.dtype == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False  # Grams are matrix products; seeds are 1×1 convolutions
    torch.backends.cudnn.deterministic = True


def random_state(source: WeightsSource) -> dict[str, Tensor]:
    """Seeded He-normal weights of the widths of `source`: features without meaning, for tests."""
    generator = torch.Generator().manual_seed(source.seed)
    state: dict[str, Tensor] = {}
    channels = 3
    for name, width in source.widths.items():
        scale = (2 / (9 * channels)) ** 0.5
        state[f"{name}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * scale
        state[f"{name}.bias"] = torch.zeros(width)
        channels = width
    return state
