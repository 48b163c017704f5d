"""Process-wide settings of zarr, dask, libvips and torch, restored when the last call of the library has ended.

A program that imports or calls this package keeps its own settings. The network in memory is released with them.
(malloc's settings cannot be restored: see allocator.py.)
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from threadpoolctl import ThreadpoolController

from pipeline import executors, images, store
from pipeline.core import callers

_lock = threading.Lock()
_restore = ExitStack()
_for_ever = ExitStack()


@contextmanager
def process_settings() -> Iterator[None]:
    """Apply the settings inside the block. Blocks may be nested, and run on several threads at once."""
    with _lock:
        if not callers.number():  # the first call; others that overlap with it share its settings
            _restore.enter_context(store.zarr_settings())
            _restore.enter_context(executors.dask_settings())
            _restore.enter_context(images.vips_settings())
            _restore.enter_context(_single_threaded_blas())
            _restore.callback(_release_network)
        callers.enter()
    try:
        yield
    finally:
        with _lock:
            callers.leave()
            if not callers.number():  # not earlier, since other threads may still be computing
                _restore.close()


def enter_process_settings() -> None:
    """The settings for a worker process, which keeps them until it ends."""
    _for_ever.enter_context(process_settings())


@contextmanager
def _single_threaded_blas() -> Iterator[None]:
    """Inside, numpy's matrix products and roots use one thread: their last bits depend on the number of threads.

    The run and its worker processes must find the same bits. torch's threads are not affected.
    """
    controller = ThreadpoolController()
    numpys = [library.filepath for library in controller.lib_controllers if "numpy" in library.filepath]
    with controller.select(filepath=numpys).limit(limits=1):
        yield


def _release_network() -> None:
    """Release the network and restore torch's settings, if torch has been imported at all."""
    if (network := sys.modules.get("pipeline.network.cache")) is not None:
        network.release()
