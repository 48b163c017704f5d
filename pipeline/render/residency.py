"""Keeping a stage in memory while its iterations run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from pipeline.core.allocator import trim_heap
from pipeline.core.errors import DeviceMemoryError
from pipeline.render.stage import Stage
from pipeline.store import GRADIENT, ResidentStage, content_features_name, is_averaged, slot_names


@contextmanager
def resident(stage: Stage, slot: int, checksums: Mapping[str, str]) -> Iterator[ResidentStage]:
    """Inside, the stage is in memory, read from its newest `slot`.

    `checksums`: of the arrays that are read. Raises ChunkError, StorageError, DeviceMemoryError.
    """
    averaged = is_averaged(checksums)
    read = [*slot_names(slot, averaged=averaged), *map(content_features_name, stage.layer_use.content_widths)]
    names = [*read, *slot_names(1 - slot, averaged=averaged), GRADIENT]
    held = ResidentStage(stage.stage_dir)
    try:
        _load(held, names, {name: checksums[name] for name in read})
        yield held
    finally:
        held.close()
        trim_heap()


def _load(held: ResidentStage, names: Iterable[str], checksums: Mapping[str, str]) -> None:
    try:
        held.load(names, checksums)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise DeviceMemoryError("a stage that was to stay in memory does not fit") from error
