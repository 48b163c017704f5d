"""Disks that are small, fill up, turn read-only or fail, and what a run that met one has to leave behind."""

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
    """This user, or this machine, mounts nothing."""


@dataclass(frozen=True)
class Disk:
    """A mounted disk of a few MiB."""

    path: Path

    def fill(self, leave_bytes: int = 0) -> None:
        """Another program takes all room but this."""
        with (self.path / "filler").open("wb") as file:
            size = shutil.disk_usage(self.path).free - leave_bytes
            if size > 0:
                os.posix_fallocate(file.fileno(), 0, size)

    def fill_with_files(self) -> None:
        """Another program makes files until there can be no more."""
        with contextlib.suppress(OSError):
            for number in range(10**6):
                (self.path / f"filler_{number}").touch()

    def free(self) -> None:
        """The other program gives everything back."""
        for path in self.path.glob("filler*"):
            path.unlink()

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True, capture_output=True)


@contextmanager
def small_disk(folder: Path, options: str = "size=16m") -> Iterator[Disk]:
    """A tmpfs at `folder`. Raises CannotMountError."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False, capture_output=True)
    if done.returncode:
        raise CannotMountError(f"cannot mount a tmpfs here: {done.stderr.decode().strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def write_on_disk(folder: Path, variant: str) -> Path:
    """The config of a small run whose state and picture go to `folder`/disk."""
    return write_variant(folder, variant, work_dir="disk/run", output=f"disk/{ON_DISK[variant]}")


@dataclass
class Faulted:
    """What a run did that met a fault: how it ended, what it said, and everything that should not be so."""

    fault: str
    codes: list[int] = field(default_factory=list)
    message: str = ""
    problems: list[str] = field(default_factory=list)

    def check(self, config: Path, code: int, told: str, allowed: tuple[int, ...] = (0, 5)) -> bool:
        """Look at an attempt that has ended, and at the state that it left; whether it is done."""
        self.codes.append(code)
        if code not in allowed:
            self.problems.append(f"exit {code}")
        lines = [line for line in told.splitlines() if not line.startswith("{")]
        if code:
            self.message = lines[-1] if lines else ""
            if len(lines) != 1 or not re.match(r"pipeline: error: (work_dir )?/", lines[0]):
                self.problems.append(f"said {lines[-12:]}")
        work_dir, _ = places(config)
        self.problems += damage(work_dir)
        if (work_dir / "manifest.json").exists():
            import pipeline

            try:
                pipeline.status(work_dir)
            except Exception as error:  # whatever it is: status has to work
                self.problems.append(f"status: {error}")
        return code == 0

    def finish(self, nursery: Nursery, config: Path, expected: Ending) -> None:
        """The fault is gone: the same command has to end like an unbroken run."""
        if self.codes[-1] != 0:
            child = start(nursery, config)
            if not self.check(config, child.wait(), child.err, (0,)):
                return
        self.problems += [f"other {part}" for part in expected.differences(Ending.of(config))]


def at_event(child: Child, number: int, do: Callable[[], None]) -> None:
    """Stop a run when it has told this many events, do something, and let it go on."""
    if child.wait_until(lambda events: len(events) >= number):
        with child.paused():
            do()


def failing_from(first: int, number: int, once: bool = False) -> Callable[[Call], Answer]:
    """A judge that lets every call from the `first` one on fail with the errno `number`, or that one alone."""
    numbers = itertools.count(1)

    def judge(_call: Call) -> Answer:
        now = next(numbers)
        return number if now == first or (now > first and not once) else Verdict.GO

    return judge


def run_failing(
    nursery: Nursery, config: Path, expected: Ending, fault: str, judge: Callable[[Call], Answer], reads: bool = False
) -> Faulted:
    """A run whose calls fail as the judge says; then, with calls that do not fail, to its end."""
    found = Faulted(fault)
    watch = Watch(config.parent, judge, reads)
    child = start(nursery, config, watch=watch)
    found.check(config, child.wait(), child.err)
    watch.wait()
    found.finish(nursery, config, expected)
    return found


def calls_of(nursery: Nursery, config: Path, reads: bool) -> list[Call]:
    """Every call of a run that nothing disturbs."""
    watch = Watch(config.parent, lambda _call: Verdict.GO, reads)
    assert start(nursery, config, watch=watch).wait() == 0
    return watch.wait()
