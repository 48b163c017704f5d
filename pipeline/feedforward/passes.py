"""The passes of `apply` over a picture: its content into the store, the statistics of every norm, the canvas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import images, store
from pipeline.config import ApplyConfig
from pipeline.core.allocator import trim_heap
from pipeline.core.errors import InputError, storage
from pipeline.core.events import Sink, WorkDone, in_order
from pipeline.core.tiling import Tile, grid
from pipeline.executors import Executor
from pipeline.feedforward import activations, histogram, tile_tasks
from pipeline.feedforward.arrays import CANVAS, UNMATCHED, mask_arrays
from pipeline.feedforward.plan import ApplyPlan
from pipeline.feedforward.tile_tasks import Measured, NetworksSpec
from pipeline.feedforward.tiled import Statistics
from pipeline.render import ingest
from pipeline.store import ALPHA, CONTENT, METADATA, STYLE, guide_name, integrity, merged, metadata

# By number of a network and name of a norm, mean and variance by channel; as in the position of a run.
Known = Mapping[tuple[int, str], tuple[tuple[float, ...], tuple[float, ...]]]


@dataclass(frozen=True)
class PassResult:
    """What a pass has measured or written; the fields are those of its record."""

    network: int = 0
    norm: str | None = None
    mean: tuple[float, ...] = ()
    variance: tuple[float, ...] = ()
    checksums: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Passes(ABC):
    """The passes of one run, in tiles of `tile_px`. `sha256`: of the networks' files. `gpu_bytes`: of one process."""

    config: ApplyConfig
    plan: ApplyPlan
    sha256: tuple[str, ...]
    device: str
    threads: int
    gpu_bytes: int
    stage_dir: Path
    executor: Executor
    sink: Sink
    tile_px: int

    @abstractmethod
    def run(self, number: int, known: Known, checksums: Mapping[str, str]) -> PassResult:
        """Run one pass, given what those before it have measured and written."""

    @abstractmethod
    def _images(self) -> dict[str, Path]:
        """The images beside the content, by the array that they are read into."""

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
            for name, array in self.plan.arrays.items():
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
        for name, path in self._images().items():
            array = store.open_array(folder, name)
            own = colors if name == STYLE else images.SRGB  # a mask has no colours
            sums[name] = ingest.ingest(path, array, self.executor, self._reporter(name.partition("_")[0]), own)
        return sums

    def check(self, checksums: Mapping[str, str]) -> None:
        """Raise ChunkError if an array that a pass reads is damaged, or the canvas is not there."""
        for name in checksums:
            if name.endswith(METADATA):
                metadata.check_metadata(self.stage_dir, name, checksums[name])
        names = [name for name in checksums if not name.endswith(METADATA)]
        arrays = [store.open_array(self.stage_dir, name, checksums[name]) for name in names]
        # without checksums: their content is unused, but their chunks must exist to be overwritten in place
        arrays += [store.open_array(self.stage_dir, name) for name in self.plan.arrays if name not in names]
        integrity.require_intact(arrays, self.executor, self._reporter("check"))

    def _reporter(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.sink(WorkDone(0, what, done, total))

    def _counter(self, number: int, total: int) -> Callable[[], None]:
        return in_order(self._reporter(f"pass {number + 1} of {self.plan.stage.max_iterations}"), total)


class NetworkPasses(Passes):
    """Statistics of each norm of each network, and the canvas."""

    def _images(self) -> dict[str, Path]:
        return {guide_name(index): path for index, path in enumerate(self.config.masks)}

    @property
    def _networks(self) -> NetworksSpec:
        uses = self.plan.networks
        return NetworksSpec(
            tuple(use.header.path for use in uses),
            self.sha256,
            tuple(use.style_S for use in uses),
            self.config.compute.dtype,
            self.device,
            self.threads,
            self.gpu_bytes,
        )

    def run(self, number: int, known: Known, checksums: Mapping[str, str]) -> PassResult:
        """As in Passes. Raises InputError for features that are not finite."""
        measured, norms = statistics_by_network(known), self.plan.norms
        if number == len(norms):
            return self._output(number, measured, checksums)
        if number > len(norms):
            return self._matched(number, checksums)
        network, conv = norms[number]
        spec, size = self.plan.networks[network].header.spec, self.plan.content_size
        step = activations.step_of(spec, network, size, conv, self.plan.keeps)
        tiles = activations.tiles(spec, size, step, self.tile_px)
        specs = [
            tile_tasks.MomentsSpec(
                self.stage_dir,
                tile,
                self._networks,
                checksums,
                measured,
                network,
                conv.name,
                keeps=self.plan.keeps,
            )
            for tile in tiles
        ]
        counter = self._counter(number, len(specs))
        total = self.executor.fold(tile_tasks.moments_task, specs, tile_tasks.add_moments, Measured(), counter)
        moments = total.moments
        assert moments is not None  # every position belongs to a tile
        if not moments.is_finite:
            raise not_finite(self.plan.networks[network].header.path, conv.name)
        own = moments.statistics()
        packed = {name: store.open_array(self.stage_dir, name).packed(sums) for name, sums in total.sums.items()}
        return PassResult(network, conv.name, tuple(own.mean_C), tuple(own.variance_C), packed)

    def _output(
        self, number: int, measured: Mapping[int, Mapping[str, Statistics]], checksums: Mapping[str, str]
    ) -> PassResult:
        masks, keeps_color = mask_arrays(self.config), self.config.color == "luminance"
        target = UNMATCHED if self.config.match_histogram else CANVAS
        specs = [
            tile_tasks.OutputSpec(
                self.stage_dir,
                tile,
                self._networks,
                checksums,
                measured,
                target,
                masks,
                keeps_color,
                keeps=self.plan.keeps,
            )
            for tile in self.tiles
        ]
        sums = self.executor.map(tile_tasks.output_task, specs, self._counter(number, len(specs)), tile=True)
        packed = store.open_array(self.stage_dir, target).packed(merged(sums))
        return PassResult(checksums={target: packed})

    def _matched(self, number: int, checksums: Mapping[str, str]) -> PassResult:
        source, content = (store.open_array(self.stage_dir, name, checksums[name]) for name in (UNMATCHED, CONTENT))
        target = store.open_array(self.stage_dir, CANVAS)
        tiles = [grid(*array.shape[:2], self.tile_px) for array in (source, content, target)]
        counter = self._counter(number, sum(map(len, tiles)))
        packed = histogram.matched(source, content, target, self.executor, self.tile_px, counter)
        return PassResult(checksums={CANVAS: packed})


def not_finite(path: Path, layer: str) -> InputError:
    """The error of a network whose features overflow."""
    return InputError(
        f"{path}: its features at {layer} are not finite, so that the picture would be empty. Use compute.dtype: "
        "float32, or another network."
    )


def statistics_by_network(known: Known) -> dict[int, dict[str, Statistics]]:
    """The statistics as the networks take them."""
    networks: dict[int, dict[str, Statistics]] = {}
    for (number, norm), (mean, variance) in known.items():
        networks.setdefault(number, {})[norm] = Statistics(mean, variance)
    return networks
