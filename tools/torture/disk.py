"""Run on disks that are full, fill up, become read-only or fail, at many moments, and check that nothing is lost.

Every run on such a disk must end with exit code 5 and one sentence that names a file, or complete. Its state must be
intact, and after the fault is removed, the same command must end with the bytes of an unbroken run.

    room         disks of 24 sizes, from one page to more than enough
    filled       another program uses all free space, at 24 moments of the run
    files        disks with a limited number of inodes, and another program that uses all of them
    calls        writing calls fail (EIO, ENOSPC, EROFS, EDQUOT), one of them or all from one on
    reads        the same for reading calls
    read-only    the output image's disk is remounted read-only during the run
    descriptors  a process that may open 16 to 256 files

Needs Linux on x86-64, and root except for `calls`, `reads` and `descriptors`.

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
FREE_BYTES = (0, 4096, 40_960)


@dataclass(frozen=True)
class Bench:
    """One variant: the folder of its runs, their expected ending, and the number of moments tried per fault."""

    folder: Path
    nursery: Nursery
    variant: str
    points: int
    expected: Ending
    events: int
    peak_bytes: int
    files: int

    def spread(self, last: int, first: int = 1) -> list[int]:
        """`points` evenly spaced numbers from `first` to `last`."""
        steps = max(1, self.points - 1)
        return sorted({first + (last - first) * point // steps for point in range(self.points)})


def unbroken(folder: Path, nursery: Nursery, variant: str, points: int) -> Bench:
    """A run on a disk with plenty of space, with the space and inodes that it needed."""
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
    """One run on a disk where `strike` is called after `moment` events (0: before the start)."""
    config = write_on_disk(bench.folder / name.replace(" ", "_"), bench.variant)
    run = Faulted(name)
    with small_disk(config.parent / "disk", options) as disk:
        if not moment:
            strike(disk)
        child = start(bench.nursery, config)
        if moment:
            at_event(child, moment, lambda: strike(disk))
        run.check(config, child.wait(), child.err)
        disk.free()
        disk.remount(f"{PLENTY},nr_inodes=100000,rw")
        run.finish(bench.nursery, config, bench.expected)
    return run


def room(bench: Bench) -> Iterator[Faulted]:
    for size in bench.spread(int(bench.peak_bytes * 1.6), 4096):
        yield on_disk(bench, f"size {size}", f"size={size}", 0, lambda _disk: None)


def filled(bench: Bench) -> Iterator[Faulted]:
    for number, moment in enumerate(bench.spread(bench.events, 0)):
        free = FREE_BYTES[number % len(FREE_BYTES)]
        name = f"all but {free} after {moment}"
        yield on_disk(bench, name, PLENTY, moment, lambda disk, free=free: disk.fill(free))


def files(bench: Bench) -> Iterator[Faulted]:
    for number in bench.spread(int(bench.files * 1.6), 3):
        yield on_disk(bench, f"{number} files", f"{PLENTY},nr_inodes={number}", 0, lambda _disk: None)
    options = f"{PLENTY},nr_inodes={2 * bench.files + 500}"
    for moment in bench.spread(bench.events, 0):
        yield on_disk(bench, f"no more files after {moment}", options, moment, lambda disk: disk.fill_with_files())


def calls(bench: Bench, reads: bool = False) -> Iterator[Faulted]:
    config = write_variant(bench.folder / "calls", bench.variant)
    calls_made = calls_of(bench.nursery, config, reads)
    expected = Ending.of(config)
    kinds = [(errno.EIO, True), (errno.EIO, False)]
    kinds += [] if reads else [(errno.ENOSPC, False), (errno.EROFS, False), (errno.EDQUOT, True)]
    for number, once in kinds:
        for first in bench.spread(len(calls_made)):
            call = calls_made[first - 1]
            if reads and call.name not in ("read", "pread64", "preadv2", "openat"):
                continue
            fault = f"{errno.errorcode[number]} {'at' if once else 'from'} {first} {call.name} {call.path}"
            config = write_variant(bench.folder / f"{errno.errorcode[number]}_{once}_{first}", bench.variant)
            yield run_failing(bench.nursery, config, expected, fault, failing_from(first, number, once), reads)


def read_only(bench: Bench) -> Iterator[Faulted]:
    for moment in bench.spread(bench.events):
        config = write_variant(bench.folder / f"ro_{moment}", bench.variant, output=f"disk/{ON_DISK[bench.variant]}")
        run = Faulted(f"the output image's disk is read-only after {moment}")
        with small_disk(config.parent / "disk", PLENTY) as disk:
            child = start(bench.nursery, config)
            at_event(child, moment, lambda disk=disk: make_read_only(disk))
            run.check(config, child.wait(), child.err)
            disk.remount("rw")
            run.finish(bench.nursery, config, bench.expected)
        yield run


def make_read_only(disk: Disk) -> None:
    with contextlib.suppress(subprocess.CalledProcessError):  # the kernel refuses while the image is open for writing
        disk.remount("ro")


def descriptors(bench: Bench) -> Iterator[Faulted]:
    for limit in bench.spread(256, 16):
        config = write_variant(bench.folder / f"descriptors_{limit}", bench.variant)
        run = Faulted(f"ulimit -n {limit}")
        process = subprocess.run(
            [PIPELINE, "run", "-c", config, "--log-format", "json"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # like the nursery's runs
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
        )
        run.check(config, process.returncode, process.stdout + process.stderr)
        run.finish(bench.nursery, config, bench.expected)
        yield run


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
    """Try every moment of one fault; runs with problems are kept for inspection."""
    results = []
    for run in FAULTS[fault](bench):
        results.append(run)
        if run.problems:
            print(f"{bench.variant}: {fault}: {run}", file=sys.stderr, flush=True)
    return results


@click.command()
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(ON_DISK)), default=list(ON_DISK))
@click.option("--fault", "faults", multiple=True, type=click.Choice(list(FAULTS)), default=list(FAULTS))
@click.option("--points", default=24, show_default=True, help="Moments or sizes per fault.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all results to this file.")
def main(variants: tuple[str, ...], faults: tuple[str, ...], points: int, json_path: Path | None) -> None:
    """Inject disk faults; exit with 1 if a run loses data or reports a fault badly."""
    table = Table()
    for column in ("run", "fault", "tried", "refused (5)", "done (0)", "correct", "minutes"):
        table.add_column(column, justify="right")
    results: dict[str, dict[str, list[Faulted]]] = {}
    with tempfile.TemporaryDirectory() as name:
        nursery = Nursery(Path(name))
        for variant in variants:
            bench = unbroken(Path(name) / variant, nursery, variant, points)
            for fault in faults:
                started = time.monotonic()
                runs = torture(bench, fault)
                results.setdefault(variant, {})[fault] = runs
                refused = sum(run.codes[0] == 5 for run in runs)
                done, correct = sum(run.codes[0] == 0 for run in runs), sum(not run.problems for run in runs)
                minutes = f"{(time.monotonic() - started) / 60:.1f}"
                table.add_row(variant, fault, *map(str, (len(runs), refused, done, correct)), minutes)
        nursery.close()
    Console().print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2, default=asdict), encoding="utf-8")
    sys.exit(any(run.problems for by_fault in results.values() for runs in by_fault.values() for run in runs))


if __name__ == "__main__":
    main()
