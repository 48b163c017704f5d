"""The single-file parts of a store, metadata and style targets: writing, verifying and recreating them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline import store
from pipeline.core.errors import storage
from pipeline.core.files import is_of_the_system, read_regular, rename_synced, sync_file_system, write_whole
from pipeline.store.array import MAX_METADATA_BYTES, StageArray
from pipeline.store.checksums import checksum, packed, unpacked
from pipeline.store.chunk_file import ChunkError
from pipeline.store.layout import METADATA, gram_name

_MAX_GRAM_BYTES = 2**30  # 11,000 channels


def sync(path: Path) -> None:
    """Sync the file system of `path` to its disk. Raises StorageError if that fails."""
    with storage(path):
        sync_file_system(path)


def metadata_checksums(stage_dir: Path) -> dict[str, str]:
    """The checksum of every metadata file of a stage, by its path within the stage."""
    arrays = [path for path in sorted(stage_dir.glob(f"*/{METADATA}")) if not is_of_the_system(path.parent.name)]
    paths = [stage_dir / METADATA, *arrays]
    return {str(path.relative_to(stage_dir)): packed([checksum(path.read_bytes())]) for path in paths}


def check_metadata(stage_dir: Path, name: str, checksums: str) -> None:
    """Raise ChunkError for a damaged or missing metadata file, StorageError if the disk refuses."""
    _read_checked(stage_dir / name, checksums)


def _read_checked(path: Path, checksums: str) -> bytes:
    """The content of a small file. Raises ChunkError if it does not match its checksum."""
    with storage(path):
        try:
            data = read_regular(path, MAX_METADATA_BYTES if path.name == METADATA else _MAX_GRAM_BYTES)
            intact = checksum(data) == unpacked(checksums)[0]
        except FileNotFoundError as error:
            raise ChunkError(path, "missing", "is missing") from error
        except (ValueError, IndexError):  # not a regular file, or a malformed checksum
            intact = False
    if not intact:
        raise ChunkError(path, "changed", "is not what was written there")
    return data


def write_gram(stage_dir: Path, key: str, gram_CC: NDArray[np.float64]) -> str:
    """Store the style target of a style key, (C, C) float64, and return its packed checksum. Raises StorageError."""
    with storage(stage_dir / gram_name(key)):
        array = zarr.create_array(
            stage_dir / gram_name(key),
            shape=gram_CC.shape,
            chunks=gram_CC.shape,  # one file: of several, a missing one would read as zeros
            dtype="float64",
            compressors=None,
            config={"write_empty_chunks": True},
        )
        array[...] = gram_CC
    return packed([checksum(np.ascontiguousarray(gram_CC))])


def read_gram(stage_dir: Path, key: str, checksums: str) -> NDArray[np.float64]:
    """The style target of a style key. Raises ChunkError if it is missing or damaged."""
    data = _read_checked(stage_dir / gram_name(key) / "c" / "0" / "0", checksums)
    side = math.isqrt(len(data) // 8)
    return np.frombuffer(data, "<f8").reshape(side, side)


def group_metadata() -> bytes:
    """The content of the metadata file of every group of a run."""
    files: dict[str, Any] = {}
    zarr.create_group(files, zarr_format=3)
    return bytes(files[METADATA].to_bytes())


def create_store(path: Path) -> None:
    """Create the run's Zarr group, replacing what an interrupted start left there. Raises StorageError.

    It is created under a temporary name, synced and renamed, so it is complete whatever `store.durability` is.
    """
    temporary = path.with_name(path.name + ".partial")
    with storage(path):
        for old in (temporary, path):
            if old.exists():
                shutil.rmtree(old)
        write_metadata(temporary / METADATA, group_metadata())
        rename_synced(temporary, path)


def write_metadata(path: Path, data: bytes) -> None:
    """Write a metadata file to a temporary file, sync it and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)


def make_room_again(array: StageArray, cy: int, cx: int) -> None:
    """Recreate the file of a chunk whose content is unused."""
    path = array.chunk_path(cy, cx)
    path.unlink(missing_ok=True)  # not overwritten in place: its sectors may be bad
    path.parent.mkdir(parents=True, exist_ok=True)
    if array.raw:
        store.preallocate(path, array.chunk_bytes)
    else:
        array.write_chunk(cy, cx, np.zeros(array.chunk_shape, array.dtype))
