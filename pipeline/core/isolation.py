"""Imports libraries that read settings of the user while they are imported: files in ~/.config, and variables.

A well-formed setting is overridden while a call of this package runs (rundir/process_settings.py), so that a program
that calls it keeps its own. A malformed file ends the import with an error, whatever it was about.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
