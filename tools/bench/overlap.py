"""How much of an iteration the device waits, with the disk as it is, and behind a slow one.

    python -m tools.bench.overlap --device cuda:0 --size 8192 --dtype float32 --json overlap.json

Waiting is the part of an iteration in which no tile computes; wanted at most 10 % where the network is the limit. Slow
disks are such that the bytes of an iteration take half, just as much, and twice as long as it computes. Wanted there:
seconds of an iteration at most 1.1 × max(compute, I/O).

`--disk model` makes them by letting the bytes that are read and written pass one after another, without page cache or
read-ahead: harder than a disk is. `--disk device` has the kernel slow down a device (a file in memory, ext4), reading
and writing each, and leaves the program little page cache; it needs root, loop devices and cgroups of version 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from pipeline.core.allocator import set_up_process
from tools.bench.runs import Taken, machine, make_picture, make_weights, render

# How long the bytes of an iteration take, as a share of its computing.
PARTS = (0.5, 1.0, 2.0)
# A sleep of some microseconds takes a tenth of a millisecond.
LEAST_S = 1e-3
# Iterations that a device's figures leave out: the first has its update after the gradient pass, the next its bytes.
FIRST = 2
KINDS = ("compute", "read", "write", "update", "wait")


class SlowDisk:
    """Reads and writes of chunks in this process, one after another at `bytes_per_s`; None only counts them.

    Waits that are shorter than a thread can sleep are saved up, so that small calls have the same speed.
    """

    def __init__(self, bytes_per_s: float | None) -> None:
        self.bytes, self._speed = 0, bytes_per_s
        self._lock, self._free_at = threading.Lock(), 0.0

    def _pass(self, count: int) -> None:
        with self._lock:
            self.bytes += count
            if self._speed is None:
                return
            self._free_at = max(self._free_at, time.perf_counter()) + count / self._speed
            wait_s = self._free_at - time.perf_counter()
        if wait_s > LEAST_S:
            time.sleep(wait_s)

    @contextmanager
    def in_use(self) -> Iterator[SlowDisk]:
        """All chunks pass here while the block runs."""
        preadv, pwrite = os.preadv, os.pwrite

        def slow_preadv(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
            done = preadv(descriptor, buffers, offset, flags)
            self._pass(done)
            return done

        def slow_pwrite(descriptor: int, data: Any, offset: int) -> int:
            done = pwrite(descriptor, data, offset)
            self._pass(done)
            return done

        os.preadv, os.pwrite = slow_preadv, slow_pwrite
        try:
            yield self
        finally:
            os.preadv, os.pwrite = preadv, pwrite


class SlowDevice:
    """A block device in memory whose speed can be limited, mounted at `folder`."""

    _memory = Path("/sys/fs/cgroup/memory/pipeline-bench")
    _speed = Path("/sys/fs/cgroup/blkio")

    def __init__(self, folder: Path, size: int) -> None:
        if os.geteuid() or not all(path.exists() for path in (self._memory.parent, self._speed)):
            raise click.ClickException("--disk device needs root, and the cgroups memory and blkio of version 1.")
        self._image, self._folder = Path("/dev/shm") / f"{folder.parent.name}.img", folder
        with self._image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        self._device = Path(_output("losetup", "--find", "--show", str(self._image)))
        self._number = _output("lsblk", "--noheadings", "--nodeps", "--output", "MAJ:MIN", str(self._device))
        (Path("/sys/block") / self._device.name / "queue" / "read_ahead_kb").write_text("128")  # as of other disks
        _output("mkfs.ext4", "-q", "-O", "^has_journal", str(self._device))
        folder.mkdir()
        _output("mount", "-o", "noatime", str(self._device), str(folder))

    def close(self) -> None:
        """Leave nothing of it."""
        self.limit(0, 0)
        (self._memory.parent / "cgroup.procs").write_text(str(os.getpid()))
        if self._memory.exists():
            self._memory.rmdir()
        _output("umount", "--lazy", str(self._folder))  # libvips keeps pictures open for a while
        _output("losetup", "--detach", str(self._device))
        self._image.unlink()

    def limit(self, read: float, written: float) -> None:
        """Bytes per second; 0: as fast as it goes."""
        for way, speed in (("read", read), ("write", written)):
            rule = self._speed / f"blkio.throttle.{way}_bps_device"
            rule.write_text(f"{self._number} {speed:.0f}")

    def bound_memory(self, limit: int) -> None:
        """Let this process, its page cache included, have no more than `limit` bytes."""
        self._memory.mkdir(exist_ok=True)
        (self._memory / "memory.limit_in_bytes").write_text(str(limit))
        (self._memory / "cgroup.procs").write_text(str(os.getpid()))

    def counted(self) -> tuple[int, int]:
        """Bytes (read, written) so far."""
        numbers = (Path("/sys/block") / self._device.name / "stat").read_text().split()
        return int(numbers[2]) * 512, int(numbers[6]) * 512


def _output(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


class Bench:
    """One stage, rendered again and again."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options = folder, options
        self.weights = options["weights"] or make_weights(folder / "random.safetensors", options["divide"])
        for number, name in enumerate(("content", "style")):
            make_picture(folder / f"{name}.png", 512, 512, number)

    def run(self, name: str, iterations: int, count: Callable[[], Any] = lambda: None) -> Taken:
        options = self.options
        return render(
            self.folder,
            name,
            {
                "content": "content.png",
                "styles": [{"image": "style.png"}],
                "size": options["size"],
                "initial_size": options["size"],
                "network": {"name": "vgg19", "weights": str(self.weights)},
                "optimizer": {"max_iterations": iterations},
                "compute": {"device": options["device"], "dtype": options["dtype"], "tile_px": options["tile"]},
                "memory": {"limit": options["limit"]},
                "store": {"chunk_px": options["chunk"], "state_dtype": options["state_dtype"]},
            },
            count,
        )


