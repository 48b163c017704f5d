"""Disk space and free file entries (inodes): what a run still needs, and whether the disks have it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.config import Config
from pipeline.core.errors import SpaceError
from pipeline.plan.plan import Plan

_BLOCK_BYTES = 4096  # of nearly every file system
_METADATA_FILES = 64  # of one stage: one per array, and the style's targets


@dataclass(frozen=True)
class DiskSpace:
    """Room on a disk: bytes, and files and folders."""

    bytes: int
    files: int


def check_space(config: Config, planned: Plan, stage: int) -> None:
    """Raise SpaceError if the disks have no room for what is written from `stage` on; behind the last, for the picture.

    What the run holds already is not counted again: a stage begins when those before it have given back all but their
    result, and takes over what an interrupted preparation left.
    """
    later = planned.stages[stage:]
    held = space_taken(config.work_dir)
    kept = [_room(one.kept_bytes, one.kept_chunks) for one in planned.stages]
    peak = after = DiskSpace(0, 0)
    if later:
        after = _more(kept, held)
        peaks = [_more([*kept[: one.index], _room(one.store_bytes, one.store_chunks)], held) for one in later]
        peak = DiskSpace(max(one.bytes for one in peaks), max(one.files for one in peaks))
    what = f"stage {stage} and all behind it" if later else "the picture"
    picture_bytes = planned.output_bytes + planned.levels_bytes
    if _device_of(config.work_dir) == _device_of(config.output.parent):
        _require(config.work_dir, DiskSpace(max(peak.bytes, after.bytes + picture_bytes), peak.files), what)
    else:
        _require(config.work_dir, peak, what)
        _require(config.output.parent, DiskSpace(picture_bytes, 0), "the picture")


def _room(array_bytes: int, chunks: int) -> DiskSpace:
    """Arrays of this size. Every chunk is a file in a folder of its own, which takes a block on most disks."""
    return DiskSpace(array_bytes + (chunks + _METADATA_FILES) * _BLOCK_BYTES, 3 * chunks + _METADATA_FILES)


def _more(wanted: Sequence[DiskSpace], held: DiskSpace) -> DiskSpace:
    """What is missing to the sum of `wanted`."""
    return DiskSpace(
        max(0, sum(one.bytes for one in wanted) - held.bytes), max(0, sum(one.files for one in wanted) - held.files)
    )


def _require(folder: Path, need: DiskSpace, what: str) -> None:
    """Raise SpaceError if the disk of `folder` has not what is needed for `what`."""
    disk = os.statvfs(existing_parent(folder))
    remedy = (
        "and the run would stop half-way. Nothing that was committed is lost. Make room, or put work_dir or output on "
        "another disk, and give the same command again; or choose a smaller size."
    )
    if need.bytes > disk.f_bavail * disk.f_frsize:
        raise SpaceError(
            f"{folder}: {what} still needs {_shown(need.bytes)} here, but "
            f"{_shown(disk.f_bavail * disk.f_frsize)} are free, {remedy}"
        )
    if disk.f_files and need.files > disk.f_favail:  # some file systems count none
        raise SpaceError(
            f"{folder}: {what} still needs {need.files:,} files and folders here, but the disk can make no more than "
            f"{disk.f_favail:,} (`df -i`), {remedy}"
        )


def _shown(size_bytes: int) -> str:
    """In the unit that leaves digits in front of the point: `needs 0.00 GiB, 0.00 are free` says nothing."""
    unit, factor = next((one for one in (("GiB", 2**30), ("MiB", 2**20)) if size_bytes >= one[1]), ("KiB", 2**10))
    return f"{size_bytes / factor:.2f} {unit}"


def space_taken(folder: Path) -> DiskSpace:
    """What all files and folders below `folder` take; nothing if it does not exist."""
    blocks = list(_blocks(folder))
    return DiskSpace(512 * sum(blocks), len(blocks))


def _blocks(folder: Path) -> Iterator[int]:
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):  # a file server deletes what it has made there
                yield Path(parent, name).lstat().st_blocks


def existing_parent(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _device_of(folder: Path) -> int:
    return existing_parent(folder).stat().st_dev
