"""Files that are whole under their name: written beside it, synced, and renamed when nothing is missing.

What is not synced stays in memory for half a minute, and goes with the power. What a process leaves half-written when
it is killed is removed by the next that writes the same file.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
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
