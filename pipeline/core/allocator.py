"""Making the C library give freed memory back.

glibc raises its mmap threshold to the size of the largest block freed so far (up to 32 MiB), after which feature maps
come from per-thread heaps that fragment and never shrink: a run over 16 tiles peaked at 2.2 GiB instead of 0.8 GiB
(docs/log.md). With a fixed threshold every feature map is mapped, and unmapped when it is freed; huge pages take back
half of the time that mapping costs.
"""

from __future__ import annotations

import ctypes
import os

_LIBRARY = ctypes.CDLL(None)
_IS_GLIBC = hasattr(_LIBRARY, "gnu_get_libc_version")
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # from malloc.h
_THRESHOLD_BYTES = 2**20


def set_up_process() -> None:
    """Have this process give freed memory back, as the plan counts on; does nothing under another C library than glibc.

    For the start of a program, before torch allocates anything: glibc cannot undo it, so that no function of the
    library does it by itself. The command line and the worker processes do; a program that calls `run` should.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if _IS_GLIBC:
        _LIBRARY.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
        # one heap for what is smaller: every thread's own would keep its largest size
        _LIBRARY.mallopt(_M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Give back what lies free between what is in use, which passes leave more and more of; takes up to 25 ms."""
    if _IS_GLIBC:
        _LIBRARY.malloc_trim(0)
