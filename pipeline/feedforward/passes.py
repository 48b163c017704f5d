"""The passes of `apply` over a picture: its content into the store, the statistics of every norm, the canvas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline import store
from pipeline.config import ApplyConfig
from pipeline.core.allocator import trim_heap
from pipeline.core.errors import InputError, storage
from pipeline.core.events import Sink, WorkDone, in_order
from pipeline.core.tiling import Tile, grid
from pipeline.executors import Executor
from pipeline.feedforward import tile_tasks
from pipeline.feedforward.plan import CANVAS, ApplyPlan, arrays_of, mask_arrays
from pipeline.feedforward.spec import Conv
from pipeline.feedforward.tile_tasks import NetworksSpec
from pipeline.feedforward.tiled import Moments, Statistics
from pipeline.render import ingest
from pipeline.store import ALPHA, CONTENT, METADATA, guide_name, integrity, merged, metadata

# By number of a network and name of a norm, mean and variance by channel; as in the position of a run.
Known = Mapping[tuple[int, str], tuple[tuple[float, ...], tuple[float, ...]]]


@dataclass(frozen=True)
class Passes:
    """The passes of one run, in tiles of `tile_px`."""

    config: ApplyConfig
    plan: ApplyPlan
    networks: NetworksSpec
    stage_dir: Path
    executor: Executor
    sink: Sink
    tile_px: int

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """The tiles of the canvas."""
        return grid(*self.plan.stage.size, self.tile_px)

    def prepare(self) -> dict[str, str]:
        """Create the arrays, and read content and masks into them; gives the checksums. May be repeated.

        Raises StorageError, InputError for a broken image.
        """
        trim_heap()
        folder = self.stage_dir.with_name(self.stage_dir.name + ".partial")
        with storage(folder):
            store.create_stage(folder)
            canvas = self.plan.stage.size
            for name, array in arrays_of(self.config, self.plan.content_size, canvas, self.plan.content).items():
                store.create_array(folder, name, array.shape, array.chunk_px, array.form, self.config.store.codec)
            sums = self._ingest(folder)
            sums |= metadata.metadata_checksums(folder)
            # renamed when complete: after a crash the folder has its name with everything in it, or does not exist
            store.commit_stage(folder, self.stage_dir)
        return sums

    def _ingest(self, folder: Path) -> dict[str, str]:
        names = [CONTENT, ALPHA] if self.plan.content.alpha else [CONTENT]
        planes = [store.open_array(folder, name) for name in names]
        colors = ingest.canvas_colors(self.config)
        packed = ingest.ingest_planes(self.config.content, planes, self.executor, self._reporter("content"), colors)
        sums = dict(zip(names, packed, strict=True))
        for index, path in enumerate(self.config.masks):
            array = store.open_array(folder, guide_name(index))
            sums[guide_name(index)] = ingest.ingest(path, array, self.executor, self._reporter("mask"))
        return sums

    def check(self, checksums: Mapping[str, str]) -> None:
        """Raise ChunkError if an array that a pass reads is damaged, or the canvas is not there."""
        for name in checksums:
            if name.endswith(METADATA):
                metadata.check_metadata(self.stage_dir, name, checksums[name])
        names = [name for name in checksums if not name.endswith(METADATA) and name != CANVAS]
        arrays = [store.open_array(self.stage_dir, name, checksums[name]) for name in names]
        arrays.append(store.open_array(self.stage_dir, CANVAS))
        integrity.require_intact(arrays, self.executor, self._reporter("check"))

    def statistics(self, what: str, network: int, conv: Conv, known: Known, checksums: Mapping[str, str]) -> Statistics:
        """Mean and variance before the norm of `conv`, over the whole picture; the sums are in tile order.

        Raises InputError for features that are not finite.
        """
        measured = statistics_by_network(known)
        specs = [
            tile_tasks.MomentsSpec(self.stage_dir, tile, self.networks, checksums, measured, network, conv.name)
            for tile in self.tiles
        ]
        initial: Moments | None = None
        counter = in_order(self._reporter(what), len(specs))
        total = self.executor.fold(tile_tasks.moments_task, specs, tile_tasks.add_moments, initial, counter)
        assert total is not None  # every position belongs to a tile
        if not total.is_finite:
            raise InputError(
                f"{self.networks.paths[network]}: its features at {conv.name} are not finite, so that the picture "
                "would be empty. Use compute.dtype: float32, or another network."
            )
        return total.statistics()

    def output(self, what: str, known: Known, checksums: Mapping[str, str]) -> dict[str, str]:
        """Write the canvas; gives its checksums."""
        measured = statistics_by_network(known)
        specs = [
            tile_tasks.OutputSpec(
                self.stage_dir,
                tile,
                self.networks,
                checksums,
                measured,
                CANVAS,
                mask_arrays(self.config),
                self.config.color == "luminance",
            )
            for tile in self.tiles
        ]
        counter = in_order(self._reporter(what), len(specs))
        sums = self.executor.map(tile_tasks.output_task, specs, counter, tile=True)
        return {CANVAS: store.open_array(self.stage_dir, CANVAS).packed(merged(sums))}

    def _reporter(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.sink(WorkDone(0, what, done, total))


def statistics_by_network(known: Known) -> dict[int, dict[str, Statistics]]:
    """The statistics as the networks take them."""
    networks: dict[int, dict[str, Statistics]] = {}
    for (number, norm), (mean, variance) in known.items():
        networks.setdefault(number, {})[norm] = Statistics(mean, variance)
    return networks
