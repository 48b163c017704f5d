"""Disks that are small, fill up, turn read-only or fail, and the checks on the state that a run leaves on them."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.e2e import Child, Nursery
from tests.support.syscalls import Answer, Call, Verdict, Watch
from tests.support.torture import Ending, damage, places, start, write_variant

MIB = 2**20
ON_DISK = {"tiff": "out.tif", "deepzoom": "out.dz", "ome-zarr": "out.zarr", "power": "out.png"}


class CannotMountError(Exception):
    """Mounting a file system is not permitted here."""


@dataclass(frozen=True)
class Disk:
    """A mounted file system of a few MiB."""

    path: Path

    def fill(self, leave_bytes: int = 0) -> None:
        """Fill the disk as another program would, except for `leave_bytes`."""
        with (self.path / "filler").open("wb") as file:
            size = shutil.disk_usage(self.path).free - leave_bytes
            if size > 0:
                os.posix_fallocate(file.fileno(), 0, size)

    def fill_with_files(self) -> None:
        """Create files, as another program would, until the disk has no inode left."""
        with contextlib.suppress(OSError):
            for number in range(10**6):
                (self.path / f"filler_{number}").touch()

    def free(self) -> None:
        """Delete what `fill` and `fill_with_files` wrote."""
        for path in self.path.glob("filler*"):
            path.unlink()

    def remount(self, options: str) -> None:
        """Change the mount options, for example to `ro`."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True, capture_output=True)


@contextmanager
def small_disk(folder: Path, options: str = "size=16m") -> Iterator[Disk]:
    """Mount a tmpfs at `folder`. Raises CannotMountError."""
    folder.mkdir(parents=True)
    result = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False, capture_output=True)
    if result.returncode:
        raise CannotMountError(f"cannot mount a tmpfs here: {result.stderr.decode().strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def write_on_disk(folder: Path, variant: str) -> Path:
    """Write the config of a small run whose state and output image go to `folder`/disk."""
    return write_variant(folder, variant, work_dir="disk/run", output=f"disk/{ON_DISK[variant]}")


@dataclass
class Faulted:
    """A run under an injected fault: its exit codes, its last error message, and every broken promise."""

    fault: str
    codes: list[int] = field(default_factory=list)
    message: str = ""
    problems: list[str] = field(default_factory=list)

    def check(self, config: Path, code: int, output: str, allowed: tuple[int, ...] = (0, 5)) -> bool:
        """Check a finished attempt, its printed output and the state that it left; True if the run is complete."""
        self.codes.append(code)
        if code not in allowed:
            self.problems.append(f"exit {code}")
        lines = [line for line in output.splitlines() if not line.startswith("{")]
        if code:
            self.message = lines[-1] if lines else ""
            if len(lines) != 1 or not re.match(r"pipeline: error: (work_dir )?/", lines[0]):
                self.problems.append(f"printed {lines[-12:]}")
        work_dir, _ = places(config)
        self.problems += damage(work_dir)
        if (work_dir / "manifest.json").exists():
            import pipeline

            try:
                pipeline.status(work_dir)
            except Exception as error:  # any error of status breaks the promise
                self.problems.append(f"status: {error}")
        return code == 0

    def finish(self, nursery: Nursery, config: Path, expected: Ending) -> None:
        """With the fault gone, the same command has to produce what an unbroken run does."""
        if self.codes[-1] != 0:
            child = start(nursery, config)
            if not self.check(config, child.wait(), child.err, (0,)):
                return
        self.problems += [f"different {part}" for part in expected.differences(Ending.of(config))]


def at_event(child: Child, number: int, do: Callable[[], None]) -> None:
    """Call `do` while the run is paused after its event of this number."""
    if child.wait_until(lambda events: len(events) >= number):
        with child.paused():
            do()


def failing_from(first: int, number: int, once: bool = False) -> Callable[[Call], Answer]:
    """A judge that fails every call from the `first` one on with the errno `number`, or that call alone."""
    numbers = itertools.count(1)

    def judge(_call: Call) -> Answer:
        index = next(numbers)
        return number if index == first or (index > first and not once) else Verdict.GO

    return judge


def run_failing(
    nursery: Nursery, config: Path, expected: Ending, fault: str, judge: Callable[[Call], Answer], reads: bool = False
) -> Faulted:
    """Run with calls that fail as the judge says, then resume without faults to the end."""
    outcome = Faulted(fault)
    watch = Watch(config.parent, judge, reads)
    child = start(nursery, config, watch=watch)
    outcome.check(config, child.wait(), child.err)
    watch.wait()
    outcome.finish(nursery, config, expected)
    return outcome


def calls_of(nursery: Nursery, config: Path, reads: bool) -> list[Call]:
    """Every call of an undisturbed run, in order."""
    watch = Watch(config.parent, lambda _call: Verdict.GO, reads)
    assert start(nursery, config, watch=watch).wait() == 0
    return watch.wait()
