"""Run on disks that are full, fill up, turn read-only or fail, at many moments, and see that nothing is lost.

Every run that meets such a disk must end with exit 5 and one sentence that names a file (or not notice it at all); its
state must be whole; and when the cause is gone, the same command must end with the bytes of an unbroken run.

    room         disks of 24 sizes, from one page to more than enough
    filled       another program takes all room, at 24 moments of the run
    files        disks that can hold so many files and no more; and another program that takes them all
    calls        from one call on, or at one call alone, the disk answers with an error (EIO, ENOSPC, EROFS, EDQUOT)
    reads        the same of calls that read
    read-only    the picture's disk is mounted read-only at moments of the run
    descriptors  a process that may open 16 to 256 files

Needs Linux on x86-64, and root for all but `calls`, `reads` and `descriptors`.

    python -m tools.torture.disk --json disk.json
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.support.disks import (
    ON_DISK,
    Disk,
    Faulted,
    at_event,
    calls_of,
    failing_from,
    run_failing,
    small_disk,
    write_on_disk,
)
from tests.support.e2e import PIPELINE, TIMEOUT_S, Nursery
from tests.support.torture import Ending, start, write_variant

PLENTY = "size=64m"
LEAVE_BYTES = (0, 4096, 40_960)


@dataclass(frozen=True)
class Bench:
    """Where the runs of one variant are made, how they must end, and how many moments of each fault are tried."""

    folder: Path
    nursery: Nursery
    variant: str
    points: int
    expected: Ending
    events: int
    peak_bytes: int
    files: int

    def spread(self, last: int, first: int = 1) -> list[int]:
        """`points` numbers from `first` to `last`."""
        steps = max(1, self.points - 1)
        return sorted({first + (last - first) * point // steps for point in range(self.points)})


def unbroken(folder: Path, nursery: Nursery, variant: str, points: int) -> Bench:
    """A run on a disk with plenty of room, and what it took there."""
    config = write_on_disk(folder / "unbroken", variant)
    with small_disk(config.parent / "disk", PLENTY) as disk:
        taken, files, ended = [0], [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.005):
                taken.append(shutil.disk_usage(disk.path).used)
                files.append(os.statvfs(disk.path).f_files - os.statvfs(disk.path).f_ffree)

        watcher = threading.Thread(target=watch)
        watcher.start()
        child = start(nursery, config)
        code = child.wait()
        ended.set()
        watcher.join()
        assert code == 0, child.err
        return Bench(folder, nursery, variant, points, Ending.of(config), len(child.events()), max(taken), max(files))


def on_disk(bench: Bench, name: str, options: str, moment: int, strike: Callable[[Disk], None]) -> Faulted:
    """One run on a disk that `strike`s after so many events (0: before the first)."""
    config = write_on_disk(bench.folder / name.replace(" ", "_"), bench.variant)
    found = Faulted(name)
    with small_disk(config.parent / "disk", options) as disk:
        if not moment:
            strike(disk)
        child = start(bench.nursery, config)
        if moment:
            at_event(child, moment, lambda: strike(disk))
        found.check(config, child.wait(), child.err)
        disk.free()
        disk.remount(f"{PLENTY},nr_inodes=100000,rw")
        found.finish(bench.nursery, config, bench.expected)
    return found


def room(bench: Bench) -> Iterator[Faulted]:
    for size in bench.spread(int(bench.peak_bytes * 1.6), 4096):
        yield on_disk(bench, f"size {size}", f"size={size}", 0, lambda _disk: None)


def filled(bench: Bench) -> Iterator[Faulted]:
    for number, moment in enumerate(bench.spread(bench.events, 0)):
        leave = LEAVE_BYTES[number % len(LEAVE_BYTES)]
        name = f"all but {leave} after {moment}"
        yield on_disk(bench, name, PLENTY, moment, lambda disk, leave=leave: disk.fill(leave))


def files(bench: Bench) -> Iterator[Faulted]:
    for number in bench.spread(int(bench.files * 1.6), 3):
        yield on_disk(bench, f"{number} files", f"{PLENTY},nr_inodes={number}", 0, lambda _disk: None)
    options = f"{PLENTY},nr_inodes={2 * bench.files + 500}"
    for moment in bench.spread(bench.events, 0):
        yield on_disk(bench, f"no more files after {moment}", options, moment, lambda disk: disk.fill_with_files())


def calls(bench: Bench, reads: bool = False) -> Iterator[Faulted]:
    config = write_variant(bench.folder / "calls", bench.variant)
    made = calls_of(bench.nursery, config, reads)
    expected = Ending.of(config)
    kinds = [(errno.EIO, True), (errno.EIO, False)]
    kinds += [] if reads else [(errno.ENOSPC, False), (errno.EROFS, False), (errno.EDQUOT, True)]
    for number, once in kinds:
        for first in bench.spread(len(made)):
            call = made[first - 1]
            if reads and call.name not in ("read", "pread64", "preadv2", "openat"):
                continue
            fault = f"{errno.errorcode[number]} {'at' if once else 'from'} {first} {call.name} {call.path}"
            config = write_variant(bench.folder / f"{errno.errorcode[number]}_{once}_{first}", bench.variant)
            yield run_failing(bench.nursery, config, expected, fault, failing_from(first, number, once), reads)


def read_only(bench: Bench) -> Iterator[Faulted]:
    for moment in bench.spread(bench.events):
        config = write_variant(bench.folder / f"ro_{moment}", bench.variant, output=f"disk/{ON_DISK[bench.variant]}")
        found = Faulted(f"the picture's disk is read-only after {moment}")
        with small_disk(config.parent / "disk", PLENTY) as disk:
            child = start(bench.nursery, config)
            at_event(child, moment, lambda disk=disk: make_read_only(disk))
            found.check(config, child.wait(), child.err)
            disk.remount("rw")
            found.finish(bench.nursery, config, bench.expected)
        yield found


def make_read_only(disk: Disk) -> None:
    with contextlib.suppress(subprocess.CalledProcessError):  # the kernel does not while the picture is being written
        disk.remount("ro")


def descriptors(bench: Bench) -> Iterator[Faulted]:
    for limit in bench.spread(256, 16):
        config = write_variant(bench.folder / f"descriptors_{limit}", bench.variant)
        found = Faulted(f"ulimit -n {limit}")
        done = subprocess.run(
            [PIPELINE, "run", "-c", config, "--log-format", "json"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # as the nursery's runs
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
        )
        found.check(config, done.returncode, done.stdout + done.stderr)
        found.finish(bench.nursery, config, bench.expected)
        yield found


FAULTS: dict[str, Callable[[Bench], Iterator[Faulted]]] = {
    "room": room,
    "filled": filled,
    "files": files,
    "calls": calls,
    "reads": lambda bench: calls(bench, reads=True),
    "read-only": read_only,
    "descriptors": descriptors,
}


def torture(bench: Bench, fault: str) -> list[Faulted]:
    """Every moment of one fault; what went wrong is left for a look."""
    results = []
    for found in FAULTS[fault](bench):
        results.append(found)
        if found.problems:
            print(f"{bench.variant}: {fault}: {found}", file=sys.stderr, flush=True)
    return results


@click.command()
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(ON_DISK)), default=list(ON_DISK))
@click.option("--fault", "faults", multiple=True, type=click.Choice(list(FAULTS)), default=list(FAULTS))
@click.option("--points", default=24, show_default=True, help="Moments, or sizes, of every fault.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all that was seen here.")
def main(variants: tuple[str, ...], faults: tuple[str, ...], points: int, json_path: Path | None) -> None:
    """Break the disk; exit 1 if a run lost something or said it badly."""
    table = Table()
    for column in ("run", "fault", "tried", "refused (5)", "done (0)", "as it should", "minutes"):
        table.add_column(column, justify="right")
    seen: dict[str, dict[str, list[Faulted]]] = {}
    with tempfile.TemporaryDirectory() as name:
        nursery = Nursery(Path(name))
        for variant in variants:
            bench = unbroken(Path(name) / variant, nursery, variant, points)
            for fault in faults:
                started = time.monotonic()
                found = torture(bench, fault)
                seen.setdefault(variant, {})[fault] = found
                refused = sum(one.codes[0] == 5 for one in found)
                done, well = sum(one.codes[0] == 0 for one in found), sum(not one.problems for one in found)
                minutes = f"{(time.monotonic() - started) / 60:.1f}"
                table.add_row(variant, fault, *map(str, (len(found), refused, done, well)), minutes)
        nursery.close()
    Console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(seen, indent=2, default=asdict), encoding="utf-8")
    sys.exit(any(one.problems for kinds in seen.values() for all_ in kinds.values() for one in all_))


if __name__ == "__main__":
    main()
