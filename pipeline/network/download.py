"""Downloads one file by torch.hub, so that the file appears under its name only when it is complete and verified."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread

from pipeline.core.cancel import NEVER, CancelToken
from pipeline.core.errors import InputError, storage, storage_error
from pipeline.core.files import new_partial, remove, rename_synced, sync_file

_POLL_S = 0.2
_TIMEOUT_S = 60  # without a byte from the server


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
            # torch.hub names its temporary file itself: a folder of our own shows its size, and is easy to remove.
            partial.mkdir()
            _download_to(partial / path.name, url, sha256_prefix, cancel, on_progress)
            with (partial / path.name).open("rb") as file:
                sync_file(file)  # before the rename: a power loss must not leave half a file under the name
            rename_synced(partial / path.name, path)
    finally:
        with contextlib.suppress(OSError):
            remove(partial)
            for folder in missing if not path.exists() else ():
                folder.rmdir()


def _download_to(
    target: Path, url: str, sha256_prefix: str, cancel: CancelToken, on_progress: Callable[[int], None]
) -> None:
    """Run torch.hub's download on a thread, and watch the size of its file: torch.hub offers no callback or timeout.

    The thread cannot be interrupted. After a stop or a timeout it writes on into a deleted file, and being a daemon it
    ends with the process.
    """
    folder, outcome = target.parent, Future[None]()
    Thread(target=_fetch, args=(url, target, sha256_prefix, outcome), name="download", daemon=True).start()
    size, grown_s = 0, time.monotonic()
    while not outcome.done():
        wait([outcome], _POLL_S)
        cancel.raise_if_set()
        with contextlib.suppress(FileNotFoundError):  # torch.hub renames its file between the listing and the stat
            if (now := sum(file.stat().st_size for file in folder.iterdir())) > size:
                size, grown_s = now, time.monotonic()
                on_progress(size)
        if time.monotonic() - grown_s > _TIMEOUT_S:
            raise DownloadError(f"the server sent nothing for {_TIMEOUT_S} s")
    if (error := outcome.exception()) is not None:
        # A full or failing disk raises OSError itself. The network raises its subclasses, whose errno may be another
        # library's code, and torch.hub raises RuntimeError for a wrong hash.
        if type(error) is OSError and storage_error(folder, error) is not error:
            raise error
        raise DownloadError(str(error)) from error


def _fetch(url: str, target: Path, sha256_prefix: str, outcome: Future[None]) -> None:
    import torch.hub  # noqa: PLC0415 - only the one download in the life of a machine needs it

    try:
        torch.hub.download_url_to_file(url, str(target), sha256_prefix, progress=False)
    except Exception as error:
        outcome.set_exception(error)
    else:
        outcome.set_result(None)
