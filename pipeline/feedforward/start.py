"""The start picture of a run (`init: apply:net.safetensors`): the content of its first stage through a network."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from pipeline.config import InitNetwork
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.tiling import Size, grid
from pipeline.core.vgg_layers import ceil_to
from pipeline.feedforward import cost, tile_tasks
from pipeline.feedforward.network_file import read_network_header
from pipeline.feedforward.passes import not_finite
from pipeline.feedforward.spec import TransformSpec
from pipeline.feedforward.tile_tasks import Measured, NetworksSpec
from pipeline.feedforward.tiled import Statistics
from pipeline.network import sha256_of
from pipeline.plan import BASE_BYTES
from pipeline.plan.memory import ACTIVATION_OVERHEAD
from pipeline.render.preparation import FirstCanvas
from pipeline.render.stage import Stage
from pipeline.store import merged, open_array


def start_picture(stage: Stage) -> FirstCanvas:
    """What fills the first canvas. Raises InputError, ConfigError for a network that cannot be used here."""
    init = stage.config.init
    assert isinstance(init, InitNetwork)
    header = read_network_header(init.apply, stage.config.limits.max_weights_bytes)
    if header.spec.factor != 1:
        raise ConfigError(f"init: {init.apply} enlarges its input; name a network of a style.")
    if min(stage.plan.size) < (least := header.spec.least_side_px()):
        raise InputError(f"init: {init.apply} needs {least} px on each side. Choose a larger initial_size.")
    first = (1.0, *(0.0 for _ in header.spec.styles[1:]))
    own = stage.network
    networks = NetworksSpec(
        (init.apply,), (sha256_of(init.apply),), (first,), own.dtype, own.device, own.threads, own.gpu_bytes
    )
    return partial(_fill, stage, header.spec, networks)


def _fill(
    stage: Stage, spec: TransformSpec, networks: NetworksSpec, folder: Path, name: str, checksums: Mapping[str, str]
) -> str:
    tiles = grid(*stage.plan.size, _tile_px(stage, spec))
    known: dict[str, Statistics] = {}
    for conv in spec.measured_norms():
        specs = [
            tile_tasks.MomentsSpec(folder, tile, networks, checksums, {0: dict(known)}, 0, conv.name) for tile in tiles
        ]
        total = stage.executor.fold(tile_tasks.moments_task, specs, tile_tasks.add_moments, Measured()).moments
        assert total is not None
        if not total.is_finite:
            raise not_finite(networks.paths[0], conv.name)
        known[conv.name] = total.statistics()
    outputs = [
        tile_tasks.OutputSpec(folder, tile, networks, checksums, {0: known}, name, (None,), keeps_color=False)
        for tile in tiles
    ]
    sums = stage.executor.map(tile_tasks.output_task, outputs, stage.counter("start picture", len(tiles)), tile=True)
    return open_array(folder, name).packed(merged(sums))


def _tile_px(stage: Stage, spec: TransformSpec) -> int:
    """The largest tile, of the run's at most, whose feature maps fit into memory.limit beside the program."""
    size: Size = stage.plan.size
    step, itemsize = stage.config.store.chunk_px, 8 if stage.config.compute.dtype == "float64" else 4
    processes = max(1, stage.config.compute.workers)
    room = stage.config.memory.limit_bytes // processes - BASE_BYTES["cpu"]
    tile_px = min(stage.tile_px // step * step, ceil_to(max(size), step))
    while tile_px > step and cost.tile_bytes(spec, size, tile_px, itemsize) * ACTIVATION_OVERHEAD > room:
        tile_px -= step
    return tile_px
