"""What a run wrote under a picture's name, so that nothing else there is taken for its own.

Size, time and hash are in the journal before the picture gets its name. Where size and time are as they were, nothing
is read; else the hash decides: a copied or moved picture has another time.
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
# By name, what was written under it, the newest last; None where an older version kept no more than the name.
Pictures = Mapping[str, Sequence[WrittenPicture | None]]


def written_picture(path: Path, cancel: CancelToken = NEVER) -> WrittenPicture:
    """Size, time and hash of a picture, file or folder. Raises Stopped soon after `cancel` is set."""
    size_bytes, modified_ns = _size_and_time(path)
    digest = hashlib.sha256()
    for file in _files(path):
        if file != path:
            digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK_BYTES):
                digest.update(block)
                cancel.raise_if_set()
    return WrittenPicture(size_bytes=size_bytes, modified_ns=modified_ns, sha256=digest.hexdigest())


def is_as_written(path: Path, picture: WrittenPicture | None, cancel: CancelToken = NEVER) -> bool:
    """Whether what is under this name is that picture; without a picture to compare, whether it is any.

    An empty file or folder is none.
    """
    if picture is None:
        return (path.is_file() or path.is_dir()) and _size_and_time(path)[0] > 0
    return _is_one_of(path, [picture], cancel)


def _is_one_of(path: Path, pictures: Sequence[WrittenPicture], cancel: CancelToken) -> bool:
    """The same for any of several; it is read once at most."""
    if not (path.is_file() or path.is_dir()):
        return False
    size_bytes, modified_ns = _size_and_time(path)
    as_large = [picture for picture in pictures if picture.size_bytes == size_bytes]
    if not as_large or any(picture.modified_ns == modified_ns for picture in as_large):
        return bool(as_large)
    sha256 = written_picture(path, cancel).sha256
    return any(picture.sha256 == sha256 for picture in as_large)


def refuse_foreign(output: Path, pictures: Pictures, foreign: str, cancel: CancelToken = NEVER) -> None:
    """Raise ConfigError if `output` is taken by anything that would be lost: all that is not one of `pictures`.

    `foreign`: what is said of one whose name is not among them.
    """
    if not taken(output) or _is_empty(output):
        return
    own = pictures.get(str(output), ())
    known = [picture for some in pictures.values() for picture in some if picture is not None]
    if None in own or _is_one_of(output, known, cancel):
        return
    what = "it is not what was written there" if own else foreign
    raise ConfigError(
        f"output {output}: exists, and {what}; it would be lost. Move it away, choose another output, or give --force."
    )


def _is_empty(path: Path) -> bool:
    """Whether a file or folder has nothing in it that could be lost."""
    if path.is_dir():
        return not names_in(path)
    return path.is_file() and path.stat().st_size == 0


def _files(path: Path) -> list[Path]:
    """The file itself, or all files of a folder, in the order of their names; none that a desktop put there."""
    if not path.is_dir():
        return [path]
    return sorted(one for one in path.rglob("*") if one.is_file() and not is_of_the_system(one.name))


def _size_and_time(path: Path) -> tuple[int, int]:
    """Bytes of all files, and the newest time of any file or folder: one that was renamed changes its folder's."""
    files = [file.stat() for file in _files(path)]
    folders = [one.stat() for one in (path, *path.rglob("*")) if one.is_dir()]
    return sum(one.st_size for one in files), max(one.st_mtime_ns for one in (*files, *folders))
