"""Reads a run directory that another process may be writing: what is committed now, without a lock.

The journal is the only source. When the file has changed, what was added is read. A run directory that is missing,
damaged or being repaired is a state that the page shows, not an error: the next read may find it well.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.text import shown
from pipeline.rundir import (
    FollowedJournal,
    Manifest,
    Position,
    Record,
    journal_path,
    manifest_path,
    read_manifest,
    refuse_links,
    refuse_unknown_stage,
    running_owner,
    stages_of,
)


@dataclass(frozen=True)
class Snapshot:
    """What the run directory holds. `problem`: why it cannot be read; the other fields are then the last ones read.

    `number` grows with every change. `manifest` is None before the run begins. `repairs`: the records of repairs that
    rolled others back. `owner`: the process id of the run.
    """

    number: int = 0
    manifest: Manifest | None = None
    records: Sequence[Record] = ()
    repairs: Sequence[Record] = ()
    position: Position = field(default_factory=Position)
    owner: int | None = None
    problem: str = ""


class RunReader:
    """Gives the newest snapshot of a run directory. Safe to use from any thread."""

    def __init__(self, work_dir: Path) -> None:
        self.work_dir = work_dir
        self._lock = threading.Lock()
        self._journal = FollowedJournal(journal_path(work_dir))
        self._seen: object = None
        self._links_checked: object = None
        self._latest = Snapshot()

    def latest(self) -> Snapshot:
        """The newest snapshot; the same object while nothing has changed."""
        with self._lock:
            seen = self._times()  # before reading: a record that follows is then read the next time
            owner = running_owner(self.work_dir)
            if seen != self._seen:
                self._latest = replace(self._read(), number=self._latest.number + 1, owner=owner)
                self._seen = seen
            elif owner != self._latest.owner:
                self._latest = replace(self._latest, number=self._latest.number + 1, owner=owner)
            return self._latest

    def read_again(self) -> Snapshot:
        """The newest snapshot, read even if the journal looks unchanged: a chunk did not fit its checksum."""
        with self._lock:
            self._seen = None
        return self.latest()

    def _times(self) -> tuple[object, ...]:
        times: list[object] = []
        for path in (manifest_path(self.work_dir), journal_path(self.work_dir)):
            try:
                status = path.stat(follow_symlinks=False)
            except OSError as error:
                times.append(error.errno)
            else:
                times.append((status.st_size, status.st_mtime_ns, status.st_ino))
        return tuple(times)

    def _read(self) -> Snapshot:
        try:
            if not manifest_path(self.work_dir).exists():
                return Snapshot()
            manifest = read_manifest(manifest_path(self.work_dir))
            records, position = self._journal.standing()
            refuse_unknown_stage(self.work_dir, manifest, position)
            if (stages := (position.stage, position.prepared)) != self._links_checked:
                refuse_links(self.work_dir)  # of a stranger's run: a link could lead to files outside
                self._links_checked = stages
            # with the stages that were added since the run began
            manifest = manifest.model_copy(update={"stages": tuple(stages_of(manifest, position))})
            return Snapshot(manifest=manifest, records=records, repairs=self._journal.repairs, position=position)
        except (PipelineError, OSError) as error:
            return replace(self._latest, problem=shown(str(error), 500))
