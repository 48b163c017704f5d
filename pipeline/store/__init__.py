"""The arrays of a stage on disk: the only importer of zarr, numcodecs and crc32c."""

from pipeline.store.library import zarr_settings  # first, because it imports zarr

# isort: split
from pipeline.store.array import StageArray, open_array
from pipeline.store.arrays import commit_stage, create_array, create_stage, delete_array, delete_arrays, new_array
from pipeline.store.checksums import ChunkSums, checksum, merged, packed, unpacked
from pipeline.store.chunk_file import ChunkError, preallocate
from pipeline.store.chunk_io import ChunkReader, ChunkWriter
from pipeline.store.encodings import BFLOAT16, BFLOAT16_ROUNDING, FIXED16, RoundingBytes
from pipeline.store.guides import UNGUIDED, Guides
from pipeline.store.integrity import CheckSpec, Finding, OnProgress
from pipeline.store.layout import (
    ALPHA,
    COLOR_AND_ALPHA,
    CONTENT,
    CONTENT_GUIDE,
    GRADIENT,
    METADATA,
    OVERVIEW_PX,
    STYLE,
    TILE_LOSSES,
    ArraySpec,
    StageLayout,
    activations_name,
    content_features_name,
    gram_key,
    gram_name,
    guide_name,
    is_aid,
    is_averaged,
    is_stage_array,
    kept_files,
    layer_key,
    layer_of,
    other_slot,
    overviews_bytes,
    resident_names,
    result_name,
    scale_of,
    skip_name,
    slot_names,
)
from pipeline.store.memory import HostMemory, Memory
from pipeline.store.metadata import check_metadata, group_metadata, make_room_again, read_gram, write_metadata
from pipeline.store.overview import Overview, OverviewChunk, block_means, overview_path
from pipeline.store.resident import RESIDENT_THREADS, ResidentStage
