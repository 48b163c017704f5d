"""The way between host memory and a compute device: a stream and two page-locked buffers of each thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray


class Lane:
    """A thread's CUDA stream to one device, and two pinned buffers that are used in turn."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Kernels and copies of the block run on this stream, and have finished when it is left."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._stream.synchronize()

    def buffer(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """The other buffer as an uninitialised array, once the device has copied its previous content."""
        self._turn = 1 - self._turn
        if (sent := self._sent[self._turn]) is not None:
            sent.synchronize()
        size = int(np.prod(shape)) * dtype.itemsize
        if self._buffers[self._turn].numel() < size:
            self._buffers[self._turn] = torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None)
        buffer: NDArray[np.generic] = self._buffers[self._turn].numpy()[:size].view(dtype).reshape(shape)
        return buffer

    def sent(self) -> None:
        """Record that the device copies from the buffer that was given last."""
        if self._stream is not None:
            event = self._sent[self._turn] = self._sent[self._turn] or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)

    def wait(self) -> None:
        """Wait until the device has finished what this thread has started."""
        if self._stream is not None:
            self._stream.synchronize()


class _Lanes(threading.local):
    def __init__(self) -> None:
        self._lanes: dict[torch.device, Lane] = {}

    def of(self, device: torch.device) -> Lane:
        """This thread's lane to `device`."""
        if device not in self._lanes:
            self._lanes[device] = Lane(device)
        return self._lanes[device]


LANES = _Lanes()
