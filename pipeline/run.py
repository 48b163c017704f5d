"""The coarse-to-fine loop and its resume. No maths here: stage.py and the passes below it do the work."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import integrity, store, transfer, zarr_files
from pipeline.allocator import return_freed_memory
from pipeline.arrays import slot_names
from pipeline.config import Config, OptimizerConfig, result_fields
from pipeline.cost import WORKERS, model_of
from pipeline.device import Device, default_threads, resolve_device
from pipeline.engine import Engine
from pipeline.errors import ConfigError, DamagedStateError, DeviceMemoryError, storage
from pipeline.journal import Journal, Position, Record, RunLock, standing
from pipeline.layers import ceil_to
from pipeline.manifest import FORMAT, begun_manifest, read_manifest, trusted_manifest, write_manifest
from pipeline.places import refuse_links, store_path, taken
from pipeline.plan import Plan, StagePlan
from pipeline.progress import IterationDone, Note, RunDone, Sink, StageDone, StageStarted, WorkDone, ignore
from pipeline.survey import check_space, make_work_dir, plan_on
from pipeline.weights import NetworkSpec, WeightsSource, find_weights, sha256_of

if TYPE_CHECKING:
    from pipeline.iteration import IterationResult
    from pipeline.stage import Stage


def run(config: Config, *, force: bool = False, sink: Sink = ignore, stop: threading.Event | None = None) -> Path:
    """Render the picture of `config`, or go on where an earlier run of the same config stopped; gives its path.

    `force`: overwrite an output that this run did not make. `stop`: set it from anywhere to stop between two tasks.
    Raises the errors of errors.py; after Stopped, or any crash, the same call goes on.
    """
    started = time.monotonic()
    return_freed_memory()
    with storage(config.work_dir), ExitStack() as held:
        begun = config.work_dir.exists()
        if begun:  # before all that takes long: a second run is told at once
            lock = held.enter_context(_locked(config.work_dir))
        device = resolve_device(config.compute.device)
        planned = plan_on(config, device)
        if not begun:  # after all that may be refused: then nothing was made
            lock = held.enter_context(_locked(config.work_dir))
        # inside the lock: its tasks have ended before another run may begin
        engine = held.enter_context(_engine(config, lock, sink, stop))
        refuse_links(config.work_dir)
        check = engine.raise_if_stopped
        weights = find_weights(config.network.name, config.network.weights, config.seed, sink, check)
        journal = _open_run(config, planned, weights, check)
        rendering = _Rendering(config, planned, device, weights, engine, sink, journal)
        rendering.refuse_foreign_output(force)
        rendering.render()
        rendering.export()
    sink(RunDone(str(config.output), time.monotonic() - started))
    return config.output


def _locked(work_dir: Path) -> RunLock:
    make_work_dir(work_dir)
    return RunLock(work_dir)


def _engine(config: Config, lock: RunLock, sink: Sink, stop: threading.Event | None) -> Engine:
    """The threads of this process, or worker processes."""
    if config.compute.workers == 0:
        return Engine(WORKERS, stop)
    from pipeline.engine_processes import ProcessEngine  # noqa: PLC0415 - brings distributed, for this case only

    return ProcessEngine(config.compute.workers, WORKERS, stop, lock.descriptor, lambda message: sink(Note(message)))


def stage_path(work_dir: Path, stage: int) -> Path:
    """The Zarr group of one stage."""
    return store_path(work_dir) / f"stage_{stage}"


def newest_canvas(work_dir: Path, position: Position, stage: int) -> store.StageArray:
    """The canvas of `stage` after its last committed iteration; it checks itself. Raises ChunkError."""
    folder, checksums = stage_path(work_dir, stage), position.checksums[stage]
    name, *_ = slot_names(position.slots[stage])
    # A description that was changed may still describe: another height, or integers for the same bytes.
    zarr_files.check_metadata(folder, f"{name}/{store.METADATA}", checksums[f"{name}/{store.METADATA}"])
    return store.open_array(folder, name, checksums[name])


def journal_path(work_dir: Path) -> Path:
    """The journal of a run."""
    return work_dir / "journal.jsonl"


def manifest_path(work_dir: Path) -> Path:
    """The manifest of a run."""
    return work_dir / "manifest.json"


def _open_run(config: Config, planned: Plan, weights: WeightsSource, check: Callable[[], None]) -> Journal:
    """The journal of the run directory; begins a run there, or checks that it is the run of this config.

    `check` is called while files are read, and may raise to give up.
    Raises ConfigError listing every field whose change would change the picture, SpaceError.
    """
    journal = Journal(journal_path(config.work_dir))
    path = manifest_path(config.work_dir)
    wanted: dict[str, dict[str, Any]] = {
        "result_fields": result_fields(config),
        "inputs": {
            "content": sha256_of(config.content, check),
            **{f"styles.{index}.image": sha256_of(style.image, check) for index, style in enumerate(config.styles)},
            "network.weights": weights.sha256,
        },
    }
    records, position = standing(journal)
    if position.slots:
        refuse_changes(config, trusted_manifest(path, records), wanted)
        journal.repair_tail()
        return journal
    if lost_its_stages(config.work_dir, records):
        raise DamagedStateError(
            f"{journal.path}: holds no stage, but {store_path(config.work_dir)} does, which would be rendered again. "
            "Restore the journal from a copy, or begin again: `pipeline verify --repair` sets the store aside."
        )
    check_space(config, planned, 0)
    # Nothing is prepared yet, so a config or an image that was corrected after an error is no change. The manifest
    # comes before the store: a folder that holds anything without one is taken for somebody else's.
    journal.repair_tail()
    stages = [{"size": stage.size, "style_sizes": stage.style_sizes} for stage in planned.stages]
    compute = config.compute
    manifest = {
        "format": FORMAT,
        "created": now(),
        "config": config.model_dump(mode="json"),
        "stages": stages,
        "threads": default_threads(compute.workers) if compute.threads == "auto" else compute.threads,
        **wanted,
    }
    if not (_same_manifest(begun_manifest(records), manifest) and _same_manifest(_manifest_at(path), manifest)):
        write_manifest(path, manifest)
        journal.append({"type": "begun", "manifest": manifest})
    store.create_store(store_path(config.work_dir))
    return journal


def lost_its_stages(work_dir: Path, records: Sequence[Record]) -> bool:
    """Whether a journal that holds no stage once held some: `begun` comes before the store, a stage before the next."""
    begun = begun_manifest(records) is not None
    return stage_path(work_dir, 1).exists() or (not begun and store_path(work_dir).exists())


def _manifest_at(path: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(path)
    except DamagedStateError:
        return None


def _same_manifest(found: Mapping[str, Any] | None, manifest: Mapping[str, Any]) -> bool:
    """Whether they are the same, but for the time."""
    return found is not None and found == {**json.loads(json.dumps(manifest)), "created": found["created"]}


def refuse_changes(config: Config, manifest: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ConfigError with every field of `wanted` that differs from the manifest."""
    changes: list[str] = []
    for section, what in (("result_fields", "value"), ("inputs", "content of the file")):
        old, new = manifest[section], wanted[section]
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                was = f" was {old.get(key)}, is {new.get(key)}" if what == "value" else f" the {what} has changed"
                changes.append(f"  {key}:{was}")
    if changes:
        raise ConfigError(
            f"{config.work_dir} holds a run of another config, and going on would mix two pictures. Changed:\n"
            + "\n".join(changes)
            + "\nPut these back, or give the new config its own work_dir, or delete the old one."
        )


