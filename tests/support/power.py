"""Disks whose power can be cut: file systems in image files, mounted through a loop device, that stop on command.

Unsynced data is lost, completely or, if the harness so chooses, in part, because a real disk may have written some of
it already. Needs Linux, root and a free loop device.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.e2e import TIMEOUT_S, Nursery
from tests.support.syscalls import Call, Verdict, Watch
from tests.support.torture import (
    KILLED,
    VARIANTS,
    Score,
    Unbroken,
    at_number,
    damage,
    places,
    start,
    tree,
    write_variant,
)

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN
_WITHOUT_LOG_FLUSH = struct.pack("I", 2)
_SYNC_RANGE = 7  # wait for earlier writes, write, and wait
IMAGE_BYTES = 64 * 2**20

# The data modes of ext4, which differ in what survives unsynced. `none` has no journal: names and sizes may be lost
# one by one, and e2fsck repairs the file system.
MODES = ("ordered", "writeback", "journal", "none")


def missing() -> str | None:
    """The reason why this machine cannot cut the power of a disk, or None."""
    if os.name != "posix" or os.geteuid() != 0:
        return "needs root, for loop devices and mounts"
    programs = [name for name in ("mkfs.ext4", "mount", "umount", "e2fsck") if shutil.which(name) is None]
    if programs:
        return f"needs {', '.join(programs)}"
    if not Path("/dev/loop-control").exists():
        return "needs loop devices"
    return None


@dataclass
class Disk:
    """A file system in an image file, mounted at `folder` while it has power."""

    image: Path
    folder: Path
    mode: str

    @staticmethod
    def new(folder: Path, mode: str) -> Disk:
        """Create and mount an empty disk. Raises CalledProcessError if the system does not permit it."""
        folder.mkdir(parents=True)
        image = folder.with_name(f"{folder.name}.image")
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        features = ["-O", "^has_journal"] if mode == "none" else []
        _call("mkfs.ext4", "-q", "-F", "-m", "0", *features, str(image))
        disk = Disk(image, folder, mode)
        disk._mount()
        return disk

    def cut(self) -> None:
        """Cut the power: from now on every call on the disk fails, and nothing more is written."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, _WITHOUT_LOG_FLUSH)
        finally:
            os.close(descriptor)

    def restore(self) -> None:
        """Restore the power after a cut. No process may have a file on the disk open."""
        if self.mode == "none":  # unmounting would write the dirty pages of the kernel
            saved = self.image.with_suffix(".saved")
            _call("cp", "--sparse=always", str(self.image), str(saved))
            self._unmount()
            saved.replace(self.image)
            subprocess.run(["e2fsck", "-fy", self.image], capture_output=True, check=False)  # exits 1 after a repair
        else:
            self._unmount()
        self._mount()

    def close(self) -> None:
        """Unmount and delete the disk."""
        if self.folder.is_mount():
            self._unmount()
        self.image.unlink()
        self.folder.rmdir()

    def _unmount(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                _call("umount", str(self.folder))
                return
            except (
                subprocess.CalledProcessError
            ):  # another process may have it open for a moment, as a scan of mounts does
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def _mount(self) -> None:
        # without commit=600, ext4 syncs metadata every 5 s: on a busy machine most of a run would be synced
        options = "loop" if self.mode == "none" else f"loop,data={self.mode},commit=600"
        _call("mount", "-o", options, str(self.image), str(self.folder))


@contextlib.contextmanager
def disks(*folders: Path, mode: str) -> Iterator[list[Disk]]:
    """Create disks, and delete them at the end."""
    with contextlib.ExitStack() as stack:
        mounted: list[Disk] = []
        for folder in folders:
            mounted.append(Disk.new(folder, mode))
            stack.callback(mounted[-1].close)
        yield mounted


def leak(disk: Disk, rng: random.Random) -> str:
    """Write some of the unsynced data to the disk: only names and sizes, only bytes, or whole files; returns which."""
    how = rng.choice(("names", "bytes", "files"))
    if how == "names":  # with a journal, syncing one directory commits all names
        descriptor = os.open(disk.folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        return how
    paths = [path for path in sorted(disk.folder.rglob("*")) if path.is_file()]
    share = rng.random()
    for path in [path for path in paths if rng.random() < share]:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if how == "files":
                os.fsync(file.fileno())
            else:
                _write_range(file.fileno(), rng, path.stat().st_size)
    return how


def _write_range(descriptor: int, rng: random.Random, size: int) -> None:
    first = rng.choice((0, rng.randrange(size + 1)))
    libc = ctypes.CDLL(None, use_errno=True)
    offsets = (ctypes.c_int64(first), ctypes.c_int64(rng.choice((0, max(1, size // 2)))))  # 0: to the end
    if libc.sync_file_range(descriptor, *offsets, _SYNC_RANGE) != 0:
        raise OSError(ctypes.get_errno(), "sync_file_range")


def _call(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=True)


@dataclass(frozen=True)
class Plan:
    """One run and the numbers of the calls before which the power is cut, one per start.

    `two_disks`: the output image goes to a disk of its own. `leaky`: the disks have written some unsynced data.
    """

    variant: str
    mode: str
    cuts: tuple[int, ...]
    two_disks: bool
    leaky: bool
    durability: str = "power"
    seed: int = 0


def suffer(nursery: Nursery, folder: Path, plan: Plan, unbroken: Unbroken) -> Score:
    """Cut the power as planned, resume the run to its end, and compare. A state damaged by a cut is a problem."""
    names = ["store", "images"] if plan.two_disks else ["store"]
    settings = {"chunk_px": 32, **VARIANTS[plan.variant].get("store", {}), "durability": plan.durability}
    output = f"{names[-1]}/{VARIANTS[plan.variant]['output']}"
    config = write_variant(folder, plan.variant, work_dir="store/run", output=output, store=settings)
    rng, score = random.Random(plan.seed), Score()
    work_dir, output_path = places(config)
    with disks(*(folder / name for name in names), mode=plan.mode) as powered:
        for number in plan.cuts:
            _cut_at(nursery, config, number, powered, rng if plan.leaky else None, score)
            if score.code != KILLED or score.problems:
                break
            for disk in powered:
                disk.restore()
            score.problems += damage(work_dir)
            if tree(output_path) not in ({}, unbroken.ending.output):
                score.problems.append("incomplete output image")
            if score.problems:
                break  # the next start shows whether the run detects it
        if score.code == KILLED:
            score.add(start(nursery, config))
        if score.code == 0:
            # the removal of a temporary directory may have been the last call, and be lost
            for empty in output_path.parent.glob(".*/"):
                with contextlib.suppress(OSError):
                    empty.rmdir()
            unbroken.compare(config, score)
    return score


def _cut_at(
    nursery: Nursery, config: Path, number: int, powered: list[Disk], rng: random.Random | None, score: Score
) -> None:
    """Start the run and cut the power of all disks just before its call of this number."""
    at = at_number(number)

    def judge(call: Call) -> Verdict:
        if at(call) is Verdict.GO:
            return Verdict.GO
        for disk in powered:
            if rng is not None:
                leak(disk, rng)
            disk.cut()
        return Verdict.KILL

    watch = Watch(config.parent, judge)
    score.add(start(nursery, config, watch=watch))
    watch.wait()
