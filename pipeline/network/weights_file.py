"""Weights files, and what one from a stranger may claim: looked at before anything of it is believed or loaded.

A .safetensors file is a JSON header and plain numbers. A .pth file is a pickle: torch reads it with `weights_only`, so
that nothing in it is run; but a pickle, or the zip file around it, can still be a bomb.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.fields import bytes_text
from pipeline.config.yaml_reader import shown
from pipeline.core.errors import InputError, StorageError, storage

MAX_HEADER_BYTES = 2**20  # of JSON; VGG-19's has 5 KB
MAX_PICKLE_BYTES = 2**23  # without the numbers, which are not in it; VGG-19's has 10 KB
MAX_ZIP_ENTRIES = 10_000
# One read is one step of the pickle machine, and may make an object.
MAX_PICKLE_READS = 2**20
# Bytes per number, by the format's names.
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


def check_file(path: Path, max_bytes: int) -> None:
    """Raise InputError where a weights file is missing, no file, or larger than `max_bytes`."""
    if not path.is_file():
        raise InputError(f"weights file {path}: not found, or no file. Correct network.weights.")
    if (size := path.stat().st_size) > max_bytes:
        raise InputError(
            f"weights file {path}: has {size:,} bytes, beyond limits.max_weights_bytes ({bytes_text(max_bytes)}). Give "
            "other weights, or raise that limit if you trust these."
        )


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a .safetensors file, from its header. Raises InputError if it is none."""
    try:
        size = path.stat().st_size
        with storage(path), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"its header claims {length:,} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {key: _shape(entry, size - 8 - length) for key, entry in header.items()}
    except StorageError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        text = shown(f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error), 200)
        raise InputError(f"weights file {path}: not a readable .safetensors file ({text}).") from error


def _shape(entry: Mapping[str, Any], data_bytes: int) -> tuple[int, ...]:
    """The shape of one tensor of a header, whose numbers are as many, and where, as it says."""
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError("a shape or an offset is no whole number")
    if not start <= end <= data_bytes:
        raise ValueError(f"it has {data_bytes} of {end} bytes of weights")
    if math.prod(shape) * _ITEM_BYTES[entry["dtype"]] != end - start:
        raise ValueError(f"a tensor of shape {shape} has {end - start} bytes")
    return shape


def is_zip(path: Path) -> bool:
    """Whether torch takes a .pth file for a zip file; older ones are pickles one after another."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\3\4"


def check_zip(path: Path) -> None:
    """Raise ValueError where a .pth zip file is not as torch writes them: stored, nothing twice, a short pickle."""
    entries, directory_bytes = _zip_directory(path)
    if entries > MAX_ZIP_ENTRIES or directory_bytes > MAX_PICKLE_BYTES:
        raise ValueError(f"its directory claims {entries:,} entries in {directory_bytes:,} bytes")
    with zipfile.ZipFile(path) as file:
        infos = file.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in infos):
        raise ValueError("it is compressed, which torch never does")
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise ValueError("its parts are larger than the file")
    if any(info.file_size > MAX_PICKLE_BYTES for info in infos if "/data/" not in info.filename):
        raise ValueError("it holds far more than weights")


def _zip_directory(path: Path) -> tuple[int, int]:
    """(entries, bytes) of the directory at the end of a zip file, as it claims: read before any of it."""
    with path.open("rb") as file:
        end = file.seek(0, io.SEEK_END)
        file.seek(max(0, end - 2**16 - 22))
        tail = file.read()
        at = tail.rfind(b"PK\5\6")
        try:
            entries, size = struct.unpack_from("<HI", tail, at + 10 if at >= 0 else len(tail))
            if at >= 20 and tail[at - 20 : at - 16] == b"PK\6\7":  # a second, for large files, says more
                file.seek(struct.unpack_from("<Q", tail, at - 12)[0])
                entries, size = struct.unpack_from("<32xQQ", file.read(56))[:2]
        except (struct.error, OverflowError, OSError) as error:
            raise ValueError("its end is missing") from error
    return entries, size


class PickleFile(io.BufferedReader):
    """A .pth file of the old kind that ends where its pickles, without the numbers, are longer than any network's."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._reads = self._bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """As for any file. Raises ValueError where it has gone on for too long."""
        data = super().read(size)
        self._count(data)
        return data

    def readline(self, size: int | None = -1, /) -> bytes:
        """As for any file. Raises ValueError where it has gone on for too long."""
        data = super().readline(MAX_PICKLE_BYTES + 1 if size is None or size < 0 else size)
        self._count(data)
        return data

    def _count(self, data: bytes) -> None:
        self._reads += 1
        self._bytes += len(data)
        if self._reads > MAX_PICKLE_READS or self._bytes > MAX_PICKLE_BYTES:
            raise ValueError("it holds far more than weights")
