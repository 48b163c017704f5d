"""zarr, imported and used without the settings of the user."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.core.isolation import import_library

import_library("zarr")

import zarr  # noqa: E402


@contextmanager
def zarr_settings() -> Iterator[None]:
    """Inside, zarr has its own defaults, whatever files and variables say: they change what arrays are on disk.

    And it does not use its own thread pool: measured fastest under the executor's threads.
    """
    settings = zarr.config.config
    users = dict(settings)
    settings.clear()
    for defaults in zarr.config.defaults:
        settings.update(copy.deepcopy(defaults))
    try:
        with zarr.config.set({"async.concurrency": 1}):
            yield
    finally:
        settings.clear()
        settings.update(users)
