"""Keeping a stage in memory while its iterations run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from pipeline.core.allocator import trim_heap
from pipeline.core.errors import DeviceMemoryError
from pipeline.core.events import Note
from pipeline.network import cache
from pipeline.render.device_state import DeviceMemory, has_same_bits
from pipeline.render.stage import Stage
from pipeline.store import GRADIENT, HostMemory, ResidentStage, content_features_name, is_averaged, slot_names


@contextmanager
def resident(stage: Stage, slot: int, checksums: Mapping[str, str]) -> Iterator[ResidentStage | None]:
    """Inside, the stage is in memory, the GPU's if there is one, read from its newest `slot`; None: it cannot be.

    `checksums`: of the arrays that are read. Raises ChunkError, StorageError, DeviceMemoryError.
    """
    on_gpu = stage.network.on_gpu
    if on_gpu and stage.basis is not None and not has_same_bits():
        stage.sink(Note("this processor rounds otherwise than the GPU, so stages do not stay in the GPU's memory"))
        yield None
        return
    averaged = is_averaged(checksums)
    read = [*slot_names(slot, averaged=averaged), *map(content_features_name, stage.layer_use.content_widths)]
    names = [*read, *slot_names(1 - slot, averaged=averaged), GRADIENT]
    held = ResidentStage(stage.stage_dir, partial(DeviceMemory, stage.network.device) if on_gpu else HostMemory)
    cache.hold(stage.network, stage.plan.resident_bytes)
    try:
        _load(held, names, {name: checksums[name] for name in read})
        yield held
    finally:
        held.close()
        trim_heap()
        if on_gpu:
            torch.cuda.empty_cache()
        cache.hold(stage.network, 0)


def _load(held: ResidentStage, names: Iterable[str], checksums: Mapping[str, str]) -> None:
    try:
        held.load(names, checksums)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise DeviceMemoryError("a stage that was to stay in memory does not fit") from error
