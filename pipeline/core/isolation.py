"""Imports libraries that read settings of the user while they are imported: files in ~/.config, and variables.

A well-formed setting is overridden while a call of this package runs (rundir/process_settings.py), so that a program
that calls it keeps its own. A malformed file ends the import with an error, whatever it was about.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# Variables by which a user sets up libraries for other programs. They would change what is written, how much memory is
# used, or the last bits. Not among them: what says where files are, such as TORCH_HOME, and the number of threads.
_PREFIXES: tuple[str, ...] = ("BLOSC_", "DASK_", "FSSPEC_", "IM_CONCURRENCY", "NUMCODECS_", "VIPS_", "ZARR_")
_PREFIXES += ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")


def own_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables without those that are settings of libraries, for a process of our own."""
    return {name: value for name, value in environment.items() if not name.startswith(_PREFIXES)}


def drop_settings() -> None:
    """Remove these variables from this process, before it imports the libraries."""
    for name in os.environ.keys() - own_environment(os.environ).keys():
        del os.environ[name]


def import_library(name: str) -> None:
    """Import a library; if that fails over a setting of the user, without the user's settings."""
    if name in sys.modules:
        return
    try:
        importlib.import_module(name)
    except ImportError:  # it is not installed, or broken
        raise
    except Exception:
        with _hidden_settings(name):
            importlib.import_module(name)


@contextmanager
def _hidden_settings(name: str) -> Iterator[None]:
    """Inside, the process has no home folder and no variables of the library, such as DASK_CONFIG."""
    prefix = f"{name.upper()}_"
    hidden = {key: value for key, value in os.environ.items() if key.startswith(prefix) or key == "HOME"}
    for key in hidden:
        del os.environ[key]
    os.environ["HOME"] = os.devnull  # nothing can be below it, and without HOME the home of the account would count
    os.environ[f"{prefix}ROOT_CONFIG"] = os.devnull  # in place of /etc
    try:
        yield
    finally:
        del os.environ[f"{prefix}ROOT_CONFIG"], os.environ["HOME"]
        os.environ.update(hidden)