def measure_device(bench: Bench, iterations: int, disk: SlowDevice, cache: int) -> list[dict[str, Any]]:
    """One row per speed of a device. Means, as the kernel writes when it likes; `cache`: bytes of page cache."""
    free = bench.run("free", iterations)
    compute_s = _means(free)["compute"]
    disk.bound_memory(free.host_bytes + cache)
    counted = bench.run("counted", iterations, disk.counted)
    rows = [_device_row("as it is", free, (0, 0))]
    read, written = _bytes_each(counted)
    if read < written / 10:
        raise click.ClickException("the page cache holds it all, so no speed of the disk matters: a larger --size.")
    for part in PARTS:
        speeds = read / (part * compute_s), written / (part * compute_s)
        disk.limit(*speeds)
        taken = bench.run(f"slow-{part}", iterations, disk.counted)
        disk.limit(0, 0)
        each = _bytes_each(taken)
        seconds = each[0] / speeds[0], each[1] / speeds[1]
        rows.append(_device_row("{:.0f} MB/s read, {:.0f} written".format(*(x / 1e6 for x in speeds)), taken, seconds))
    return rows


def _bytes_each(taken: Taken) -> tuple[float, float]:
    """Bytes (read, written) of an iteration."""
    counted = taken.last["counted"][FIRST - 1 :]
    (read, written), (last_read, last_written) = counted[0], counted[-1]
    count = len(counted) - 1
    return (last_read - read) / count, (last_written - written) / count


def _device_row(name: str, taken: Taken, io_s: tuple[float, float]) -> dict[str, Any]:
    return {"disk": name, "io_s": max(io_s), "seconds": _means(taken), "taken": asdict(taken)}


def _means(taken: Taken) -> dict[str, float]:
    busy = taken.last["busy"][FIRST:]
    return {kind: sum(one.get(kind, 0.0) for one in busy) / len(busy) for kind in ("wall", *KINDS)}


def measure_model(bench: Bench, iterations: int, slow: bool) -> list[dict[str, Any]]:
    """One row per disk: seconds of an iteration by kind, and of its bytes at the disk's speed."""
    counts = []
    for number in (1, iterations):  # their difference is iterations alone
        with SlowDisk(None).in_use() as disk:
            free = bench.run(f"free-{number}", number)
        counts.append(disk.bytes)
    bytes_each = (counts[1] - counts[0]) / max(1, iterations - 1)
    rows = [{"disk": "as it is", "io_s": 0.0, "seconds": _medians(free), "taken": asdict(free)}]
    compute_s = free.per_iteration("compute")
    for part in PARTS if slow else ():
        io_s = part * compute_s
        with SlowDisk(bytes_each / io_s).in_use():
            taken = bench.run(f"slow-{part}", iterations)
        name = f"{bytes_each / io_s / 1e6:.0f} MB/s"
        rows.append({"disk": name, "io_s": io_s, "seconds": _medians(taken), "taken": asdict(taken)})
    return rows


def _medians(taken: Taken) -> dict[str, float]:
    return {kind: taken.per_iteration(kind) for kind in ("wall", *KINDS)}


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table(title="seconds of an iteration; all kinds but compute are sums over threads")
    for column in ("disk", "s/it", *KINDS, "waiting", "I/O s", "s/it ÷ max(compute, I/O)"):
        table.add_column(column, justify="right")
    for row in rows:
        times = list(row["seconds"].values())
        wall, compute = row["seconds"]["wall"], row["seconds"]["compute"]
        bound = wall / max(compute, row["io_s"])
        figures = (f"{1 - compute / wall:.0%}", f"{row['io_s']:.3f}", f"{bound:.2f}")
        table.add_row(row["disk"], *(f"{value:.3f}" for value in times), *figures)
    Console(width=160).print(table)


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--size", default=2048, show_default=True, help="Side of the square canvas, px.")
@click.option("--tile", default=512, show_default=True, help="Side of a tile, px.")
@click.option("--chunk", default=256, show_default=True, help="Side of a chunk, px.")
@click.option("--state-dtype", type=click.Choice(["float", "compact"]), default="float", show_default=True)
@click.option("--iterations", default=4, show_default=True)
@click.option("--disk", type=click.Choice(["model", "device", "none"]), default="model", show_default=True)
@click.option("--cache", default=128, show_default=True, help="MiB of page cache for --disk device.")
@click.option("--limit", default="16GiB", show_default=True, help="memory.limit")
@click.option("--weights", type=click.Path(path_type=Path), help="A weights file; default random of VGG-19's widths.")
@click.option("--divide", default=1, show_default=True, help="Random weights of VGG-19's widths divided by this.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Where to work.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here too.")
def main(iterations: int, disk: str, cache: int, folder: Path | None, json_path: Path | None, **options: Any) -> None:
    """Print what an iteration's time goes to."""
    set_up_process()
    if disk == "device" and iterations < FIRST + 2:
        raise click.UsageError(f"--disk device needs --iterations {FIRST + 2}: the first {FIRST} are not counted.")
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        if disk == "device":
            device = SlowDevice(Path(name) / "disk", 2**26 + 120 * options["size"] ** 2)
            stack.callback(device.close)
            rows = measure_device(Bench(Path(name) / "disk", options), iterations, device, cache * 2**20)
        else:
            rows = measure_model(Bench(Path(name), options), iterations, disk == "model")
        show(rows)
        if json_path:
            json_path.write_text(json.dumps({"machine": machine(options["device"]), "rows": rows}), "utf-8")


if __name__ == "__main__":
    main()
