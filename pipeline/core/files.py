"""Files that are whole under their name: written beside it, synced, and renamed when nothing is missing.

What is not synced stays in memory for half a minute, and goes with the power. What a process leaves half-written when
it is killed is removed by the next that writes the same file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import unicodedata
from pathlib import Path

import psutil


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file beside its place, sync it, and give it its name. For files that one process writes at once."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def new_partial(path: Path) -> Path:
    """A free name beside `path` for what is not whole yet, a file or a folder.

    What processes of this machine left under such a name when they were killed is removed. A folder on a file server
    may be another machine's too: its processes cannot be asked for, so the name says whose they are.
    """
    prefix = _partial_prefix(path)
    for entry in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
        pid = entry.name.removeprefix(prefix).partition("-")[0]
        ours = entry.name.removesuffix(".old").endswith(path.suffix)
        if ours and pid.isdigit() and not _is_at_work(int(pid), entry):
            remove(entry)
    return path.with_name(partial_name(path))


def partial_name(path: Path) -> str:
    """A name that nothing has, which new_partial(path) removes once this process has ended."""
    return f"{_partial_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}{path.suffix}"


def _partial_prefix(path: Path) -> str:
    return f".{path.stem}.partial-{os.uname().nodename}-"


def _is_at_work(pid: int, partial: Path) -> bool:
    """Whether a process of this number runs that can have made `partial`: after a restart another has the number."""
    try:
        return psutil.Process(pid).create_time() <= partial.lstat().st_mtime + 1
    except (psutil.Error, OSError):
        return False


def remove(path: Path) -> None:
    """Delete a file or a whole folder, if it is there; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file_system(path: Path) -> None:
    """Bring everything written to the file system of `path` onto its disk. Raises OSError if it refuses.

    Of very many files this is faster than one sync each.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "syncfs"):  # Linux alone can sync one file system, and tell of errors
        os.sync()
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if libc.syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)


# What desktops (macOS, Windows, KDE) and file servers (Synology, NFS) put into any folder that they show or serve.
_SYSTEM_NAMES = re.compile(
    r"\.DS_Store|\._.*|\.AppleDouble|Thumbs\.db|desktop\.ini|\.directory|@eaDir|\.nfs[0-9a-f]+", re.IGNORECASE
)


def is_of_the_system(name: str) -> bool:
    """Whether a name is one that a desktop or a file server gives: it says nothing of whose a folder is."""
    return _SYSTEM_NAMES.fullmatch(name) is not None


def names_in(folder: Path) -> set[str]:
    """The names in a folder, but those that a desktop or a file server put there; none where there is no folder."""
    return {path.name for path in folder.iterdir() if not is_of_the_system(path.name)} if folder.is_dir() else set()


def unnameable(path: Path) -> str:
    """Why a name cannot be kept in a journal or shown on a line; empty if it can."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "its name, or that of a folder around it, is no UTF-8, which the run's records could not keep"
    if any(unicodedata.category(char) == "Cc" for char in str(path)):
        return "a path cannot contain a NUL, a line break or another control character"
    return ""


def real(path: Path) -> Path:
    """`path` with links followed, as far as they lead anywhere."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return path


def taken(path: Path) -> bool:
    """Whether something has this name, even if it is a link that leads nowhere."""
    return os.path.lexists(path)


def read_regular(path: Path, max_bytes: int) -> bytes:
    """All of a file of at most `max_bytes`. Raises OSError, and ValueError where it is a link, no file, or larger."""
    if stat.S_ISLNK(path.lstat().st_mode):
        raise ValueError("it is a link")
    # neither waits for somebody to write into a pipe
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > max_bytes:
            raise ValueError(f"it has {status.st_size:,} bytes, more than any run writes")
        return file.read()


def unwritable(folder: Path) -> OSError | None:
    """Why nothing can be written in a folder, as the system would tell it; None if it can."""
    if os.access(folder, os.W_OK | os.X_OK):
        return None
    number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
    return OSError(number, os.strerror(number), os.fspath(folder))
