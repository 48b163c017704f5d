"""Settings of glibc's malloc that make it return freed memory to the system.

glibc raises its mmap threshold to the size of the largest block freed so far (up to 32 MiB). From then on feature maps
come from per-thread heaps, which fragment and never shrink: a run over 16 tiles peaked at 2.2 GiB instead of 0.8 GiB
(docs/log.md). With a fixed threshold every feature map gets its own mapping, which is unmapped when it is freed. Huge
pages win back half of the time that the mappings cost.
"""

from __future__ import annotations

import ctypes
import os

_LIBRARY = ctypes.CDLL(None)
_IS_GLIBC = hasattr(_LIBRARY, "gnu_get_libc_version")
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # from malloc.h
_THRESHOLD_BYTES = 2**20


def set_up_process() -> None:
    """Make this process return freed memory to the system, as the memory plan assumes. Only has an effect with glibc.

    Call it at the start of a program, before torch allocates memory. It cannot be undone, so the library never calls it
    by itself: the command line and the worker processes do, and a program that calls `run` should.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if _IS_GLIBC:
        _LIBRARY.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
        # One arena for small blocks: with one per thread, each arena would keep the largest size it ever had.
        _LIBRARY.mallopt(_M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Return the free parts of the heap to the system. Takes up to 25 ms."""
    if _IS_GLIBC:
        _LIBRARY.malloc_trim(0)
