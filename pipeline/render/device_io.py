"""Transfers rectangles of the store's arrays to the compute device and back.

On the CPU they are tensors over numpy's memory. A GPU's rectangles are never whole in host memory: a few threads read
chunk by chunk into two small pinned buffers each; while the device copies from one, the next chunk is read into the
other. The copies run on a CUDA stream of the thread's own, concurrently with the computation.

Axes in names: 1 batch, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.tiling import Rect, bands, chunks_of
from pipeline.plan import STAGING_THREADS
from pipeline.render.device_state import on_device
from pipeline.render.lanes import LANES
from pipeline.store import BFLOAT16, FIXED16, ChunkSums, StageArray, merged

R = TypeVar("R")


def load(array: StageArray, rect: Rect, device: str, dtype: torch.dtype, scale: int = 0) -> Tensor:
    """(1, C, H, W), channels-last, complete. Raises ChunkError, StorageError, or torch's out-of-memory errors.

    `scale`: shrunk by 2^scale.
    """
    if (memory := on_device(array.memory)) is not None:
        with LANES.of(memory.device).running():
            return shrunk(memory.read(array, rect, dtype).permute(2, 0, 1)[None], scale)
    if torch.device(device).type == "cpu":
        return shrunk(torch.from_numpy(array.read_window(rect)).to(dtype).permute(2, 0, 1)[None], scale)
    return load_staged(array, rect, torch.device(device), dtype, scale)


def load_staged(array: StageArray, rect: Rect, device: torch.device, dtype: torch.dtype, scale: int = 0) -> Tensor:
    """The same through the pinned buffers, for any device."""
    with LANES.of(device).running():
        out = torch.empty((rect.height, rect.width, array.shape[2]), dtype=dtype, device=device)
    _of_every_band(lambda band: _load_band(array, band, out[band.within(rect)]), rect, array.chunk_px)
    if scale == 0:
        return out.permute(2, 0, 1)[None]
    with LANES.of(device).running():  # on the stream of `out`, whose memory is used again afterwards
        return shrunk(out.permute(2, 0, 1)[None], scale)


def shrunk(x_1CHW: Tensor, scale: int) -> Tensor:
    """The means of blocks of 2^scale px; last lines that do not fill a block are left out."""
    return F.avg_pool2d(x_1CHW, 2**scale) if scale else x_1CHW


def _load_band(array: StageArray, band: Rect, out_HWC: Tensor) -> None:
    """Copy one band into `out_HWC`, on the calling thread's stream."""
    lane = LANES.of(out_HWC.device)
    decode = _DECODERS[array.encoding.name] if array.encoding else None
    with lane.running():
        buffer = partial(lane.buffer, array.chunk_shape, array.dtype)
        # whole rows: one call per strip would keep the GIL from the thread that launches kernels
        for part, rows, columns in array.read_parts(band, buffer, strips=False):
            stored = torch.from_numpy(rows).to(out_HWC.device, non_blocking=True)[:, columns]
            lane.sent()
            out_HWC[part.within(band)].copy_(decode(stored) if decode else stored)


def save(array: StageArray, rect: Rect, tensor_CHW: Tensor) -> ChunkSums:
    """Write a rectangle of whole chunks (or up to the array's border); gives their checksums. Raises StorageError.

    Chunks in a device's memory have no checksums.
    """
    tensor_HWC = tensor_CHW.permute(1, 2, 0)
    if (memory := on_device(array.memory)) is not None:
        memory.write(array, rect, tensor_HWC)
        return {}
    if tensor_CHW.device.type == "cpu":
        if tensor_CHW.dtype == torch.bfloat16:
            tensor_HWC = tensor_HWC.float()
        return array.write_window(rect, np.ascontiguousarray(tensor_HWC.numpy()).astype(array.value_dtype, copy=False))
    return save_staged(array, rect, tensor_HWC)


def save_staged(array: StageArray, rect: Rect, tensor_HWC: Tensor) -> ChunkSums:
    """The same through the pinned buffers, for any device."""
    parts = _of_every_band(lambda band: _save_band(array, band, tensor_HWC[band.within(rect)]), rect, array.chunk_px)
    return merged(parts)


def _of_every_band(work: Callable[[Rect], R], rect: Rect, chunk_px: int) -> list[R]:
    """`work` of each row of chunks on the staging threads, from above to below.

    If one fails, the bands that have not begun are cancelled, and the first error in that order is raised when the
    others have ended: a pass that is repeated must not find an old thread that still writes its chunks, or still holds
    a tile on the device.
    """
    futures = [_READERS.submit(work, band) for band in bands(rect, chunk_px)]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
    return [future.result() for future in futures if not future.cancelled()]


def _save_band(array: StageArray, band: Rect, tensor_HWC: Tensor) -> ChunkSums:
    lane = LANES.of(tensor_HWC.device)
    sums: ChunkSums = {}
    with lane.running():
        for cy, cx, part in chunks_of(band, array.chunk_px):
            piece = tensor_HWC[part.within(band)]
            host = lane.buffer((part.height, part.width, array.shape[2]), array.value_dtype)
            # contiguous on the device first: the bus copies only contiguous memory
            torch.from_numpy(host).copy_(piece.to(torch.from_numpy(host).dtype).contiguous(), non_blocking=True)
            lane.wait()
            sums[cy, cx] = array.write_chunk(cy, cx, host)  # the checksum is taken of what is written, in memory
    return sums


def _from_fixed16(stored: Tensor) -> Tensor:
    codes = (stored.view(torch.int16).to(torch.int32) & 0xFFFF).float()
    # divided by a scalar, torch would multiply by its inverse, which rounds differently
    return codes / torch.full((), 257.0, device=stored.device)


# They give the same bits as store/encodings.py.
_DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    BFLOAT16.name: lambda stored: stored.view(torch.bfloat16),
    FIXED16.name: _from_fixed16,
}


# Few threads, whose buffers are pinned once: pinning memory for every tile would be slow.
_READERS = ThreadPoolExecutor(STAGING_THREADS, thread_name_prefix="staging")
