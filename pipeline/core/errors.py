"""The errors of the package, with the exit code of the program for each.

    PipelineError                      1   base class, never raised itself
    ├── ConfigError (ValueError)       3   the config is invalid, or asks for something impossible
    │   └── DeviceMemoryError          3   the device is out of memory
    ├── InputError  (ValueError)       3   an image or a weights file cannot be used
    ├── LockedError                    4   the run directory is locked by another process
    ├── StorageError (OSError)         5   a disk is read-only, fails or cannot be reached
    │   └── SpaceError                 5   the disk is full, or too small for the plan
    ├── DamagedStateError              6   the state on disk contradicts the journal
    ├── ClusterError                  75   the scheduler of the cluster cannot be reached; the same command resumes
    └── Stopped                       75   stopped on request; the same command resumes

Every message names the cause, the danger, the remedy and the place.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar


class PipelineError(Exception):
    """Base class of all errors that are not bugs."""

    exit_code: ClassVar[int] = 1


class ConfigError(PipelineError, ValueError):
    """The config is invalid, or asks for something impossible."""

    exit_code = 3


class DeviceMemoryError(ConfigError):
    """A tile does not fit into device memory; a smaller one may."""


class InputError(PipelineError, ValueError):
    """An input file (image, weights) is missing, broken or unusable."""

    exit_code = 3


class LockedError(PipelineError):
    """The run directory is locked by another process."""

    exit_code = 4


class StorageError(PipelineError, OSError):
    """A read or write failed. What was committed before is safe."""

    exit_code = 5


class SpaceError(StorageError):
    """The disk is full, or too small for the plan."""


class DamagedStateError(PipelineError):
    """The state on disk contradicts the journal."""

    exit_code = 6


class ClusterError(PipelineError):
    """The scheduler of the cluster cannot be reached, or was lost. The run can be resumed."""

    exit_code = 75


class Stopped(PipelineError):  # noqa: N818 - an outcome, not an error
    """The run was asked to stop, and stopped between two tasks. It can be resumed."""

    exit_code = 75

    # __main__ prints the same message without importing this module.
    def __init__(self, message: str = "Stopped. Run the same command again to resume."):
        super().__init__(message)


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The remedy for each errno that a disk can cause. Any other error is most likely a bug.
_REMEDIES = {
    errno.ENOSPC: "Free disk space (`df -h`, and `df -i` for the number of files)",
    errno.EDQUOT: "Free disk space, or have the quota raised",
    errno.EFBIG: "Raise the file size limit (`ulimit -f`), or use a file system that supports larger files",
    errno.EROFS: "Make the disk writable again",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Grant this user access to it"),
    **dict.fromkeys((errno.EIO, errno.EREMOTEIO, errno.EUCLEAN, errno.EBADMSG), "Check the disk (`dmesg`)"),
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "Close other programs, which have too many open files",
    errno.ENOMEM: "Free memory",
    errno.ENOLCK: "Use a file system that supports file locks",
    **dict.fromkeys(
        (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
        "Another program moved, replaced or deleted it: restore it",
    ),
    **dict.fromkeys(
        (errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ESHUTDOWN),
        "The disk is disconnected: connect it again",
    ),
}

# The errnos of a wrong path: if the user has just typed it, that is a mistake of theirs, not a failure of the disk.
MISPLACED = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
        *(errno.ELOOP, errno.ENAMETOOLONG),
    }
)


def storage_error(place: Path | str, error: OSError) -> OSError:
    """`error` as a StorageError with a remedy; `error` itself if it is one already, or if the disk is not the cause.

    `place`: the file, for errors that name none or only a relative name, as those of rmtree.
    """
    if isinstance(error, StorageError) or error.errno not in _REMEDIES:
        return error
    kind = SpaceError if error.errno in _NO_SPACE else StorageError
    name = error.filename
    path = name if isinstance(name, str) and Path(name).is_absolute() else place
    return kind(
        f"{path}: {error.strerror}. Nothing that was committed is lost. {_REMEDIES[error.errno]}, and run the same "
        "command again."
    )


@contextmanager
def storage(place: Path | str) -> Iterator[None]:
    """Convert each OSError of the block that a disk caused into a StorageError: see storage_error."""
    try:
        yield
    except OSError as error:
        if (converted := storage_error(place, error)) is error:
            raise
        raise converted from error
