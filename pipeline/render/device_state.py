"""A stage's arrays in the memory of a GPU, and the update pass there: the same bits as numpy's on the CPU.

Every multiplication, addition, division and root is a kernel of its own, rounded as IEEE 754 says, in the order of
adam.py. Only the colour matrix is different: the CPU's matrix routine multiplies and adds in one rounding, which is
computed here in float64. Any device can hold such memory; tests use the CPU.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core import profiler
from pipeline.core.tiling import Rect, chunks_of
from pipeline.losses.color_space import DECORRELATED, Basis, to_pixels
from pipeline.plan import CHUNKS_PER_KERNEL
from pipeline.render import adam
from pipeline.render.lanes import LANES
from pipeline.store import Memory, StageArray

# One thread launches kernels at a time, and one set of temporaries is planned.
_UPDATING = threading.Lock()


class DeviceMemory:
    """The chunks of one array as a tensor (chunk rows, chunk columns, rows, columns, channels)."""

    def __init__(self, device: str, grid: tuple[int, int], chunk_shape: tuple[int, int, int], dtype: np.dtype[Any]):
        """As HostMemory, on torch's `device`. Raises torch's out-of-memory errors."""
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        self.chunks = torch.empty((*grid, *chunk_shape), dtype=kind, device=device)
        self._dtype = dtype

    @property
    def device(self) -> torch.device:
        """Where the chunks are."""
        return self.chunks.device

    def get(self, cy: int, cx: int) -> NDArray[Any]:
        """A copy, in a buffer of this thread that its next but one call uses again."""
        lane, chunk = LANES.of(self.device), self.chunks[cy, cx]
        with lane.running():
            host = lane.buffer(tuple(chunk.shape), self._dtype)
            torch.from_numpy(host).copy_(chunk, non_blocking=True)
        return host

    def put(self, cy: int, cx: int, data: NDArray[Any]) -> None:
        """As in Memory."""
        with LANES.of(self.device).running():
            self.chunks[cy, cx].copy_(torch.from_numpy(data))

    def read(self, array: StageArray, rect: Rect, dtype: torch.dtype) -> Tensor:
        """A rectangle of the array, (H, W, C), on the calling thread's stream."""
        out_HWC = torch.empty((rect.height, rect.width, array.shape[2]), dtype=dtype, device=self.device)
        for cy, cx, part in chunks_of(rect, array.chunk_px):
            out_HWC[part.within(rect)].copy_(self.chunks[cy, cx][part.within(array.chunk_rect(cy, cx))])
        return out_HWC

    def write(self, array: StageArray, rect: Rect, values_HWC: Tensor) -> None:
        """Write whole chunks, or up to the array's border, where they are padded with zeros."""
        with LANES.of(self.device).running():
            for cy, cx, part in chunks_of(rect, array.chunk_px):
                chunk = self.chunks[cy, cx]
                if part.area < array.chunk_px**2:
                    chunk.zero_()
                chunk[: part.height, : part.width].copy_(values_HWC[part.within(rect)])


def on_device(memory: Memory | None) -> DeviceMemory | None:
    """The memory if it is a device's, else None."""
    return memory if isinstance(memory, DeviceMemory) else None


def update_chunks(
    sources: Sequence[StageArray], targets: Sequence[StageArray], chunks: Sequence[tuple[int, int]], step: adam.AdamStep
) -> tuple[list[float], float]:
    """Adam's step on chunks in device memory; gives Σ|u| of each chunk, and max|u| of all.

    `sources`: gradient, canvas, m, v and maybe the average; `targets`: all but the gradient, of the other slot.
    """
    tensors = [_chunks(array) for array in (*sources, *targets)]
    lane, sums, largest = LANES.of(tensors[0].device), list[Tensor](), list[Tensor]()
    with _UPDATING, profiler.span("update", chunk=chunks[0]), lane.running():
        for cy, x0, x1 in _groups(chunks):
            stored = [tensor[cy, x0:x1] for tensor in tensors]
            abs_u = update(stored[: len(sources)], stored[len(sources) :], step)
            for number, cx in enumerate(range(x0, x1)):
                rows, columns = sources[0].valid_part(cy, cx)
                inside = abs_u[number, rows, columns]
                largest.append(inside.amax())
                # an exact sum of whole numbers, as in update.py
                sums.append(inside.mul_(adam.SUM_SCALE).round_().sum(dtype=torch.float64))
        values = torch.stack(sums).div_(adam.SUM_SCALE).tolist()
        return values, float(torch.stack(largest).amax())


