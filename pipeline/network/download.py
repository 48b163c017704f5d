"""Downloads one file, so that it appears under its name only when it is complete and verified."""

from __future__ import annotations

import contextlib
import hashlib
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread

from pipeline.core.cancel import NEVER, CancelToken
from pipeline.core.errors import InputError, storage, storage_error
from pipeline.core.files import new_partial, remove, rename_synced, sync_file

_POLL_S = 0.2
_TIMEOUT_S = 60  # without a byte from the server
_BLOCK_BYTES = 1 << 16


class DownloadError(InputError):
    """The file could not be downloaded, or its hash is wrong."""


def download(
    url: str,
    path: Path,
    sha256_prefix: str,
    cancel: CancelToken = NEVER,
    on_progress: Callable[[int], None] = lambda size_bytes: None,
) -> None:
    """Download `url` to `path`; the file's SHA-256 must begin with `sha256_prefix`. A failure leaves no file behind.

    `on_progress` receives the bytes that have arrived.
    Raises Stopped within a moment after `cancel` is set, DownloadError, StorageError.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(str(error)) from error
    with storage(path):
        partial = new_partial(path)
    try:
        with storage(path):
            partial.touch()
            _download_to(partial, url, sha256_prefix, cancel, on_progress)
            rename_synced(partial, path)
    finally:
        with contextlib.suppress(OSError):
            remove(partial)
            for folder in missing if not path.exists() else ():
                folder.rmdir()


def _download_to(
    partial: Path, url: str, sha256_prefix: str, cancel: CancelToken, on_progress: Callable[[int], None]
) -> None:
    """Download on a thread, because a stop must not wait for a silent server: reading from it cannot be interrupted.

    After a stop the thread writes nothing more, and ends with the next block or the timeout.
    """
    outcome = Future[None]()
    Thread(target=_fetch, args=(url, partial, sha256_prefix, cancel, outcome), name="download", daemon=True).start()
    size = 0
    while not outcome.done():
        wait([outcome], _POLL_S)
        cancel.raise_if_set()
        if (now := partial.stat().st_size) > size:
            size = now
            on_progress(size)
    if (error := outcome.exception()) is not None:
        # A full or failing disk raises OSError itself; the network raises its subclasses, whose errno may be another
        # library's code.
        if type(error) is OSError and storage_error(partial, error) is not error:
            raise error
        raise DownloadError(str(error)) from error


def _fetch(url: str, partial: Path, sha256_prefix: str, cancel: CancelToken, outcome: Future[None]) -> None:
    digest = hashlib.sha256()
    request = urllib.request.Request(url, headers={"User-Agent": "pipeline"})  # some servers refuse Python's own
    try:
        # "r+": if this thread starts late, after a stop, it must not create the file again
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer, partial.open("r+b") as file:
            while block := answer.read(_BLOCK_BYTES):
                cancel.raise_if_set()
                file.write(block)
                digest.update(block)
            sync_file(file)  # before the rename: a power loss must not leave half a file under the name
        if not digest.hexdigest().startswith(sha256_prefix):
            raise DownloadError(f"its hash should begin with {sha256_prefix}, and is {digest.hexdigest()}")
    except TimeoutError:
        outcome.set_exception(DownloadError(f"the server sent nothing for {_TIMEOUT_S} s"))
    except Exception as error:
        outcome.set_exception(error)
    else:
        outcome.set_result(None)
