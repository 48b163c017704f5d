"""Recognises the output images of a run, so that it overwrites nothing else.

The journal has size, time and hash of an image before the image gets its name. An image of the same size and time is
not read; otherwise its hash is compared, because a copied image has another time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.core.cancel import NEVER, CancelToken
from pipeline.core.errors import ConfigError
from pipeline.core.files import is_of_the_system, names_in, taken
from pipeline.rundir.records import WrittenPicture

_BLOCK_BYTES = 4 * 2**20
# By path, the images that were written there, the newest last; None where an older version recorded the path alone.
Pictures = Mapping[str, Sequence[WrittenPicture | None]]


def written_picture(path: Path, cancel: CancelToken = NEVER) -> WrittenPicture:
    """Size, time and hash of an image, a file or a folder. Raises Stopped soon after `cancel` is set."""
    size_bytes, modified_ns = _size_and_time(path)
    digest = hashlib.sha256()
    for file in _files(path):
        if file != path:  # in a folder, names and sizes matter too: two tiles may be exchanged
            digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK_BYTES):
                digest.update(block)
                cancel.raise_if_set()
    return WrittenPicture(size_bytes=size_bytes, modified_ns=modified_ns, sha256=digest.hexdigest())


def is_as_written(path: Path, picture: WrittenPicture | None, cancel: CancelToken = NEVER) -> bool:
    """Whether the file or folder is that image; if `picture` is None, whether it is not empty."""
    if picture is None:
        return (path.is_file() or path.is_dir()) and _size_and_time(path)[0] > 0
    return is_one_of(path, [picture], cancel)


def is_one_of(path: Path, pictures: Sequence[WrittenPicture], cancel: CancelToken) -> bool:
    """Whether the file or folder is one of several images. Reads it once at most."""
    if not (path.is_file() or path.is_dir()):
        return False
    size_bytes, modified_ns = _size_and_time(path)
    same_size = [picture for picture in pictures if picture.size_bytes == size_bytes]
    if not same_size or any(picture.modified_ns == modified_ns for picture in same_size):
        return bool(same_size)
    sha256 = written_picture(path, cancel).sha256
    return any(picture.sha256 == sha256 for picture in same_size)


def refuse_foreign(output: Path, pictures: Pictures, foreign: str, cancel: CancelToken = NEVER) -> None:
    """Raise ConfigError if `output` exists, is not empty, and is none of `pictures`.

    `foreign`: the cause in the message if no image was written at this path.
    """
    # an empty file is what a full disk or a crash leaves; nothing is lost with it
    if not taken(output) or _is_empty(output):
        return
    own = pictures.get(str(output), ())
    # a run's image under another of its paths is its own too: it may have been moved
    written = [picture for images in pictures.values() for picture in images if picture is not None]
    if None in own or is_one_of(output, written, cancel):
        return
    cause = "it is not what was written there" if own else foreign
    raise ConfigError(
        f"output {output}: exists, and {cause}; it would be lost. Move it away, choose another output, or give --force."
    )


def _is_empty(path: Path) -> bool:
    """Whether a file or folder has no content that could be lost."""
    if path.is_dir():
        return not names_in(path)
    return path.is_file() and path.stat().st_size == 0


def _files(path: Path) -> list[Path]:
    """The file itself, or all files below a folder in the order of their names, except those of desktops."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and not is_of_the_system(file.name))


def _size_and_time(path: Path) -> tuple[int, int]:
    """(bytes of all files, the newest time in ns of any file or folder: renaming a file changes its folder's time)."""
    files = [file.stat() for file in _files(path)]
    folders = [folder.stat() for folder in (path, *path.rglob("*")) if folder.is_dir()]
    return sum(status.st_size for status in files), max(status.st_mtime_ns for status in (*files, *folders))
