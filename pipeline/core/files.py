"""Atomic file writes (temporary file, sync, rename), and checks of paths and files.

A file that is not synced may stay in the page cache for half a minute and is lost in a power failure. A temporary file
that a killed process leaves behind is removed by the next process that writes the same file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import psutil


def write_whole(path: Path, data: bytes) -> None:
    """Replace a small file atomically. Only one process may write it at a time."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(data)
        sync_file(file)
    rename_synced(temporary, path)


def sync_file(file: BinaryIO) -> None:
    """Write everything in the buffers of an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def rename_synced(temporary: Path, path: Path) -> None:
    """Rename a file or folder whose content is on the disk to `path`, and sync the new name."""
    temporary.replace(path)
    sync_folder(path.parent)


def new_partial(path: Path) -> Path:
    """A free name beside `path` for a temporary file or folder.

    Removes temporary files that killed processes of this machine left there. The names contain the host name, because
    other machines may write to a folder on a file server, and their processes cannot be checked from here.
    """
    prefix = _partial_prefix(path)
    for entry in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
        pid = entry.name.removeprefix(prefix).partition("-")[0]
        same_kind = entry.name.removesuffix(".old").endswith(path.suffix)
        if same_kind and pid.isdigit() and not _is_alive(int(pid), entry):
            remove(entry)
    return path.with_name(partial_name(path))


@contextlib.contextmanager
def partial_beside(path: Path) -> Iterator[Path]:
    """`new_partial`, whose file or folder is removed at the end, unless it was renamed."""
    partial = new_partial(path)
    try:
        yield partial
    finally:
        with contextlib.suppress(OSError):  # a failed disk fails here too; the first error says more
            remove(partial)


def partial_name(path: Path) -> str:
    """An unused temporary name, which new_partial(path) cleans up once this process has ended."""
    return f"{_partial_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}{path.suffix}"


def _partial_prefix(path: Path) -> str:
    return f".{path.stem}.partial-{os.uname().nodename}-"


def _is_alive(pid: int, partial: Path) -> bool:
    """Whether the process that created `partial` is alive. A process that is younger only has the same id by chance."""
    try:
        return psutil.Process(pid).create_time() <= partial.lstat().st_mtime + 1
    except (psutil.Error, OSError):
        return False


def remove(path: Path) -> None:
    """Delete a file or a folder if it exists. A symbolic link is deleted, not its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Write the directory entries of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file_system(path: Path) -> None:
    """Write everything on the file system of `path` to its disk; for many files faster than one fsync each.

    Raises OSError if the disk fails.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "syncfs"):  # only Linux can sync a single file system and report errors
        os.sync()
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if libc.syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)


# Files that desktops (macOS, Windows, KDE) and file servers (Synology, NFS) create in any folder.
_SYSTEM_NAMES = re.compile(
    r"\.DS_Store|\._.*|\.AppleDouble|Thumbs\.db|desktop\.ini|\.directory|@eaDir|\.nfs[0-9a-f]+", re.IGNORECASE
)


def is_of_the_system(name: str) -> bool:
    """Whether a desktop or a file server creates files of this name by itself."""
    return _SYSTEM_NAMES.fullmatch(name) is not None


def names_in(folder: Path) -> set[str]:
    """The names in a folder, without those that desktops and file servers create; empty if there is no folder."""
    return {path.name for path in folder.iterdir() if not is_of_the_system(path.name)} if folder.is_dir() else set()


def path_fault(path: Path) -> str:
    """Why a path cannot be stored in the journal or printed on one line; empty if it can."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "the path is not valid UTF-8, so it cannot be stored in the journal"
    if any(unicodedata.category(char) == "Cc" for char in str(path)):
        return "the path contains a NUL, a line break or another control character"
    return ""


def icc_fault(path: Path) -> str | None:
    """Why a file cannot be an ICC profile; None if it looks like one. Raises OSError, FileNotFoundError if missing."""
    if not stat.S_ISREG(path.stat().st_mode):
        return "is not a file"
    with path.open("rb") as file:
        return None if file.read(40)[36:] == b"acsp" else "is not an ICC profile"


def real(path: Path) -> Path:
    """`path` with symbolic links resolved, as far as they can be."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return path


def same_file(first: Path, second: Path) -> bool:
    """Whether two paths are the same file; False if they cannot be compared."""
    if real(first) == real(second):
        return True
    try:
        return first.samefile(second)
    except OSError:  # one does not exist or is unreadable, which is reported when it is opened
        return False


def would_replace(output: Path, path: Path) -> bool:
    """Whether writing `output`, a file or a folder that is replaced as a whole, would destroy the file `path`."""
    return same_file(output, path) or real(output) in real(path).parents


def taken(path: Path) -> bool:
    """Whether the name exists, including a dangling link."""
    return os.path.lexists(path)


def read_regular(path: Path, max_bytes: int, start: int = 0) -> bytes:
    """The content of a regular file from byte `start` on.

    Raises OSError; ValueError if it is a link, not a file, or above `max_bytes`.
    """
    if stat.S_ISLNK(path.lstat().st_mode):
        raise ValueError("it is a link")
    # O_NONBLOCK: opening a pipe would wait for a writer. O_NOFOLLOW: the file may have become a link since the check.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > max_bytes:
            raise ValueError(f"it has {status.st_size:,} bytes, more than any run writes")
        file.seek(start)
        return file.read()


def unwritable(folder: Path) -> OSError | None:
    """The OSError that writing into a folder would raise; None if it is writable."""
    if os.access(folder, os.W_OK | os.X_OK):
        return None
    number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
    return OSError(number, os.strerror(number), os.fspath(folder))
