"""The arrays of a stage on disk: the only importer of zarr and numcodecs."""

from pipeline.store.array import (
    ChunkError,
    StageArray,
    commit_stage,
    create_array,
    create_stage,
    delete_array,
    delete_arrays,
    new_array,
    open_array,
    preallocate,
)

__all__ = [
    "ChunkError",
    "StageArray",
    "commit_stage",
    "create_array",
    "create_stage",
    "delete_array",
    "delete_arrays",
    "new_array",
    "open_array",
    "preallocate",
]
