"""Commits of a run: records appended to its journal, and the iterations of a stage in memory, gathered into one record.

An iteration that reads slot j % 2 writes the other one, in memory as on the disk. What the journal says is on the disk
must not be overwritten, so an odd number of iterations lies between two commits; where the end of a stage, or a stop,
makes it even, the last but one is committed first: it is still in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.config import AnyConfig, OptimizerConfig
from pipeline.core.errors import DamagedStateError, StorageError
from pipeline.rundir import Journal, Position, now, records, store_path
from pipeline.store import ResidentStage, is_averaged, metadata, slot_names

if TYPE_CHECKING:
    from pipeline.render.stage import Stage


@dataclass
class Commits:
    """The journal of a run or of `apply`, and its `position`: with the iterations that are not committed yet."""

    config: AnyConfig
    journal: Journal
    position: Position
    _stage: ResidentStage | None = None
    _waiting: list[records.Iteration] = field(default_factory=list)
    _last_s: float = 0.0

    @contextmanager
    def in_memory(self, stage: Stage) -> Iterator[None]:
        """Inside, the stage is in memory; when the block is left, by an error too, what is done is committed.

        Raises ChunkError, StorageError, DeviceMemoryError.
        """
        from pipeline.render.residency import resident  # noqa: PLC0415 - brings torch

        at, index = self.position, stage.plan.index
        if end_reason(at, stage.config.optimizer) is not None:
            yield
            return
        with resident(stage, at.newest_slot, at.checksums[index]) as held:
            self._stage, self._last_s = held, time.monotonic()
            try:
                yield
                self.flush()
            except (StorageError, DamagedStateError):
                raise  # the last commit is what there is
            except Exception:
                self.flush()
                raise
            finally:
                self._stage = None
                self._waiting.clear()

    def add(self, record: records.Iteration) -> None:
        """An iteration is complete: commit it, or, of a stage in memory, commit all that wait if it is time."""
        if self._stage is None:
            self.commit(record)
            return
        self._waiting.append(record.model_copy(update={"time": now()}))
        self.position = self.position.after(record)
        if len(self._waiting) % 2 and time.monotonic() - self._last_s >= self.config.store.commit_interval:
            self.flush()

    def commit(self, record: records.Record) -> None:
        """Commit a record, and the iterations before it. Raises StorageError, DamagedStateError."""
        self.flush()
        self._append(record)
        self.position = self.position.after(record)

    def flush(self) -> None:
        """Commit the iterations that wait."""
        if self._waiting and len(self._waiting) % 2 == 0:
            *earlier, last = self._waiting
            self._commit_waiting(earlier)
            self._waiting = [last]
        if self._waiting:
            self._commit_waiting(self._waiting)
            self._waiting = []

    def _commit_waiting(self, waiting: list[records.Iteration]) -> None:
        """Write the arrays of the last of `waiting`, an odd number of iterations, and commit all."""
        *earlier, last = waiting
        before = tuple(map(records.measured_alone, earlier))
        checksums = self._written(last) if last.stepped else {}
        self._append(last.model_copy(update={"before": before, "checksums": checksums}))
        # the journal knows them now, and a later read from the disk needs them
        stage = {**self.position.checksums[last.stage], **checksums}
        self.position = self.position.with_checksums(last.stage, stage)
        self._last_s = time.monotonic()

    def _written(self, record: records.Iteration) -> Mapping[str, str]:
        assert self._stage is not None
        averaged = is_averaged(self.position.checksums[record.stage])
        return self._stage.write(slot_names((record.iteration + 1) % 2, averaged=averaged), record.checksums)

    def _append(self, record: records.Record) -> None:
        has_pixels = isinstance(record, records.StagePrepared | records.Iteration | records.Pass)
        # the chunks must be on the disk before the record that commits them
        if has_pixels and self.config.store.durability == "power":
            metadata.sync(store_path(self.config.work_dir))
        self.journal.append(record.model_copy(update={"time": now()}))


def end_reason(position: Position, settings: OptimizerConfig) -> str | None:
    """Why the stage ends at this position, or None if it continues."""
    if position.max_abs_u == 0:
        return "converged"
    if position.mean_abs_u is not None and position.mean_abs_u < settings.stop_condition:
        return "stop_condition"
    return "max_iterations" if position.iteration >= settings.max_iterations else None
