"""The position of a run: the state that the records of its journal describe, from which it resumes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.errors import DamagedStateError
from pipeline.core.text import shown
from pipeline.plan import whole_of
from pipeline.rundir.records import (
    CanvasLost,
    Cleaned,
    Exported,
    Exporting,
    Iteration,
    Pass,
    Record,
    RolledBack,
    SmallerTile,
    StageAdded,
    StageDone,
    StagePrepared,
    WrittenPicture,
)
from pipeline.store import kept_files, other_slot, unpacked

K = TypeVar("K")


@dataclass(frozen=True)
class Position:
    """What is committed, and so what comes next.

    `prepared`: stage `stage` has its arrays. `iteration`: the next one; it reads slot `iteration % 2`.
    `mean_abs_u`, `max_abs_u`: of the stage's last iteration, None before its first. `alpha`: likewise, but carried from
    the stage before if the stage continues it, like `adam_steps`, the number of Adam's steps before the stage.
    `carrying`: the stages that keep m and v when they have ended. `stage_done`: the stage ended. `slots`: the slot of
    the newest canvas of every stage. `exported`: the export options of every output image, the
    newest last. `pictures`: by path, the
    images written there, the newest last; None where an older version recorded the path alone. `checksums`: per stage,
    packed as in checksums.py, of the chunks of its arrays (the newest slot's) and of its metadata files. `tile_px`: the
    largest tile that fits in the device's memory, None while tiles of the plan have fitted. `added`: the iterations of
    each stage that was added after the planned ones. `cleaned`: the state was deleted, so that no stage has a slot.
    `statistics`: of `apply`, mean and variance by channel of each (number of a network, norm).
    """

    stage: int = 0
    prepared: bool = False
    iteration: int = 0
    alpha: float | None = None
    mean_abs_u: float | None = None
    max_abs_u: float | None = None
    content_energies: Mapping[str, float] = field(default_factory=dict)
    areas: Mapping[str, float] = field(default_factory=dict)
    stage_done: bool = False
    slots: Mapping[int, int] = field(default_factory=dict)
    exported: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    pictures: Mapping[str, tuple[WrittenPicture | None, ...]] = field(default_factory=dict)
    checksums: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    tile_px: int | None = None
    adam_steps: int = 0
    carrying: frozenset[int] = frozenset()
    added: tuple[int, ...] = ()
    cleaned: bool = False
    statistics: Mapping[tuple[int, str], tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)

    @property
    def is_fixed(self) -> bool:
        """Whether the run has rendered, so that its config and inputs can no longer change."""
        return bool(self.slots) or self.cleaned

    @property
    def results(self) -> tuple[WrittenPicture, ...]:
        """The images of the last canvas, whatever their names are now."""
        newest = (self.pictures[output][-1] for output in self.exported)
        return tuple(picture for picture in newest if picture is not None)

    @property
    def newest_export(self) -> dict[Path, bool]:
        """Whether each output image of the newest export is written: one, or all panels. Empty if none is."""
        if not self.exported:
            return {}
        newest, options = list(self.exported.items())[-1]
        panels = options is not None and (options.get("panels") or {}).get("width") is not None
        paths = whole_of(Path(newest))[1] if panels else (Path(newest),)
        return {path: str(path) in self.exported and self.exported[str(path)] == options for path in paths}

    @property
    def newest_slot(self) -> int:
        """The slot of the current stage that holds its newest canvas, m and v."""
        return self.slots[self.stage]

    def after(self, record: Record) -> Position:  # noqa: PLR0911 - one for each kind
        """The position once `record` is committed."""
        match record:
            case Iteration():
                return self._after_iteration(record)
            case StagePrepared():
                return self._after_preparation(record)
            case Pass():
                return self._after_pass(record)
            case StageDone():
                sums = self.checksums[self.stage]
                moments = self.stage in self.carrying
                retained = {name: sums[name] for name in kept_files(self.newest_slot, sums, moments=moments)}
                return replace(self, stage_done=True, checksums={**self.checksums, self.stage: retained})
            case Exporting() | Exported():
                return self._after_export(record)
            case CanvasLost():
                slots = _without(self.slots, record.stage)
                return replace(self, slots=slots, checksums=_without(self.checksums, record.stage))
            case SmallerTile():
                return replace(self, tile_px=record.tile_px)
            case StageAdded():  # its canvas is still to be exported; the images stay this run's
                return replace(self, added=(*self.added, record.iterations), exported={})
            case Cleaned():
                return replace(self, cleaned=True, slots={}, checksums={})
        return self

    def with_checksums(self, stage: int, checksums: Mapping[str, str]) -> Position:
        """The position with these checksums of a stage's arrays and metadata."""
        return replace(self, checksums={**self.checksums, stage: checksums})

    def _after_preparation(self, record: StagePrepared) -> Position:
        return Position(
            stage=record.stage,
            prepared=True,
            content_energies=record.content_energies,
            areas=record.areas,
            slots={**self.slots, record.stage: 0},
            exported=self.exported,
            pictures=self.pictures,
            checksums={**self.checksums, record.stage: record.checksums},
            tile_px=self.tile_px,
            alpha=record.alpha,
            adam_steps=record.adam_steps,
            added=self.added,
            carrying=self.carrying | {record.stage} if record.carries else self.carrying - {record.stage},
        )

    def _after_export(self, record: Exporting | Exported) -> Position:
        earlier = [image for image in self.pictures.get(record.output, ()) if image != record.picture]
        pictures = {**self.pictures, record.output: (*earlier, record.picture)}
        if not isinstance(record, Exported):
            return replace(self, pictures=pictures)
        if record.picture is not None:  # it has replaced the image of unknown hash
            pictures[record.output] = tuple(image for image in pictures[record.output] if image is not None)
        exported = {**_without(self.exported, record.output), record.output: record.options}
        return replace(self, exported=exported, pictures=pictures)

    def _after_iteration(self, record: Iteration) -> Position:
        iteration = record.iteration + record.stepped
        return replace(
            self,
            iteration=iteration,
            alpha=record.alpha,
            mean_abs_u=record.mean_abs_u,
            max_abs_u=record.max_abs_u,
            slots={**self.slots, self.stage: iteration % 2},
            checksums={**self.checksums, self.stage: {**self.checksums[self.stage], **record.checksums}},
        )

    def _after_pass(self, record: Pass) -> Position:
        # the next pass overwrites the slots that this one has made superfluous
        freed = {other_slot(name) for name in record.checksums}
        sums = {name: value for name, value in self.checksums[self.stage].items() if name not in freed}
        position = replace(
            self,
            iteration=record.iteration + 1,
            checksums={**self.checksums, self.stage: {**sums, **record.checksums}},
        )
        if record.norm is not None:
            measured = {(record.network, record.norm): (tuple(record.mean), tuple(record.variance))}
            return replace(position, statistics={**self.statistics, **measured})
        return replace(position, slots={**self.slots, self.stage: int("canvas_1" in record.checksums)})


def _without(mapping: Mapping[K, Any], key: K) -> dict[K, Any]:
    return {other: value for other, value in mapping.items() if other != key}


# A rollback keeps these, which do not depend on the position: which images are the run's, which canvases were given up,
# which tile fits in memory, and which stages were added.
_NEVER_ROLLED_BACK = (Exporting, Exported, CanvasLost, SmallerTile, StageAdded)


def effective(records: Iterable[Record], before: Iterable[Record] = ()) -> list[Record]:
    """The records after those `before`, without those that a repair rolled back."""
    retained = list(before)
    for record in records:
        if isinstance(record, RolledBack):
            discarded = retained[record.records :]
            retained = retained[: record.records]
            retained += [other for other in discarded if isinstance(other, _NEVER_ROLLED_BACK)]
        else:
            retained.append(record)
    return retained


def position_of(records: Iterable[Record], start: Position | None = None) -> Position:
    """The position after these records, which follow `start`."""
    return reduce(Position.after, records, start or Position())


def checked_position(records: Iterable[Record], path: Path, start: Position | None = None) -> Position:
    """The position after the records of the journal `path` that follow `start`.

    Raises DamagedStateError for records in an order that no run writes, or with invalid checksums.
    """
    try:
        position = position_of(records, start)
        for stage, slot in position.slots.items():
            for name in kept_files(slot, position.checksums[stage], moments=stage in position.carrying):
                position.checksums[stage][name]  # raises LookupError if it is missing
            for text in position.checksums[stage].values():
                unpacked(text)[0]  # raises ValueError or LookupError if it is not a checksum
        return position
    except (LookupError, ValueError) as error:
        raise no_runs_records(path, error) from error


def no_runs_records(path: Path, error: Exception) -> DamagedStateError:
    """The error of a journal whose lines are intact, but not records of a run."""
    return DamagedStateError(
        f"{path}: its records are not a run's ({shown(str(error), 200)}), so the state they describe "
        "cannot be trusted. Restore the run directory from a copy, or delete it to render again."
    )
