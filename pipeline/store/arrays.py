"""Creating and deleting the arrays of a stage, one Zarr group per stage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.codecs

from pipeline.core.errors import storage
from pipeline.store.array import open_array
from pipeline.store.chunk_file import preallocate, replace_compressed
from pipeline.store.encodings import ENCODINGS
from pipeline.store.layout import OVERVIEW


def create_array(stage_dir: Path, name: str, shape: tuple[int, int, int], chunk_px: int, form: str, codec: str) -> None:
    """Create an (H, W, C) array with all its chunks on disk, reading as zeros.

    `form`: a numpy dtype, or the name of one of encodings.ENCODINGS. `codec`: none (preallocated, so that later writes
    need no more disk space), zstd or lz4. Raises StorageError.
    """
    with storage(stage_dir / name):
        new_array(stage_dir / name, shape, chunk_px, form, codec)
        array = open_array(stage_dir, name)
        zeros = b"" if array.raw else array.codec.encode(np.zeros(array.chunk_shape, array.dtype))
        for cy, cx in array.chunk_indices():
            if array.raw:
                preallocate(array.chunk_path(cy, cx), array.chunk_bytes)
            else:
                replace_compressed(array.chunk_path(cy, cx), zeros)


def new_array(target: Any, shape: tuple[int, int, int], chunk_px: int, form: str, codec: str) -> Any:
    """Create an (H, W, C) zarr array without chunks, in a folder or in any other store that zarr accepts."""
    return zarr.create_array(
        target,
        shape=shape,
        chunks=(chunk_px, chunk_px, shape[2]),
        dtype="uint16" if form in ENCODINGS else form,
        compressors=_compressors(codec),
        fill_value=0,
        attributes={"encoding": form} if form in ENCODINGS else None,
        dimension_names=("y", "x", "c"),
        config={"write_empty_chunks": True},
    )


def _compressors(codec: str) -> Any:
    if codec == "none":
        return None
    if codec == "zstd":
        return [zarr.codecs.ZstdCodec(level=1)]
    return [zarr.codecs.BloscCodec(cname="lz4", shuffle="shuffle")]


def create_stage(stage_dir: Path) -> None:
    """Create an empty stage group, replacing what an interrupted preparation left there. Raises StorageError."""
    with storage(stage_dir):
        if stage_dir.exists():
            shutil.rmtree(stage_dir)
        zarr.create_group(stage_dir)


def commit_stage(partial_dir: Path, stage_dir: Path) -> None:
    """Rename a fully prepared stage to its final name. Raises StorageError."""
    with storage(stage_dir):
        if stage_dir.exists():
            shutil.rmtree(stage_dir)
        partial_dir.replace(stage_dir)


def delete_array(stage_dir: Path, name: str) -> None:
    """Delete one array. Raises StorageError."""
    with storage(stage_dir / name):
        shutil.rmtree(stage_dir / name)


def delete_arrays(stage_dir: Path, keep: set[str]) -> None:
    """Delete all arrays of a stage, and their overviews, but those named in `keep`. Raises StorageError."""
    with storage(stage_dir):
        for path in stage_dir.iterdir() if stage_dir.exists() else ():
            if path.is_dir() and path.name not in keep:
                shutil.rmtree(path)
            elif path.name.endswith(OVERVIEW) and path.name.removesuffix(OVERVIEW) not in keep:
                path.unlink(missing_ok=True)
