"""dask, imported and used without the settings of the user: they are made for clusters, and ours is on one machine."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pipeline.core.isolation import import_library

import_library("dask")

import dask.config  # noqa: E402

_for_ever = ExitStack()


@contextmanager
def dask_settings() -> Iterator[None]:
    """Inside, dask and distributed have their own defaults, whatever files and variables say."""
    settings, known = dask.config.config, len(dask.config.defaults)
    users, folder = dict(settings), dask.config.PATH
    dask.config.PATH = os.devnull  # distributed would write a file there while it is imported
    settings.clear()
    for defaults in dask.config.defaults:
        dask.config.update(settings, copy.deepcopy(defaults), priority="old")
    try:
        yield
    finally:
        dask.config.PATH = folder
        settings.clear()
        settings.update(users)
        for defaults in dask.config.defaults[known:]:  # of distributed, if it was imported meanwhile
            dask.config.update(settings, defaults, priority="old")


def enter_dask_settings() -> None:
    """The settings for a worker process, before it imports distributed."""
    _for_ever.enter_context(dask_settings())
