"""Keeps tasks of an earlier start, which may still run on the machines of a cluster, from the files of a run.

    the run                                              a worker, for every task
      writes a new token into tasks.token                  takes a shared lock of tasks.lock
      takes an exclusive lock of tasks.lock: it is         refuses if the token is not that of the task
      granted when no task runs any more                   runs the task, releases the lock

A task that begins after the new token was written is refused; the run waits for one that began before. The system
releases the lock of a process, or of a machine of a network file system, that dies. The token is an ordinary file,
which every task opens anew: a worker whose view of the shared folder is not up to date is refused too.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError, LockedError, storage

R = TypeVar("R")
LOCK_NAME, TOKEN_NAME, PROBE_NAME = "tasks.lock", "tasks.token", "tasks.probe"
# After this time the user is told that the run waits for tasks of an earlier one; after the next, it ends.
_TELL_S, _WAIT_S = 5.0, 1800.0
_POLL_S = 0.02
# What decides the bytes of a result. The numbers of the machine's own kind of processor cannot be compared by name.
_LIBRARIES = ("pipeline", "torch", "numpy", "zarr")


@dataclass(frozen=True)
class Fence:
    """What a task carries: the folder and the token of its run, and the libraries and files that it expects.

    `versions`: of the libraries of the run's own process. `files`: (path, SHA-256) of files that tasks read outside
    the run directory.
    """

    folder: Path
    token: str
    versions: tuple[str, ...]
    files: tuple[tuple[Path, str], ...] = ()


@cache
def versions() -> tuple[str, ...]:
    """The versions of the libraries in this process's installation."""
    return tuple(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)


def write_in_place(path: Path, text: str) -> None:
    """Write a small file as chunks are written: in place, and closed afterwards. Raises StorageError."""
    with storage(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            os.pwrite(descriptor, text.encode(), 0)
            os.ftruncate(descriptor, len(text.encode()))
        finally:
            os.close(descriptor)


def bar_earlier_tasks(folder: Path, token: str, cancel: CancelToken, note: Callable[[str], None]) -> None:
    """Let only tasks with this token begin from now on, and wait until no other runs.

    Raises Stopped, StorageError, and LockedError if tasks of an earlier start do not end.
    """
    write_in_place(folder / TOKEN_NAME, token)
    begun, is_told = time.monotonic(), False
    with _opened_lock(folder) as descriptor:
        while not _granted(descriptor, fcntl.LOCK_EX):
            cancel.raise_if_set()
            waited = time.monotonic() - begun
            if waited > _TELL_S and not is_told:
                note(f"waiting for tasks of an earlier start that still run on a worker, or hang there ({folder})")
                is_told = True
            if waited > _WAIT_S:
                raise LockedError(
                    f"{folder}: tasks of an earlier start have been running for {_WAIT_S / 60:.0f} minutes. They "
                    "would write into this run. End the workers that the scheduler has lost, and run the same "
                    "command again."
                )
            time.sleep(_POLL_S)


def run_fenced(fence: Fence, function: Callable[..., R], *values: Any) -> R:
    """Run a task, if it belongs to the run that holds the folder now. Raises ConfigError if not."""
    with _opened_lock(fence.folder) as descriptor:
        with storage(fence.folder / LOCK_NAME):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if (found := read_small(fence.folder / TOKEN_NAME)) != fence.token:
            seen = "does not see" if not found else "sees another state of"
            raise ConfigError(
                f"{_this_worker()} {seen} {fence.folder} than this run does, so its work would be lost or wrong. "
                "work_dir has to lie on a file system that all machines share under the same path (NFS version 4 with "
                "its default options will do). Nothing is lost: correct it or end that worker, and run the same "
                "command again."
            )
        _check_installation(fence.versions, fence.files)
        return function(*values)


@cache
def _check_installation(expected: tuple[str, ...], files: tuple[tuple[Path, str], ...]) -> None:
    """Raise ConfigError if this process would compute other bytes than that of the run."""
    if versions() != expected:
        differing = [
            f"{own} instead of {other}" for own, other in zip(versions(), expected, strict=False) if own != other
        ]
        raise ConfigError(
            f"{_this_worker()} has {', '.join(differing)}: its results would differ in their last bits. Install the "
            "same versions on all machines."
        )
    for path, sha256 in files:
        found = _sha256(path)
        if found != sha256:
            what = "does not have the file" if found is None else "has another file"
            raise ConfigError(
                f"{_this_worker()} {what} {path}. Copy the file to a folder that all machines share under the same "
                "path, and name it in network.weights."
            )


def _this_worker() -> str:
    return f"the worker process {os.getpid()} on {socket.gethostname()}"


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def read_small(path: Path) -> str:
    """The content of a small file, opened anew; empty if it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return ""
    try:
        return os.read(descriptor, 1024).decode(errors="replace")
    finally:
        os.close(descriptor)


@contextmanager
def _opened_lock(folder: Path) -> Iterator[int]:
    """The file of the lock, open; closing it releases the lock."""
    path = folder / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except FileNotFoundError:  # a worker that does not see the folder: it has no token either
        descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _granted(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


# --- the check of a shared folder, called in the workers by the run ---------------------------------------------------


@contextmanager
def all_locked(folder: Path) -> Iterator[None]:
    """Hold the lock that no task can share. Raises ConfigError where the file system has no locks."""
    with _opened_lock(folder) as descriptor:
        with storage(folder / LOCK_NAME):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def probe(folder: Path, question: str, answer_name: str, answer: str) -> str:
    """Look at a folder from a worker: "" if it is what the run sees, else what is wrong. Leaves an answer there.

    The run holds the exclusive lock.
    """
    if (found := read_small(folder / PROBE_NAME)) != question:
        return "does not see it" if not found else "sees an old state of it"
    with _opened_lock(folder) as descriptor:
        if _granted(descriptor, fcntl.LOCK_SH):
            return "ignores file locks that other machines hold there"
    try:
        write_in_place(folder / answer_name, answer)
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return ""
