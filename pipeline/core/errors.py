"""What can go wrong, and the exit code it ends the program with.

    PipelineError                      1   (never raised itself)
    ├── ConfigError (ValueError)       3   the config, or what it asks for, cannot work
    │   └── DeviceMemoryError          3   no memory for the smallest tile
    ├── InputError  (ValueError)       3   an image or a weights file cannot be used
    ├── LockedError                    4   another process works on this run
    ├── StorageError (OSError)         5   a disk refuses or fails, or cannot be reached
    │   └── SpaceError                 5   the disk is full, or too small for the plan
    ├── DamagedStateError              6   a run directory is not what its journal says
    └── Stopped                       75   asked to stop; the same command goes on

Every message names the cause, the danger, the remedy and the place.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar


class PipelineError(Exception):
    """Root of all errors that are not bugs."""

    exit_code: ClassVar[int] = 1


class ConfigError(PipelineError, ValueError):
    """The config is wrong, or asks for what cannot be done."""

    exit_code = 3


class DeviceMemoryError(ConfigError):
    """A tile does not fit into the memory of the device; a smaller one may."""


class InputError(PipelineError, ValueError):
    """An input file (image, weights) is missing, broken or unusable."""

    exit_code = 3


class LockedError(PipelineError):
    """Another process holds the run directory."""

    exit_code = 4


class StorageError(PipelineError, OSError):
    """A disk does not give or take what the run needs; nothing that was committed is lost."""

    exit_code = 5


class SpaceError(StorageError):
    """The disk has, or will have, no room."""


class DamagedStateError(PipelineError):
    """The state on disk is not what the journal says it is."""

    exit_code = 6


class Stopped(PipelineError):  # noqa: N818 - an outcome, not an error
    """The run was asked to stop, and stopped between two tasks; it can go on."""

    exit_code = 75

    def __init__(self, message: str = "run the same command again to resume."):  # as __main__ says it
        super().__init__(message)


_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What to do, by errno. An error that is not here is no disk's fault: a bug, most likely.
_REMEDIES = {
    errno.ENOSPC: "Make room (`df -h`, and `df -i` for the number of files)",
    errno.EDQUOT: "Make room, or have the quota raised",
    errno.EFBIG: "Raise the limit of a file's size (`ulimit -f`), or use a disk that holds larger files",
    errno.EROFS: "Make the disk writable again",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Give this user the right to it"),
    **dict.fromkeys((errno.EIO, errno.EREMOTEIO, errno.EUCLEAN, errno.EBADMSG), "Check the disk (`dmesg`)"),
    errno.EMFILE: "Let this process open more files (`ulimit -n`)",
    errno.ENFILE: "Close other programs, which have too many files open",
    errno.ENOMEM: "Free memory",
    errno.ENOLCK: "Use a disk that knows file locks",
    **dict.fromkeys(
        (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
        "Something else moved, replaced or deleted it: put it back",
    ),
    **dict.fromkeys(
        (errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ESHUTDOWN),
        "The disk is gone: connect it again",
    ),
}

# The errnos of a path that names the wrong place: where the user has just named it, a mistake and no disk's fault.
MISPLACED = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
        *(errno.ELOOP, errno.ENAMETOOLONG),
    }
)


def storage_error(place: Path | str, error: OSError) -> OSError:
    """`error` as a StorageError that says what to do; itself if it is one, or if no disk is the cause.

    `place`: the file in question, where the error names none; a part of a path, as rmtree's, is none.
    """
    if isinstance(error, StorageError) or error.errno not in _REMEDIES:
        return error
    kind = SpaceError if error.errno in _ROOM else StorageError
    name = error.filename
    path = name if isinstance(name, str) and Path(name).is_absolute() else place
    return kind(
        f"{path}: {error.strerror}. Nothing that was committed is lost. {_REMEDIES[error.errno]}, and give the same "
        "command again."
    )


@contextmanager
def storage(place: Path | str) -> Iterator[None]:
    """Turns every OSError inside that is a disk's fault into a StorageError: see storage_error."""
    try:
        yield
    except OSError as error:
        if (told := storage_error(place, error)) is error:
            raise
        raise told from error
