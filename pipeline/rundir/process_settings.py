"""What is one for the whole process while a call of ours runs, and put back when the last of them has ended.

Settings of zarr, libvips and torch, and the network in memory. A program that imports this package, or calls it, keeps
its own. (malloc's settings cannot be put back: see allocator.py.)
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pipeline import images
from pipeline.core import callers
from pipeline.store import metadata

_lock = threading.Lock()
_put_back = ExitStack()
_kept = ExitStack()


@contextmanager
def process_settings() -> Iterator[None]:
    """Inside, libraries are set as we need them. Calls may be nested, and run on several threads at once."""
    with _lock:
        if not callers.number():
            _put_back.enter_context(metadata.zarr_settings())
            _put_back.enter_context(images.vips_settings())
            _put_back.callback(_release_network)
        callers.enter()
    try:
        yield
    finally:
        with _lock:
            callers.leave()
            if not callers.number():
                _put_back.close()


def enter_process_settings() -> None:
    """The settings for a worker process, which keeps them until it ends."""
    _kept.enter_context(process_settings())


def _release_network() -> None:
    """Frees the network, and puts torch's settings back, if anything was computed: else torch is not even there."""
    if (network := sys.modules.get("pipeline.network.cache")) is not None:
        network.release()