@dataclass(frozen=True)
class Tools:
    """What computes a stage, whichever it is."""

    device: Device
    weights: WeightsSource
    engine: Engine
    sink: Sink


def make_stage(config: Config, plan: StagePlan, tools: Tools, tile_px: int) -> Stage:
    """A stage of the run of `config`, ready to be prepared or iterated in tiles of `tile_px`."""
    from pipeline.stage import Stage  # noqa: PLC0415 - brings torch, which export and status do without

    network = NetworkSpec(
        tools.weights,
        config.network.padding,
        config.network.pooling,
        config.compute.dtype,
        tools.device.name,
        _threads(config),
    )
    return Stage(
        config=config,
        plan=plan,
        model=model_of(config, tools.weights.widths),
        network=network,
        stage_dir=stage_path(config.work_dir, plan.index),
        engine=tools.engine,
        sink=tools.sink,
        tile_px=tile_px,
    )


def _threads(config: Config) -> int:
    """CPU threads of one tile: those that the run began with, because other numbers of them round otherwise."""
    asked = config.compute.threads
    return int(read_manifest(manifest_path(config.work_dir))["threads"]) if asked == "auto" else asked


@dataclass
class _Rendering:
    """One process's share of a run: everything it holds, and the position it has reached."""

    config: Config
    plan: Plan
    device: Device
    weights: WeightsSource
    engine: Engine
    sink: Sink
    journal: Journal
    position: Position = field(init=False)
    _speed: _Speed = field(init=False)

    def __post_init__(self) -> None:
        _, self.position = standing(self.journal)
        self._speed = _Speed()

    def refuse_foreign_output(self, force: bool) -> None:
        """Raise ConfigError if the output exists and this run did not make it."""
        output = self.config.output
        if taken(output) and str(output) not in self.position.claimed and not force:
            raise ConfigError(
                f"output {output}: exists, and this run did not make it; it would be lost. "
                "Move it away, choose another output, or give --force."
            )

    def render(self) -> None:
        """Every stage that is not done yet."""
        if self.position.prepared:
            self.sink(Note(f"going on at stage {self.position.stage}, iteration {self.position.iteration}"))
        for stage_plan in self.plan.stages[self.position.stage :]:
            if self.position.stage_done and self.position.stage == stage_plan.index:
                self._free_arrays(stage_plan.index)
                continue
            self._render_stage(stage_plan)

    def _render_stage(self, stage_plan: StagePlan) -> None:
        """One stage, in smaller tiles where the device has no memory for those of the plan."""
        chunk_px = self.config.store.chunk_px
        longest = ceil_to(max(*stage_plan.size, *chain.from_iterable(stage_plan.style_sizes)), chunk_px)
        while True:
            tile_px = min(self.position.tile_px or longest, self.plan.tile_px, longest)
            try:
                self._render_in_tiles(stage_plan, tile_px)
                return
            except DeviceMemoryError:
                if tile_px == chunk_px:
                    raise
            gc.collect()  # the error is gone now, but its frames hold the tile's tensors, and each other
            smaller = max(chunk_px, tile_px // 2 // chunk_px * chunk_px)
            # recorded: the bits depend on the tiles, and a resume must take the same
            self._commit({"type": "smaller_tile", "tile_px": smaller})
            told = f"{self.device.name} has no memory for tiles of {tile_px} px"
            self.sink(Note(f"{told}: going on with tiles of {smaller} px, from the last iteration"))

    def _render_in_tiles(self, stage_plan: StagePlan, tile_px: int) -> None:
        # these bring torch, which export and status do without
        from pipeline.iteration import Iterations  # noqa: PLC0415
        from pipeline.preparation import prepare  # noqa: PLC0415

        index, settings = stage_plan.index, self.config.optimizer
        tools = Tools(self.device, self.weights, self.engine, self.sink)
        stage = make_stage(self.config, stage_plan, tools, tile_px)
        iteration = self.position.iteration if self.position.stage == index else 0
        stages, (height, width) = len(self.plan.stages), stage_plan.size
        prepared = self.position.prepared and self.position.stage == index
        in_place = prepared and self.config.store.codec == "none"  # it has its room already, and writes nowhere else
        check_space(self.config, self.plan, index + in_place)
        self.sink(StageStarted(index, stages, height, width, len(stage.tiles), iteration, settings.max_iterations))
        if not prepared:
            previous = newest_canvas(self.config.work_dir, self.position, index - 1) if index else None
            made = vars(prepare(stage, previous))
            self._commit({"type": "stage_prepared", "stage": index, "tile_px": stage.tile_px, **made})
        elif end_reason(self.position, settings) is None:
            stage.check(self.position.newest_slot, self.position.checksums[index])
        iterations = Iterations(stage, self.position.content_energies)
        while (reason := end_reason(self.position, settings)) is None:
            self.engine.raise_if_stopped()
            commit = partial(self._commit_iteration, stage_plan, self.position.iteration)
            iterations.iterate(self.position.iteration, self.position.alpha, self.position.checksums[index], commit)
        self._commit({"type": "stage_done", "stage": index, "iterations": self.position.iteration, "reason": reason})
        self._free_arrays(index)
        self.sink(StageDone(index, self.position.iteration, reason))

    def _commit_iteration(self, stage_plan: StagePlan, iteration: int, result: IterationResult) -> bool:
        """Gives whether another iteration follows."""
        self._commit({"type": "iteration", "stage": stage_plan.index, "iteration": iteration, **vars(result)})
        self._speed.add(stage_plan.flop_per_iteration, sum(result.seconds.values()))
        self.sink(
            IterationDone(
                stage=stage_plan.index,
                iteration=iteration,
                max_iterations=self.config.optimizer.max_iterations,
                objective=result.objective,
                content_loss=result.content_loss,
                style_loss=result.style_loss,
                mean_abs_u=result.mean_abs_u,
                max_abs_u=result.max_abs_u,
                alpha=result.alpha,
                seconds=result.seconds,
                busy=result.busy,
                eta_s=self._speed.seconds_for(self._remaining_flop(stage_plan.index)),
            )
        )
        return end_reason(self.position, self.config.optimizer) is None

    def _remaining_flop(self, index: int) -> int:
        """Work to the end if no stage stops early."""
        full = self.config.optimizer.max_iterations
        here = self.plan.stages[index].flop_per_iteration * (full - self.position.iteration)
        return here + sum(stage.flop_per_iteration * full for stage in self.plan.stages[index + 1 :])

    def export(self) -> None:
        """The last stage's canvas, as the picture asked for; not again if it stands there already."""
        output, options = self.config.output, self.config.export.model_dump(mode="json")
        if self.position.exported.get(str(output)) == options and output.exists():
            self.sink(Note(f"{output} is already there"))
            return
        check_space(self.config, self.plan, len(self.plan.stages))
        if str(output) not in self.position.claimed:
            # Before the picture gets its name: a crash between that and the record would leave one that nobody made.
            self._commit({"type": "exporting", "output": str(output)})
        last = self.plan.stages[-1].index
        canvas = newest_canvas(self.config.work_dir, self.position, last)
        integrity.require_intact(
            [canvas], self.engine, lambda done, total: self.sink(WorkDone(last, "check", done, total))
        )
        transfer.export_canvas(
            canvas,
            output,
            self.config.export,
            self.engine.raise_if_stopped,
            lambda done, total: self.sink(WorkDone(last, "export", done, total)),
        )
        self._commit({"type": "exported", "output": str(output), "options": options})

    def _free_arrays(self, stage: int) -> None:
        keep = {f"canvas_{self.position.slots[stage]}"}
        store.delete_arrays(stage_path(self.config.work_dir, stage), keep)

    def _commit(self, record: Record) -> None:
        if "checksums" in record and self.config.store.durability == "power":
            store.sync(store_path(self.config.work_dir))
        self.journal.append({**record, "time": now()})
        self.position = self.position.after(record)


def end_reason(position: Position, settings: OptimizerConfig) -> str | None:
    """Why the stage ends at this position, or None if it goes on. Once it ends, only its newest canvas is needed."""
    if position.max_abs_u == 0:
        return "converged"
    if position.mean_abs_u is not None and position.mean_abs_u < settings.stop_condition:
        return "stop_condition"
    return "max_iterations" if position.iteration >= settings.max_iterations else None


class _Speed:
    """Seconds per floating-point operation, as measured so far in this process."""

    def __init__(self) -> None:
        self._flop = 0.0
        self._seconds = 0.0
        self._warm = False

    def add(self, flop: int, seconds: float) -> None:
        if not self._warm:  # the first iteration loads weights and compiles kernels
            self._warm = True
            return
        # older iterations count less: they were of smaller stages, where overheads weigh more
        self._flop, self._seconds = self._flop * 0.8 + flop, self._seconds * 0.8 + seconds

    def seconds_for(self, flop: int) -> float | None:
        return flop * self._seconds / self._flop if self._flop else None


def now() -> str:
    """The time for records, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
