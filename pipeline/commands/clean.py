"""The `clean` command: deletes the state of a run. Its image, config, manifest and journal stay."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from pipeline.commands.status import manifest_of
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError, storage
from pipeline.rundir import (
    Cleaned,
    Journal,
    Position,
    RunLock,
    is_one_of,
    journal_path,
    now,
    refuse_links,
    refuse_locked,
    refuse_unknown_stage,
    stages_of,
    standing,
    state_bytes,
    store_path,
)


@dataclass(frozen=True)
class Cleaning:
    """What `clean` deletes, or has deleted. `images`: what the run made, which stays."""

    work_dir: Path
    freed_bytes: int
    images: tuple[str, ...]


def clean(
    work_dir: Path,
    *,
    output: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    stop: threading.Event | None = None,
) -> Cleaning:
    """Delete the state of a finished run, from which its images were written.

    `output`: an image that was moved since the run wrote it. `force`: also delete that of a run without an image, whose
    work is lost. `dry_run`: only say what would be deleted. Raises ConfigError if there is no run or it has no image,
    LockedError while it is active, DamagedStateError and Stopped.
    """
    work_dir, cancel = work_dir.absolute(), CancelToken(stop)
    manifest_of(work_dir)
    refuse_locked(work_dir)
    journal = Journal(journal_path(work_dir))
    if dry_run:
        return _checked(work_dir, standing(journal)[1], output, force, cancel)
    # named: False, because a full disk must not prevent what frees it
    with storage(work_dir), RunLock(work_dir, named=False):
        position = standing(journal)[1]
        cleaning = _checked(work_dir, position, output, force, cancel)
        refuse_links(work_dir)
        cancel.raise_if_set()
        if position.slots:
            # the record first: after a crash the store is incomplete, and must not be read as a damaged one
            journal.repair_tail()
            journal.append(Cleaned(time=now()))
        if store_path(work_dir).exists():
            shutil.rmtree(store_path(work_dir))
    return cleaning


def _checked(work_dir: Path, position: Position, output: Path | None, force: bool, cancel: CancelToken) -> Cleaning:
    """Raise ConfigError for a run that would lose its work."""
    manifest = manifest_of(work_dir)
    refuse_unknown_stage(work_dir, manifest, position)
    paths = dict.fromkeys([*map(Path, sorted(position.exported)), *([] if output is None else [output])])
    images = tuple(str(path) for path in paths if is_one_of(path, position.results, cancel))
    finished = position.stage_done and position.stage == len(stages_of(manifest, position)) - 1
    lost = _lost_panels(position, output, cancel)
    if not (force or position.cleaned or (finished and images and not lost)):
        cause = "it is not finished"
        if finished:
            where = " and ".join(map(str, lost)) or " or ".join(map(str, paths)) or manifest.config.output
            cause = f"its image is not, or no longer, at {where}"
        raise ConfigError(
            f"{work_dir}: {cause}, and without the state all its work would be lost. Write it with `pipeline run`, or "
            "give --force."
        )
    return Cleaning(work_dir, state_bytes(work_dir), images)


def _lost_panels(position: Position, output: Path | None, cancel: CancelToken) -> list[Path]:
    """The panels of the newest export that are not there, or were never written. `output`: they may be beside it."""
    if len(position.newest_export) < 2:
        return []
    moved = [] if output is None else [output.parent]
    return [
        path
        for path, written in position.newest_export.items()
        if not written
        or not any(is_one_of(folder / path.name, position.results, cancel) for folder in (path.parent, *moved))
    ]
