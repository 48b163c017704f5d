"""Padding of one position at the border of the image, and its backward pass.

`cut` tells which sides (top, bottom, left, right) of a tile are cuts, which are not padded. Axes in names: 1 batch,
C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Cut = tuple[bool, bool, bool, bool]

# The position that is copied into the padding, counted from the border: 0 is the border itself. None: zeros.
SOURCE: Mapping[str, int | None] = {"replicate": 0, "reflect": 1, "zeros": None}
_WORD_BYTES = 16


def _pad_zeros(x: Tensor, cut: Cut) -> Tensor:
    top, bottom, left, right = (int(not side) for side in cut)
    return F.pad(x, (left, right, top, bottom))


def _pad_copied(x: Tensor, cut: Cut, offset: int) -> Tensor:
    """Replicate or reflect by concatenation: torch's own paddings have no deterministic backward pass on CUDA."""
    for axis, (first_cut, last_cut) in ((2, cut[:2]), (3, cut[2:])):
        size = x.shape[axis]
        parts = [
            *([] if first_cut else [x.narrow(axis, offset, 1)]),
            x,
            *([] if last_cut else [x.narrow(axis, size - 1 - offset, 1)]),
        ]
        x = torch.cat(parts, axis) if len(parts) > 1 else x
    return x


# The paddings for autograd, by network.padding.
PADDINGS: Mapping[str, Callable[[Tensor, Cut], Tensor]] = {
    "replicate": partial(_pad_copied, offset=0),
    "zeros": _pad_zeros,
    "reflect": partial(_pad_copied, offset=1),
}


def padded(x_1CHW: Tensor, cut: Cut, padding: str) -> Tensor:
    """The values of PADDINGS[padding] by a single copy, in channels-last layout; not differentiable."""
    if all(cut):
        return x_1CHW
    top, bottom, left, right = (int(not side) for side in cut)
    batch, channels, height, width = x_1CHW.shape
    shape = (batch, channels, height + top + bottom, width + left + right)
    out = torch.empty(shape, dtype=x_1CHW.dtype, device=x_1CHW.device, memory_format=torch.channels_last)
    _copy(out[:, :, top : top + height, left : left + width], x_1CHW)
    offset = SOURCE[padding]
    for axis, (first, last) in ((2, (top, bottom)), (3, (left, right))):
        end = out.shape[axis] - 1
        for is_padded, at, source in ((first, 0, first + (offset or 0)), (last, end, end - last - (offset or 0))):
            if is_padded:
                line = out.narrow(axis, at, 1)
                line.zero_() if offset is None else line.copy_(out.narrow(axis, source, 1))
    return out


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy `source` to `target`. On CUDA in words of 16 bytes: kernels for strided tensors use a thread per element."""
    if target.is_cuda and source.shape[1] * source.element_size() % _WORD_BYTES == 0:
        target, source = (x.permute(0, 2, 3, 1) for x in (target, source))
        if source.stride(3) == 1 and all(stride % 8 == 0 for stride in source.stride()[:3]):
            target, source = target.view(torch.complex128), source.view(torch.complex128)
    target.copy_(source)


def unpadded(gradient_1CHW: Tensor, cut: Cut, padding: str, onto_1CHW: Tensor | None = None) -> Tensor:
    """The gradient of padding's input, from the gradient of its output, which is overwritten.

    Returns a view of `gradient_1CHW`, or `onto_1CHW` with the result added in place. The order of additions is
    autograd's, so that the bits are too: seed, inside, last line, first line, at the innermost padded axis.
    """
    top, bottom, left, right = (int(not side) for side in cut)
    axes = [(axis, *ends) for axis, ends in ((3, (left, right)), (2, (top, bottom))) if any(ends)]
    for number, (axis, at_first, at_last) in enumerate(axes, start=1):
        gradient_1CHW, first, last = _split(gradient_1CHW, axis, at_first, at_last)
        if onto_1CHW is not None and number == len(axes):
            gradient_1CHW = onto_1CHW.add_(gradient_1CHW)
        _fold(gradient_1CHW, axis, first, last, padding)
    return onto_1CHW.add_(gradient_1CHW) if onto_1CHW is not None and not axes else gradient_1CHW


def _split(gradient: Tensor, axis: int, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inside, and the first and last line of the axis, which are empty where nothing was padded."""
    size = gradient.shape[axis]
    inside = gradient.narrow(axis, first, size - first - last)
    return inside, gradient.narrow(axis, 0, first), gradient.narrow(axis, size - last, last)


def _fold(inside: Tensor, axis: int, first: Tensor, last: Tensor, padding: str) -> None:
    """Add the gradient of the padding to the positions that its values were copied from."""
    offset = SOURCE[padding]
    if offset is not None:
        end = inside.shape[axis] - 1
        inside.narrow(axis, end - offset, last.shape[axis]).add_(last)
        inside.narrow(axis, offset, first.shape[axis]).add_(first)
