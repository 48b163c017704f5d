"""The share of an iteration in which no tile computes, on the disk as it is and on one that the kernel slows down.

    python -m tools.bench.overlap --device cuda:0 --size 8192 --dtype float32 --json overlap.json
    python -m tools.bench.overlap --divide 8 --size 3072 --tile 512 --iterations 6 --disk device

Goals: at most 10 % waiting where the network is the limit; on a slow disk, seconds of an iteration at most
1.1 × max(compute, I/O).

`--disk device` mounts ext4 on a loop device (a file in memory) and limits its read and write rate through cgroups, so
that the bytes of an iteration take 0.5, 1 and 2 times as long as the computation. The page cache is limited too. This
mode needs root, loop devices and version 1 cgroups.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from pipeline.core.allocator import set_up_process
from tools.bench.runs import Taken, machine, make_image, make_weights, render

# Time that the bytes of an iteration take, relative to its computation.
IO_SHARES = (0.5, 1.0, 2.0)
# Iterations left out of a device's figures: the first updates after its gradient pass, and the second writes the dirty
# pages that the first left.
SKIPPED = 2
KINDS = ("compute", "read", "write", "update", "wait")


class SlowDevice:
    """A block device in memory, mounted at `folder`, whose read and write rates can be limited."""

    _memory = Path("/sys/fs/cgroup/memory/pipeline-bench")
    _throttle = Path("/sys/fs/cgroup/blkio")

    def __init__(self, folder: Path, size: int) -> None:
        if os.geteuid() or not all(path.exists() for path in (self._memory.parent, self._throttle)):
            raise click.ClickException("--disk device needs root and the version 1 cgroups memory and blkio.")
        self._image, self._folder = Path("/dev/shm") / f"{folder.parent.name}.img", folder
        with self._image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        self._device = Path(_output("losetup", "--find", "--show", str(self._image)))
        self._number = _output("lsblk", "--noheadings", "--nodeps", "--output", "MAJ:MIN", str(self._device))
        (Path("/sys/block") / self._device.name / "queue" / "read_ahead_kb").write_text("128")  # a disk's default
        _output("mkfs.ext4", "-q", "-O", "^has_journal", str(self._device))
        folder.mkdir()
        _output("mount", "-o", "noatime", str(self._device), str(folder))

    def close(self) -> None:
        """Unmount the device and remove its image and its cgroup."""
        self.limit(0, 0)
        (self._memory.parent / "cgroup.procs").write_text(str(os.getpid()))
        if self._memory.exists():
            self._memory.rmdir()
        _output("umount", "--lazy", str(self._folder))  # libvips keeps image files open for a while
        _output("losetup", "--detach", str(self._device))
        self._image.unlink()

    def limit(self, read: float, written: float) -> None:
        """Set the rates in bytes per second; 0 removes the limit."""
        for direction, rate in (("read", read), ("write", written)):
            rule = self._throttle / f"blkio.throttle.{direction}_bps_device"
            rule.write_text(f"{self._number} {rate:.0f}")

    def bound_memory(self, limit: int) -> None:
        """Limit the memory of this process, page cache included, to `limit` bytes."""
        self._memory.mkdir(exist_ok=True)
        (self._memory / "memory.limit_in_bytes").write_text(str(limit))
        (self._memory / "cgroup.procs").write_text(str(os.getpid()))

    def byte_counts(self) -> tuple[int, int]:
        """Bytes (read, written) since the device was created."""
        numbers = (Path("/sys/block") / self._device.name / "stat").read_text().split()
        return int(numbers[2]) * 512, int(numbers[6]) * 512


def _output(*command: str) -> str:
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    if process.returncode:
        raise click.ClickException(f"{' '.join(command)}: {process.stderr.strip()}")
    return process.stdout.strip()


class Bench:
    """One stage, rendered several times under changing conditions."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options = folder, options
        self.weights = options["weights"] or make_weights(folder / "random.safetensors", options["divide"])
        for number, name in enumerate(("content", "style")):
            make_image(folder / f"{name}.png", 512, 512, number)

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


