"""Where a run stands: what the records of its journal add up to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

from pipeline.core.errors import DamagedStateError
from pipeline.core.text import shown
from pipeline.rundir.records import (
    CanvasLost,
    Exported,
    Exporting,
    Iteration,
    Record,
    RolledBack,
    SmallerTile,
    StageDone,
    StagePrepared,
    WrittenPicture,
)
from pipeline.store.checksums import unpacked
from pipeline.store.layout import kept_files


@dataclass(frozen=True)
class Position:
    """Where a run stands: what is committed, and so what comes next.

    `prepared`: stage `stage` has its arrays. `iteration`: the next one; it reads slot `iteration % 2`.
    `alpha`, `mean_abs_u`, `max_abs_u`: of the stage's last iteration, None before its first.
    `stage_done`: the stage ended. `slots`: where the newest canvas of every stage is. `exported`: pictures made, with
    their export options.
    `pictures`: by name, what was written under it, the newest last; None where an older version kept the name alone.
    `checksums`: per stage, of the chunks of its arrays (the newest slot's) and of its metadata files, as checksums.py
    packs them. `tile_px`: the largest tile that the device has room for, None while it is not known to be smaller than
    the plan's.
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
            case StageDone():
                sums = self.checksums[self.stage]
                left = {name: sums[name] for name in kept_files(self.newest_slot, sums)}
                return replace(self, stage_done=True, checksums={**self.checksums, self.stage: left})
            case Exporting() | Exported():
                return self._after_export(record)
            case CanvasLost():
                slots = _without(self.slots, record.stage)
                return replace(self, slots=slots, checksums=_without(self.checksums, record.stage))
            case SmallerTile():
                return replace(self, tile_px=record.tile_px)
        return self

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
        )

    def _after_export(self, record: Exporting | Exported) -> Position:
        made = {record.output: record.options} if isinstance(record, Exported) else {}
        known = [one for one in self.pictures.get(record.output, ()) if one != record.picture]
        if isinstance(record, Exported) and record.picture is not None:  # it has taken the place of any other
            known = [one for one in known if one is not None]
        pictures = {**self.pictures, record.output: (*known, record.picture)}
        return replace(self, exported={**self.exported, **made}, pictures=pictures)

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


def _without(mapping: Mapping[int, Any], key: int) -> dict[int, Any]:
    return {other: value for other, value in mapping.items() if other != key}


# What stays true however far a repair goes back: whose a picture is, which canvas the disk lost, how large a tile fits.
_KEPT_ALWAYS = (Exporting, Exported, CanvasLost, SmallerTile)


def effective(records: Iterable[Record]) -> list[Record]:
    """The records without those that a repair took back; some are never taken back."""
    kept: list[Record] = []
    for record in records:
        if isinstance(record, RolledBack):
            taken = kept[record.records :]
            kept = kept[: record.records] + [one for one in taken if isinstance(one, _KEPT_ALWAYS)]
        else:
            kept.append(record)
    return kept


def position_of(records: Iterable[Record]) -> Position:
    """The resume point that a journal's records describe."""
    return reduce(Position.after, records, Position())


def checked_position(records: Iterable[Record], path: Path) -> Position:
    """The resume point of the records in the journal `path`.

    Raises DamagedStateError for records in an order that no run writes, or with checksums that are none.
    """
    try:
        position = position_of(records)
        for stage, slot in position.slots.items():
            for name in kept_files(slot, position.checksums[stage]):
                position.checksums[stage][name]  # a LookupError where it is not there
            for text in position.checksums[stage].values():
                unpacked(text)[0]  # a ValueError or LookupError where it is no checksum
        return position
    except (LookupError, ValueError) as error:
        raise no_runs_records(path, error) from error


def no_runs_records(path: Path, error: Exception) -> DamagedStateError:
    """The error of a journal whose lines are whole, but hold what no run has written."""
    return DamagedStateError(
        f"{path}: its records are not a run's ({shown(str(error), 200)}), so the state they describe "
        "cannot be trusted. Restore the run directory from a copy, or delete it to render again."
    )
