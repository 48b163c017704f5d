"""The start picture of a run: the content of its first stage through a network (`init: apply:net.safetensors`), or with
the moments of its styles' features (`init: wct:pairs.safetensors`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from pipeline.config import InitNetwork, InitWct
from pipeline.core.tiling import Size, grid
from pipeline.core.vgg_layers import ceil_to
from pipeline.feedforward import cost, tile_tasks, wct, wct_passes
from pipeline.feedforward.passes import not_finite
from pipeline.feedforward.spec import Layered, TransformSpec
from pipeline.feedforward.start_file import start_network, start_pairs
from pipeline.feedforward.tile_tasks import Measured, NetworksSpec
from pipeline.feedforward.tiled import Statistics
from pipeline.feedforward.wct_passes import LevelSpec, WctOutput, WctTile
from pipeline.losses.objective import Gram, mean_gram
from pipeline.network import sha256_of
from pipeline.plan import BASE_BYTES
from pipeline.plan.memory import ACTIVATION_OVERHEAD
from pipeline.render.preparation import FirstCanvas
from pipeline.render.stage import Stage
from pipeline.render.style_targets import ingest_aside
from pipeline.store import CONTENT, STYLE, delete_array, merged, open_array

# How far a start goes from the content's moments to the style's; as of `pipeline apply --style`.
_STRENGTH = 0.6


def start_picture(stage: Stage) -> FirstCanvas | None:
    """What fills the first canvas; None where no network does.

    Raises InputError, ConfigError for a network that cannot be used here.
    """
    init = stage.config.init
    if isinstance(init, InitNetwork):
        return _of_network(stage, init.apply)
    return _of_wct(stage, init.wct) if isinstance(init, InitWct) else None


def _of_network(stage: Stage, path: Path) -> FirstCanvas:
    header = start_network(stage.config, path, stage.plan)
    first = (1.0, *(0.0 for _ in header.spec.styles[1:]))
    own = stage.network
    networks = NetworksSpec((path,), (sha256_of(path),), (first,), own.dtype, own.device, own.threads, own.gpu_bytes)
    return partial(_fill, stage, header.spec, networks)


def _fill(
    stage: Stage, spec: TransformSpec, networks: NetworksSpec, folder: Path, name: str, checksums: Mapping[str, str]
) -> str:
    tiles = grid(*stage.plan.size, _tile_px(stage, [spec]))
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


def _of_wct(stage: Stage, path: Path) -> FirstCanvas:
    levels = start_pairs(stage.config, path, stage.plan).levels
    own, sha256 = stage.network, sha256_of(path)
    networks = [LevelSpec(path, sha256, level, own.dtype, own.device, own.threads, own.gpu_bytes) for level in levels]
    return partial(_fill_wct, stage, networks)


def _fill_wct(stage: Stage, levels: Sequence[LevelSpec], folder: Path, name: str, checksums: Mapping[str, str]) -> str:
    """Level by level, deepest first, from one slot of the canvas into the other; the last one writes `name`."""
    tile_px = _tile_px(stage, [each.level for each in levels])
    targets = _style_moments(stage, levels, folder, tile_px)
    tiles = grid(*stage.plan.size, tile_px)
    count = stage.counter("start picture", 2 * len(levels) * len(tiles))
    other = "canvas_0" if name == "canvas_1" else "canvas_1"
    source, known = CONTENT, dict(checksums)
    for number, network in enumerate(levels):
        specs = [WctTile(folder, source, tile, network, known) for tile in tiles]
        content = wct_passes.total_gram(stage.executor, specs, f"level {network.level.number}", count)
        step = wct.transport(content, targets[number], _STRENGTH)
        target = (name, other)[(len(levels) - 1 - number) % 2]
        keeps_color = stage.config.color == "content" and number == len(levels) - 1
        outputs = [WctOutput(folder, source, tile, network, known, target, step, keeps_color) for tile in tiles]
        sums = stage.executor.map(wct_passes.output_task, outputs, count, tile=True)
        source, known = target, {**known, target: open_array(folder, target).packed(merged(sums))}
    return known[name]


def _style_moments(stage: Stage, levels: Sequence[LevelSpec], folder: Path, tile_px: int) -> list[Gram]:
    """Of each level, the mean of φ̃φ̃ᵀ over the styles, by their weights: as the targets of the style loss are mixed."""
    styles, by_style = stage.config.styles, []
    for style, size in zip(styles, stage.plan.style_sizes, strict=True):
        checksums = {STYLE: ingest_aside(stage, folder, style.image, size)}
        totals = []
        for network in levels:
            specs = [WctTile(folder, STYLE, tile, network, checksums) for tile in grid(*size, tile_px)]
            totals.append(wct_passes.total_gram(stage.executor, specs, f"level {network.level.number}"))
        delete_array(folder, STYLE)
        by_style.append([total / total[-1, -1] for total in totals])
    weights = [style.weight for style in styles]
    return [mean_gram([grams[number] for grams in by_style], weights) for number in range(len(levels))]


def _tile_px(stage: Stage, specs: Sequence[Layered]) -> int:
    """The largest tile, of the run's at most, whose feature maps fit into memory.limit beside the program."""
    size: Size = stage.plan.size
    step, itemsize = stage.config.store.chunk_px, 8 if stage.config.compute.dtype == "float64" else 4
    processes = max(1, stage.config.compute.tile_processes)
    room = (stage.config.memory.limit_bytes // processes - BASE_BYTES["cpu"]) / ACTIVATION_OVERHEAD
    tile_px = min(stage.tile_px // step * step, ceil_to(max(size), step))
    while tile_px > step and max(cost.tile_bytes(spec, size, tile_px, itemsize) for spec in specs) > room:
        tile_px -= step
    return tile_px
