"""Whether a run directory is what its journal says, and mending it if it is not."""

from __future__ import annotations

import os
import secrets
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.commands.verify.repair import Repair, Step
from pipeline.commands.verify.scan import ScanResult, scan
from pipeline.commands.verify.store_check import Problem, SampleSpec, as_dict
from pipeline.config.config import Config
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError
from pipeline.core.events import Note, Sink, ignore
from pipeline.core.files import taken
from pipeline.executors.threads import ThreadExecutor
from pipeline.plan.memory import WORKERS
from pipeline.rundir.lock import RunLock
from pipeline.rundir.paths import journal_path, manifest_path, refuse_links_at_top, store_path
from pipeline.rundir.process_settings import process_settings
from pipeline.store import metadata

# Records, descriptions, chunks: what one round mends brings the next into view. More rounds mend nothing.
_MOST_ROUNDS = 8


@dataclass(frozen=True)
class Report:
    """What `verify` found, and did.

    `found`: all damage at first. `remaining`: what is damaged now. `steps`: what --repair would do first, or has done.
    `iterations_lost`: by them. `stage`, `iteration`: where the run goes on. `checked` of `total` chunks were read;
    `sample` says which. `leftovers`: what a killed run left, or a desktop or file server put there; nothing reads it.
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
    config: Config | None = None,
    share: float | None = None,
    seed: int | None = None,
    repair: bool = False,
    sink: Sink = ignore,
    stop: threading.Event | None = None,
) -> Report:
    """Check everything that a run keeps against its checksums; with `repair`, mend what can be mended.

    `config`: where inputs are now, if they have moved. `share`: read only this share of the chunks, chosen by `seed`.
    Raises ConfigError if there is no run or it is another config's, LockedError while a run works there,
    OtherFormatError for a run of another version, Stopped, StorageError.
    """
    if not (taken(manifest_path(work_dir)) or taken(journal_path(work_dir))):
        raise ConfigError(f"{work_dir}: there is no run here. Give the work_dir of one, or the config that began it.")
    work_dir = work_dir.resolve()
    refuse_links_at_top(work_dir)
    sample = None if share is None else SampleSpec(share, secrets.randbits(32) if seed is None else seed)
    with _lock(work_dir, repair), ThreadExecutor(WORKERS, CancelToken(stop)) as engine:
        first = scan(work_dir, config, sample, engine, sink)
        mending = Repair(engine, sink)
        steps = mending.steps(first)
        if not repair:
            return _report(first, first, steps, False, sample)
        last = first
        done: list[Step] = []
        for _ in range(_MOST_ROUNDS):
            if not steps:
                break
            for step in steps:
                sink(Note(step.text))
                step.take()
            if store_path(work_dir).exists():
                metadata.sync(store_path(work_dir))
            done += steps
            last = scan(work_dir, config, sample, engine, sink)
            steps = mending.steps(last)
    return _report(first, last, done, True, sample)


def _lock(work_dir: Path, repair: bool) -> AbstractContextManager[object]:
    """Keeps runs out, but on a disk that is read-only, where nobody can run. Who only looks needs no room for it."""
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
