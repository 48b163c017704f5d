"""The file of one chunk: an uncompressed one is read and overwritten in place, a compressed one is replaced."""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from pipeline.core.errors import DamagedStateError
from pipeline.core.files import read_regular

_BLOSC_HEADER = struct.Struct("<4xI4xI")  # decompressed bytes, compressed bytes
_SHUFFLES = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}


class ChunkError(DamagedStateError):
    """A file of the store is missing, truncated or changed, as `kind` says."""

    def __init__(self, path: Path, kind: str, what: str):
        super().__init__(
            f"{path}: {what}. The run's state is damaged, and resuming from it would give a wrong image. "
            "`pipeline verify` lists all damage, and `pipeline verify --repair` recomputes what can be recomputed."
        )
        self.path, self.kind, self.what = path, kind, what

    def __reduce__(self) -> tuple[type[ChunkError], tuple[Path, str, str]]:
        return ChunkError, (self.path, self.kind, self.what)


@contextmanager
def opened(path: Path, flags: int, size_bytes: int) -> Iterator[int]:
    """Open an uncompressed chunk and yield its descriptor. Raises ChunkError if it is missing or of another size."""
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ChunkError(path, "missing", "is missing") from error
    try:
        if (size := os.fstat(descriptor).st_size) != size_bytes:
            raise ChunkError(path, "truncated", f"has {size} bytes instead of {size_bytes}")
        yield descriptor
    finally:
        os.close(descriptor)


def read_all(descriptor: int, path: Path, out: NDArray[Any], offset: int) -> None:
    """Fill the contiguous array `out` from byte `offset` of a file. Raises ChunkError if the file ends before."""
    view, done = out.data.cast("B"), 0
    # preadv, not a memory map: an I/O error or a truncation under a map ends the process with SIGBUS.
    while done < len(view):
        read = os.preadv(descriptor, [view[done:]], offset + done)
        if read == 0:
            raise ChunkError(path, "truncated", f"ends after {offset + done} bytes")
        done += read


def write_all(descriptor: int, data: NDArray[Any], offset: int) -> None:
    """Write a contiguous array into a file from byte `offset` on."""
    view, done = data.data.cast("B"), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def preallocate(path: Path, size_bytes: int) -> None:
    """Create a file of zeros whose disk blocks are allocated; an existing file keeps its content up to that size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(descriptor, size_bytes)
        os.posix_fallocate(descriptor, 0, size_bytes)
    finally:
        os.close(descriptor)


def codec_of(codecs: Sequence[dict[str, Any]]) -> Zstd | Blosc | None:
    """The numcodecs codec for an array's codecs as zarr.json lists them; None if it is uncompressed.

    Zarr's own codecs are thin wrappers of these, so the bytes are the same. Calling them directly saves opening the
    Zarr array, its event loop and two copies per chunk. Raises ValueError for codecs that this package never writes.
    """
    match [(codec["name"], codec.get("configuration", {})) for codec in codecs]:
        case [("bytes", _)]:
            return None
        case [("bytes", _), ("zstd", config)]:
            return Zstd(level=config["level"], checksum=config["checksum"])
        case [("bytes", _), ("blosc", config)]:
            return Blosc(config["cname"], config["clevel"], _SHUFFLES[config["shuffle"]], config["blocksize"])
    raise ValueError(f"has codecs that no array of a run has: {[codec['name'] for codec in codecs]}")


def read_compressed(path: Path, codec: Zstd | Blosc, out: NDArray[Any]) -> None:
    """Decompress a chunk's file into the contiguous array `out`. Raises ChunkError, OSError."""
    try:
        # Incompressible data grows by a few bytes per block; a file of twice the size was not written by a codec.
        data = read_regular(path, 2 * out.nbytes + 2**16)
        if isinstance(codec, Blosc):  # it trusts the sizes in its header, and would read past the end of the data
            if len(data) < _BLOSC_HEADER.size or _BLOSC_HEADER.unpack_from(data) != (out.nbytes, len(data)):
                raise ValueError("the sizes in its header do not fit")
            codec.decode(data, out=out)
        else:
            values = codec.decode(data)  # not into `out`: a frame that is too short would leave old values there
            out[...] = np.frombuffer(values, out.dtype).reshape(out.shape)
    except FileNotFoundError as error:
        raise ChunkError(path, "missing", "is missing") from error
    except (RuntimeError, ValueError) as error:
        raise ChunkError(path, "changed", f"cannot be decoded ({error})") from error


def replace_compressed(path: Path, data: bytes) -> None:
    """Write a compressed chunk to a temporary file and rename it to its name. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is unique, because a task that was given up with its worker may still be writing the same chunk.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
