"""What can go wrong, and the exit code it ends the program with.

    PipelineError                      1   (never raised itself)
    ├── ConfigError (ValueError)       3   the config, or what it asks for, cannot work
    ├── InputError  (ValueError)       3   an image or a weights file cannot be used
    ├── LockedError                    4   another process works on this run
    ├── SpaceError  (OSError)          5   the disk is full, or too small for the plan
    ├── DamagedStateError              6   a run directory is not what its journal says
    └── Stopped                       75   asked to stop; the same command goes on

Every message names the cause, the danger, the remedy and the place.
"""

from __future__ import annotations

from typing import ClassVar


class PipelineError(Exception):
    """Root of all errors that are not bugs."""

    exit_code: ClassVar[int] = 1


class ConfigError(PipelineError, ValueError):
    """The config is wrong, or asks for what cannot be done."""

    exit_code = 3


class InputError(PipelineError, ValueError):
    """An input file (image, weights) is missing, broken or unusable."""

    exit_code = 3


class LockedError(PipelineError):
    """Another process holds the run directory."""

    exit_code = 4


class SpaceError(PipelineError, OSError):
    """The disk has, or will have, no room."""

    exit_code = 5


class DamagedStateError(PipelineError):
    """The state on disk is not what the journal says it is."""

    exit_code = 6


class Stopped(PipelineError):  # noqa: N818 - an outcome, not an error
    """The run was asked to stop, and stopped between two tasks; it can go on."""

    exit_code = 75
