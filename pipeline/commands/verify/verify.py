"""The `verify` command: checks a run directory against its journal, and repairs it on request."""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.commands.verify.repair import Step, repair_steps
from pipeline.commands.verify.scan import ScanResult, scan
from pipeline.commands.verify.store_check import Problem, SampleSpec, as_dict
from pipeline.config import AnyConfig
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError
from pipeline.core.events import Note, Sink, ignore
from pipeline.core.files import taken
from pipeline.executors import ThreadExecutor
from pipeline.plan import WORKERS
from pipeline.rundir import RunLock, journal_path, manifest_path, refuse_links_at_top, store_path
from pipeline.rundir.process_settings import process_settings
from pipeline.store import metadata

# Repaired records, removed links and rolled-back stages each bring other damage into view. The bound ends a repair
# whose steps do not help, on a disk that rots faster than it is repaired.
_MAX_ROUNDS = 8


@dataclass(frozen=True)
class Report:
    """The result of `verify`.

    `found`: all damage at first. `remaining`: all damage now. `steps`: those that --repair has taken, or would take
    first; `iterations_lost`: how many iterations have to be computed again after them. `stage`, `iteration`: where the
    run resumes. `leftovers`: files of a killed run, a desktop or a file server, which nothing reads. `checked` of
    `total` chunks were read; `sample` says which.
    """

    work_dir: Path
    found: tuple[Problem, ...]
    remaining: tuple[Problem, ...]
    steps: tuple[str, ...]
    repaired: bool
    iterations_lost: int
    stage: int
    iteration: int
    leftovers: tuple[Path, ...]
    notes: tuple[str, ...]
    checked: int
    total: int
    sample: SampleSpec | None

    @property
    def clean(self) -> bool:
        """Whether nothing is damaged (any more)."""
        return not self.remaining

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return {
            **vars(self),
            "clean": self.clean,
            "work_dir": str(self.work_dir),
            "found": [as_dict(problem) for problem in self.found],
            "remaining": [as_dict(problem) for problem in self.remaining],
            "leftovers": [str(path) for path in self.leftovers],
            "sample": vars(self.sample) if self.sample else None,
        }


@process_settings()
def verify(
    work_dir: Path,
    *,
    config: AnyConfig | None = None,
    sample: SampleSpec | None = None,
    repair: bool = False,
    sink: Sink = ignore,
    stop: threading.Event | None = None,
) -> Report:
    """Check everything that a run stores against its checksums; with `repair`, roll back to the newest intact state.

    `config`: gives the paths of inputs that have moved. `sample`: read only some of the chunks.
    Raises ConfigError if there is no run or it is another config's, LockedError while a run works there,
    OtherFormatError for a run of another version, Stopped, StorageError.
    """
    if not (taken(manifest_path(work_dir)) or taken(journal_path(work_dir))):
        raise ConfigError(f"{work_dir}: there is no run here. Give the work_dir of one, or the config that began it.")
    work_dir = work_dir.resolve()
    refuse_links_at_top(work_dir)
    with _lock(work_dir, repair), ThreadExecutor(WORKERS, CancelToken(stop)) as executor:
        first = last = scan(work_dir, config, sample, executor, sink)
        steps = repair_steps(first, executor)
        if not repair:
            return _report(first, first, steps, False, sample)
        done: list[Step] = []
        for _ in range(_MAX_ROUNDS):
            if not steps:
                break
            for step in steps:
                sink(Note(step.text))
                step.take()
            if store_path(work_dir).exists():  # a repair must survive a power cut whatever store.durability is
                metadata.sync(store_path(work_dir))
            done += steps
            last = scan(work_dir, config, sample, executor, sink)
            steps = repair_steps(last, executor)
    return _report(first, last, done, True, sample)


def _lock(work_dir: Path, repair: bool) -> AbstractContextManager[object]:
    """Locks the run directory. A read-only disk cannot be locked, and needs no lock, because no run can write there."""
    read_only = os.statvfs(work_dir).f_flag & os.ST_RDONLY
    return nullcontext() if read_only else RunLock(work_dir, named=repair)


def _report(
    first: ScanResult, last: ScanResult, steps: list[Step], repaired: bool, sample: SampleSpec | None
) -> Report:
    return Report(
        work_dir=last.work_dir,
        found=tuple(first.problems),
        remaining=tuple(last.problems),
        steps=tuple(step.text for step in steps),
        repaired=repaired,
        iterations_lost=sum(step.iterations_lost for step in steps),
        stage=last.position.stage,
        iteration=last.position.iteration,
        leftovers=tuple(last.leftovers),
        notes=tuple(last.notes),
        checked=last.checked,
        total=last.total,
        sample=sample,
    )