def measure_device(bench: Bench, iterations: int, disk: SlowDevice, cache_bytes: int) -> list[dict[str, Any]]:
    """One row per speed of the device, with `cache_bytes` of page cache.

    Figures are means over iterations, because the kernel decides when it writes dirty pages.
    """
    unlimited = bench.run("unlimited", iterations)
    compute_s = _means(unlimited)["compute"]
    disk.bound_memory(unlimited.host_bytes + cache_bytes)
    read, written = _bytes_per_iteration(bench.run("counted", iterations, disk.byte_counts))
    rows = [_device_row("as it is", unlimited, (0, 0))]
    # with next to no reads the requested rate would be a few KB/s: the kernel then blocks, and SIGKILL does not help
    if read < written / 10:
        raise click.ClickException("the page cache holds the whole state: choose a larger --size.")
    for share in IO_SHARES:
        rates = read / (share * compute_s), written / (share * compute_s)
        disk.limit(*rates)
        taken = bench.run(f"slow-{share}", iterations, disk.byte_counts)
        disk.limit(0, 0)
        per_iteration = _bytes_per_iteration(taken)
        seconds = per_iteration[0] / rates[0], per_iteration[1] / rates[1]
        rows.append(_device_row("{:.0f} MB/s read, {:.0f} written".format(*(x / 1e6 for x in rates)), taken, seconds))
    return rows


def _bytes_per_iteration(taken: Taken) -> tuple[float, float]:
    """Bytes (read, written)."""
    counts = taken.last["counted"][SKIPPED - 1 :]
    (read, written), (last_read, last_written) = counts[0], counts[-1]
    iterations = len(counts) - 1
    return (last_read - read) / iterations, (last_written - written) / iterations


def _device_row(name: str, taken: Taken, io_s: tuple[float, float]) -> dict[str, Any]:
    return {"disk": name, "io_s": max(io_s), "seconds": _means(taken), "taken": asdict(taken)}


def _means(taken: Taken) -> dict[str, float]:
    busy = taken.last["busy"][SKIPPED:]
    return {kind: sum(times.get(kind, 0.0) for times in busy) / len(busy) for kind in ("wall", *KINDS)}


def measure_free(bench: Bench, iterations: int) -> list[dict[str, Any]]:
    """One row: median seconds of an iteration by kind of work, on the disk as it is."""
    taken = bench.run("free", iterations)
    medians = {kind: taken.per_iteration(kind) for kind in ("wall", *KINDS)}
    return [{"disk": "as it is", "io_s": 0.0, "seconds": medians, "taken": asdict(taken)}]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="seconds per iteration; every kind except compute is a sum over threads")
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
@click.option("--disk", type=click.Choice(["none", "device"]), default="none", show_default=True)
@click.option("--cache", default=128, show_default=True, help="Page cache for --disk device, MiB.")
@click.option("--limit", default="16GiB", show_default=True, help="memory.limit")
@click.option("--weights", type=click.Path(path_type=Path), help="VGG-19-shaped weights file; default: random weights.")
@click.option("--divide", default=1, show_default=True, help="Divide the widths of the random weights by this.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Working folder; default: temporary.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
def main(iterations: int, disk: str, cache: int, folder: Path | None, json_path: Path | None, **options: Any) -> None:
    """Print how the time of an iteration is spent."""
    set_up_process()
    if disk == "device" and iterations < SKIPPED + 2:
        raise click.UsageError(f"--disk device needs --iterations {SKIPPED + 2} or more; it skips {SKIPPED}.")
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        if disk == "device":
            device = SlowDevice(Path(name) / "disk", 2**26 + 120 * options["size"] ** 2)
            stack.callback(device.close)
            rows = measure_device(Bench(Path(name) / "disk", options), iterations, device, cache * 2**20)
        else:
            rows = measure_free(Bench(Path(name), options), iterations)
        show(rows)
        if json_path:
            json_path.write_text(json.dumps({"machine": machine(options["device"]), "rows": rows}), "utf-8")


if __name__ == "__main__":
    main()
