"""Kill a small run at every file operation, one after another, and see that it always ends with the same picture.

For each system call that changes files, the run is killed (SIGKILL, by strace's fault injection) at its first, second,
third … call of that name, until there are no more; every killed run is started again and must end with the bytes of an
unbroken one. strace counts the calls of each thread by itself. Needs strace and the right to use ptrace.

    python tools/torture_strace.py --jobs 2
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pyvips
from rich.console import Console
from rich.table import Table

CALLS = ("rename", "fsync", "unlink", "unlinkat", "rmdir", "mkdir", "ftruncate", "fallocate", "pwrite64")
CONFIG = """
content: content.png
styles: [{image: style.png}]
output: out.png
size: 64
initial_size: 32
network: {name: random}
optimizer: {max_iterations: 2}
compute: {tile_px: 32}
store: {chunk_px: 32}
"""
COMMAND = (str(Path(sys.executable).with_name("pipeline")), "run", "--config", "c.yaml", "--log-format", "plain")
TIMEOUT_S = 300
MOST_CALLS = 1000


@dataclass(frozen=True)
class Outcome:
    """What became of one system call: how often it was killed at, and what went wrong afterwards."""

    call: str
    kills: int
    failures: tuple[str, ...]


def new_folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    (folder / "c.yaml").write_text(CONFIG, encoding="utf-8")
    for seed, image in enumerate(("content.png", "style.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype="uint8")
        pyvips.Image.new_from_array(pixels).write_to_file(str(folder / image))
    return folder


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "out.png").read_bytes()).hexdigest()


def run(folder: Path, *prefix: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *COMMAND], cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def kill_and_resume(parent: Path, call: str, count: int, wanted: str) -> tuple[bool, str | None]:
    """(was it killed, what went wrong afterwards)."""
    folder = new_folder(parent, f"{call}-{count}")
    inject = f"inject={call}:signal=SIGKILL:when={count}"
    first = run(folder, "strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject)
    killed = first.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    again = run(folder) if killed else first
    problem = None
    if again.returncode != 0:
        problem = f"{call} {count}: exit {again.returncode}: {again.stderr.strip().splitlines()[-1:]}"
    elif digest(folder) != wanted:
        problem = f"{call} {count}: another picture"
    elif hidden := [path.name for path in folder.iterdir() if path.name.startswith(".")]:
        problem = f"{call} {count}: left {hidden}"
    if problem is None:
        shutil.rmtree(folder)
    return killed, problem


def torture(parent: Path, call: str, every: int, wanted: str) -> Outcome:
    failures: list[str] = []
    kills = 0
    for count in range(1, MOST_CALLS, every):
        killed, problem = kill_and_resume(parent, call, count, wanted)
        failures += [problem] if problem else []
        if not killed:
            break
        kills += 1
    return Outcome(call, kills, tuple(failures))


@click.command()
@click.option("--jobs", default=2, show_default=True, help="Runs at the same time.")
@click.option("--every", default=1, show_default=True, help="Kill only at every so many calls.")
@click.option("--call", "calls", multiple=True, default=CALLS, help="Only these system calls.")
def main(jobs: int, every: int, calls: tuple[str, ...]) -> None:
    """Kill at every file operation; exit 1 if a run did not recover."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        parent = Path(name)
        whole = new_folder(parent, "whole")
        run(whole).check_returncode()
        outcomes = list(pool.map(lambda call: torture(parent, call, every, digest(whole)), calls))
    table = Table()
    for column in ("system call", "kills", "recovered"):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        table.add_row(outcome.call, str(outcome.kills), str(outcome.kills - len(outcome.failures)))
    Console().print(table)
    for failure in (failure for outcome in outcomes for failure in outcome.failures):
        print(failure)
    sys.exit(any(outcome.failures for outcome in outcomes))


if __name__ == "__main__":
    main()
