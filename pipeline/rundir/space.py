"""Disk space and free file entries (inodes): how much a run still needs, and whether the disks have it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import AnyConfig
from pipeline.core.errors import SpaceError
from pipeline.core.text import size_text, stage_name
from pipeline.plan import Plan
from pipeline.rundir.paths import store_path

_BLOCK_BYTES = 4096  # of nearly every file system
_METADATA_FILES = 64  # per stage: one for each array, and the style targets


@dataclass(frozen=True)
class DiskSpace:
    """Disk space: bytes, and the number of files and folders."""

    bytes: int
    files: int


def check_space(config: AnyConfig, planned: Plan, stage: int) -> None:
    """Raise SpaceError if the disks lack space for what is written from `stage` on, or, after the last, for the image.

    Files that the run already has count as space: when a stage starts, earlier ones have freed all but their result,
    and it reuses the files of an interrupted preparation.
    """
    later = planned.stages[stage:]
    used = space_taken(config.work_dir)
    results = [_array_space(plan.kept_bytes + plan.overviews_bytes, plan.kept_chunks) for plan in planned.stages]
    peak = after = DiskSpace(0, 0)
    if later:
        after = _missing(results, used)
        stages = [_array_space(plan.store_bytes + plan.overviews_bytes, plan.store_chunks) for plan in later]
        peaks = [_missing([*results[: plan.index], space], used) for plan, space in zip(later, stages, strict=True)]
        peak = DiskSpace(max(need.bytes for need in peaks), max(need.files for need in peaks))
    what = f"rendering from {stage_name(stage)} on" if later else "the output image"
    image_bytes = planned.output_bytes + planned.levels_bytes
    if _device_of(config.work_dir) == _device_of(config.output.parent):
        _require(config.work_dir, DiskSpace(max(peak.bytes, after.bytes + image_bytes), peak.files), what)
    else:
        _require(config.work_dir, peak, what)
        _require(config.output.parent, DiskSpace(image_bytes, 0), "the output image")


def _array_space(array_bytes: int, chunks: int) -> DiskSpace:
    """The space of arrays of this size. Every chunk is a file in a folder of its own, which takes a block."""
    return DiskSpace(array_bytes + (chunks + _METADATA_FILES) * _BLOCK_BYTES, 3 * chunks + _METADATA_FILES)


def _missing(needs: Sequence[DiskSpace], used: DiskSpace) -> DiskSpace:
    """The sum of `needs` less the space that is already `used` for them."""
    need_bytes, need_files = sum(need.bytes for need in needs), sum(need.files for need in needs)
    return DiskSpace(max(0, need_bytes - used.bytes), max(0, need_files - used.files))


def _require(folder: Path, need: DiskSpace, what: str) -> None:
    """Raise SpaceError if the disk of `folder` lacks the space that `what` needs."""
    disk, free_bytes = os.statvfs(existing_parent(folder)), free_space(folder)
    remedy = (
        "and the run would stop half-way. Nothing that was committed is lost. Free disk space, or put work_dir or "
        "output on another disk, and run the same command again; or choose a smaller size."
    )
    if need.bytes > free_bytes:
        raise SpaceError(
            f"{folder}: {what} still needs {size_text(need.bytes)} here, but {size_text(free_bytes)} are free, {remedy}"
        )
    if disk.f_files and need.files > disk.f_favail:  # some file systems do not count files
        raise SpaceError(
            f"{folder}: {what} still needs {need.files:,} files and folders here, but the disk has only "
            f"{disk.f_favail:,} free (`df -i`), {remedy}"
        )


def free_space(folder: Path) -> int:
    """The bytes that are free on the disk of `folder`, which need not exist."""
    disk = os.statvfs(existing_parent(folder))
    return disk.f_bavail * disk.f_frsize


def space_taken(folder: Path) -> DiskSpace:
    """The space of all files and folders below `folder`; nothing if it does not exist."""
    blocks = list(_blocks(folder))
    return DiskSpace(512 * sum(blocks), len(blocks))


def state_bytes(work_dir: Path) -> int:
    """The space of a run's state, which is all but its manifest, its journal and its lock."""
    return space_taken(store_path(work_dir)).bytes


def _blocks(folder: Path) -> Iterator[int]:
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):  # file servers delete temporary files of their own
                yield Path(parent, name).lstat().st_blocks


def existing_parent(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _device_of(folder: Path) -> int:
    return existing_parent(folder).stat().st_dev
