"""Fetching one file from the internet, checked, and given its name when it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from pipeline.core.cancel import NEVER, CancelToken
from pipeline.core.errors import InputError, StorageError, storage
from pipeline.core.files import new_partial, remove, rename_synced, sync_file

_BLOCK_BYTES = 2**20
_POLL_S = 0.2
_TIMEOUT_S = 60  # of a server that says nothing
_MIB = 2**20


class DownloadError(InputError):
    """The file could not be fetched, or is not the one that was wanted."""


def download(
    url: str,
    path: Path,
    sha256_prefix: str,
    cancel: CancelToken = NEVER,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fetch `url` to `path`; its SHA-256 has to begin with `sha256_prefix`. Leaves nothing but the whole file.

    Raises Stopped soon after `cancel` is set. on_progress gets MiB done and in all.
    Raises DownloadError, StorageError.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(str(error)) from error
    with storage(path):
        partial = new_partial(path)
    fetching = _Fetching(url, partial, on_progress)
    try:
        with storage(path):
            # Opened in this thread: the other would still make the file after this one has given up and deleted it.
            file = partial.open("xb")
            # In a thread: a server that says nothing would keep a stop waiting.
            thread = threading.Thread(target=fetching.run, args=(file,), name="download", daemon=True)
            thread.start()
            while thread.is_alive():
                thread.join(_POLL_S)
                cancel.raise_if_set()
            if fetching.failure is not None:
                raise fetching.failure
            if not fetching.sha256.startswith(sha256_prefix):
                raise DownloadError(f"its hash begins with {fetching.sha256[:8]}, not with {sha256_prefix}")
            rename_synced(partial, path)
    finally:
        fetching.cancelled.set()
        with contextlib.suppress(OSError):
            remove(partial)
            for folder in made if not path.exists() else ():  # those that nothing came into
                folder.rmdir()


class _Fetching:
    """The download as its thread sees it."""

    def __init__(self, url: str, partial: Path, on_progress: Callable[[int, int], None]) -> None:
        self._url, self._partial, self._on_progress = url, partial, on_progress
        self.cancelled = threading.Event()
        self.failure: Exception | None = None
        self.sha256 = ""

    def run(self, file: BinaryIO) -> None:
        try:
            with file:
                self._fetch(file)
        except Exception as error:  # raised again in the caller's thread
            self.failure = error

    def _fetch(self, file: BinaryIO) -> None:
        from http.client import HTTPException  # noqa: PLC0415 - for the one download in the life of a machine
        from urllib.request import urlopen  # noqa: PLC0415

        digest, done = hashlib.sha256(), 0
        try:
            with urlopen(self._url, timeout=_TIMEOUT_S) as response:
                total = int(response.headers.get("Content-Length") or 0)
                while (block := response.read(_BLOCK_BYTES)) and not self.cancelled.is_set():
                    with storage(self._partial):
                        file.write(block)
                    digest.update(block)
                    done += len(block)
                    self._on_progress(done // _MIB, max(done, total) // _MIB)
        except StorageError:
            raise
        except (OSError, HTTPException, ValueError) as error:
            raise DownloadError(str(error)) from error
        with storage(self._partial):
            sync_file(file)
        self.sha256 = digest.hexdigest()