def _chunks(array: StageArray) -> Tensor:
    memory = on_device(array.memory)
    assert memory is not None, array.path
    return memory.chunks


def _groups(chunks: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(chunk row, first chunk column, the one after the last) of runs of neighbours, in order."""
    for cy, row in itertools.groupby(chunks, key=lambda chunk: chunk[0]):
        columns = [cx for _, cx in row]
        for first in range(0, len(columns), CHUNKS_PER_KERNEL):
            part = columns[first : first + CHUNKS_PER_KERNEL]
            yield cy, part[0], part[-1] + 1


def update(sources: Sequence[Tensor], targets: Sequence[Tensor], step: adam.AdamStep) -> Tensor:
    """Adam's step from one slot into the other, with adam.update's bits; gives |u|. The tensors have one shape."""
    (gradient, canvas, m, v, *average), (new_canvas, new_m, new_v, *new_average) = sources, targets
    torch.mul(m, step.beta1, out=new_m)
    scratch = gradient * (1 - step.beta1)
    new_m += scratch
    torch.mul(v, step.beta2, out=new_v)
    torch.mul(gradient, gradient, out=scratch)
    scratch *= 1 - step.beta2
    new_v += scratch
    torch.add(new_v, step.epsilon, out=scratch)
    # in float64, whatever its last bit: MKL's root of float32 numbers, which torch uses on a CPU, is not the nearest
    torch.div(new_m, scratch.double().sqrt_().float(), out=scratch)
    moved = scratch * step.size if step.basis is None else pixels_of(scratch, step.basis, step.size)
    torch.sub(canvas, moved, out=new_canvas)
    if step.clip:
        new_canvas.clamp_(0, 255)
    if step.average_weight is not None:
        _move_average(average[0], new_average[0], new_canvas, moved, step.average_weight)
    return scratch.abs_()


def _move_average(average: Tensor, new_average: Tensor, canvas: Tensor, scratch: Tensor, weight: float) -> None:
    if weight == 1:
        new_average.copy_(canvas)
        return
    torch.sub(canvas, average, out=scratch)
    scratch *= weight
    torch.add(average, scratch, out=new_average)


def pixels_of(theta: Tensor, basis: Basis, scale: float) -> Tensor:
    """scale·M·θ of every pixel (…, 3), with the bits of color_space.to_pixels."""
    assert theta.dtype == torch.float32, theta.dtype
    matrix = (scale * np.array(basis)).astype(np.float32)
    out = torch.empty_like(theta)
    for channel, row in enumerate(matrix.tolist()):
        sum_ = theta[..., 0] * row[0]
        for index in (1, 2):
            sum_ = _multiply_add(theta[..., index], row[index], sum_)
        out[..., channel] = sum_
    return out


def _multiply_add(a: Tensor, b: float, c: Tensor) -> Tensor:
    """a·b + c of float32 numbers, rounded once.

    In float64 the product is exact; the sum is rounded to odd, so that the second rounding, to float32, is right.
    """
    product, addend = a.double().mul_(b), c.double()
    total = product + addend
    # the error of the sum (Knuth): zero where it is exact
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    # one unit away from zero if the exact sum is further out, else one towards zero
    unit = torch.where((error > 0) == (total > 0), 1, -1)
    bits += unit * ((error != 0) & (bits & 1 == 0))
    return total.float()


@cache
def has_same_bits() -> bool:
    """Whether this machine's numpy moves pixels as `pixels_of` does: its matrix routine depends on the processor."""
    rng = np.random.default_rng(0)
    theta = (rng.normal(size=(64, 64, 3)) * 10 ** rng.uniform(-9, 2, (64, 64, 3))).astype(np.float32)
    expected = np.empty_like(theta)
    to_pixels(theta, DECORRELATED, 0.37, expected)
    return bool(np.array_equal(expected, pixels_of(torch.from_numpy(theta), DECORRELATED, 0.37).numpy()))
