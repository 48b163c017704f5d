"""The arrays of a stage on disk: the only importer of zarr, numcodecs and crc32c."""

from pipeline.store.array import StageArray, open_array
from pipeline.store.arrays import commit_stage, create_array, create_stage, delete_array, delete_arrays, new_array
from pipeline.store.chunk_file import ChunkError, preallocate

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
