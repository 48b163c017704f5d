"""Give the program thousands of wrong configs, pictures and weights, and see that each is refused in a line or works.

Every case goes through the command line's own entry point, in one of a few processes that live long, with a limit on
the memory that it may take on top, and on time. Whatever the case is, it must end with exit 0 and a plan, or with 2 or
3 and an error of one line (a config's: a line per problem), and with nothing else on stderr. What ends otherwise is
kept, with what was said.

    python -m tools.torture.fuzz --cases 12000 --jobs 2 --keep failures --json fuzz.json
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

from tools.torture.fuzz_configs import value_cases, yaml_cases
from tools.torture.fuzz_files import Case, image_cases, weights_cases

KINDS: dict[str, Callable[[random.Random, int], Iterator[Case]]] = {
    "config text": yaml_cases,
    "config values": value_cases,
    "picture": image_cases,
    "weights": weights_cases,
}
# On top of what a worker has when a case begins. `limits.max_decode_bytes` of the cases is a quarter of it.
MEMORY_BYTES = 2**30
CPU_S = 20.0
# Of the clock, for a case that waits for something: the machine may be busy with other things.
WALL_S = 180.0
# Networks and shapes of weights are kept per process.
CASES_PER_WORKER = 400
PROBLEM = re.compile(r"(.+:[1-9]\d*:[1-9]\d*|--set .*?): \S.*")
USAGE = re.compile(r"Usage: .*\nTry '.*' for help\.\n\nError: .*\n")


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what is wrong with that; "" if nothing is."""

    code: int | None
    out: str
    err: str
    cpu_s: float
    grown_bytes: int
    wrong: str = ""


def cases(kind: str, count: int, number: int) -> Iterator[Case]:
    """`count` cases of a kind, at most."""
    return KINDS[kind](random.Random(f"{kind} {number}"), count)


def judged(outcome: Outcome, kind: str) -> str:
    """What is wrong with the way a command ended."""
    if outcome.code not in (0, 2, 3):
        return f"exit code {outcome.code}"
    if outcome.cpu_s > CPU_S:
        return f"{outcome.cpu_s:.0f} s"
    if outcome.code == 0:
        return "words on stderr" if outcome.err else ""
    fine = USAGE.fullmatch(outcome.err) if outcome.code == 2 else tells_problems(outcome.err, kind)
    return "" if fine and not outcome.out else "not told as it should be"


def tells_problems(err: str, kind: str) -> bool:
    """Whether this is an error of one line, or of a line for each problem of a config, and nothing else."""
    if not all(char == "\n" or char.isprintable() or char in "\u2028\u202e\ufeff\ufffd" for char in err):
        return False
    if re.fullmatch(r"pipeline: error: .+\n", err):
        return True
    start, _, lines = err.partition("pipeline: error:\n")
    problems = lines.removesuffix("\n").split("\n")
    return not start and kind.startswith("config") and len(problems) <= 41 and all(map(PROBLEM.fullmatch, problems))


# --- in a worker ---


def serve(connection: Any, folder: str) -> None:
    """Run the cases that come, until None comes."""
    import torch  # noqa: PLC0415

    from pipeline.cli import app  # noqa: PLC0415 - here, so that the process that asks stays small

    torch.set_num_threads(1)
    os.chdir(folder)
    log = os.open("/dev/null", os.O_RDWR)
    os.dup2(log, 0)
    connection.send("ready")
    while (case := connection.recv()) is not None:
        connection.send(run_case(case, app.main))


def run_case(case: Case, main: Callable[[], Any]) -> Outcome:
    """The outcome of a case's command, or of the run after it if that follows."""
    for path in Path().iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, data in case.files.items():
        Path(name).write_bytes(data)
    outcome = run_command(case.argv, main, case.kind)
    if case.then_run and outcome.code == 0 and not outcome.wrong:
        outcome = run_command(("run", "-c", "c.yaml", "--log-format", "json"), main, f"{case.kind} run")
    return outcome


def run_command(argv: Iterable[str], main: Callable[[], Any], kind: str) -> Outcome:
    sys.argv = ["pipeline", *argv]
    process = psutil.Process()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory is counted from here
    before, started = process.memory_info().rss, time.process_time()
    code: int | None = None
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        kept = [os.dup(1), os.dup(2)]
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + MEMORY_BYTES, hard))
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
        texts = [read(file) for file in (out, err)]
    grown = peak_bytes() - before
    outcome = Outcome(code, texts[0], texts[1], time.process_time() - started, grown)
    told = progress_left_out(outcome) if kind.endswith("run") else outcome
    return Outcome(**{**asdict(outcome), "wrong": judged(told, kind)})


def progress_left_out(outcome: Outcome) -> Outcome:
    """A run tells what it does on stderr: what is judged is how it ends."""
    lines = [line for line in outcome.err.splitlines(keepends=True) if not line.startswith('{"event": ')]
    return Outcome(**{**asdict(outcome), "err": "".join(lines)})


def read(file: Any) -> str:
    file.seek(0)
    return str(file.read(2**20).decode("utf-8", "replace"))


def status_kb(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[1])  # type: ignore[index]


def data_bytes() -> int:
    return 1024 * status_kb("VmData")


def peak_bytes() -> int:
    return 1024 * status_kb("VmHWM")


# --- in the process that asks ---


class Worker:
    """A process that runs cases, started anew where one has ended or hung."""

    def __init__(self) -> None:
        self._context = mp.get_context("spawn")
        self._folder = tempfile.mkdtemp(prefix="fuzz-")
        self._process: Any = None
        self._connection: Any = None
        self._done = 0

    def run(self, case: Case) -> Outcome:
        if self._process is None or self._done % CASES_PER_WORKER == 0:
            self._start()
        self._done += 1
        self._connection.send(case)
        try:
            if self._connection.poll(WALL_S):
                return self._connection.recv()  # type: ignore[no-any-return]
            wrong = f"hangs for {WALL_S:.0f} s"
        except EOFError:
            self._process.join()
            wrong = f"the process died ({self._process.exitcode})"
        self._end()
        return Outcome(None, "", "", 0, 0, wrong)

    def _start(self) -> None:
        self._end()
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(theirs, self._folder), daemon=True)
        self._process.start()
        theirs.close()
        assert self._connection.recv() == "ready"  # importing may take its time, and is no case's

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def close(self) -> None:
        self._end()
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass
class Tally:
    """What became of the cases of one kind."""

    cases: int = 0
    codes: Counter[str] | None = None
    cpu_s: float = 0.0
    slowest_s: float = 0.0
    most_bytes: int = 0
    failures: int = 0

    def add(self, outcome: Outcome) -> None:
        self.codes = self.codes or Counter()
        self.codes[str(outcome.code)] += 1
        self.cases += 1
        self.cpu_s += outcome.cpu_s
        self.slowest_s = max(self.slowest_s, outcome.cpu_s)
        self.most_bytes = max(self.most_bytes, outcome.grown_bytes)
        self.failures += bool(outcome.wrong)


Told = Callable[[Case, Outcome], None]


def fuzz(wanted: dict[str, int], number: int, jobs: int, tell: Told = lambda case, outcome: None) -> dict[str, Tally]:
    """Run `wanted` cases of every kind; `tell` hears of every one that ends as it must not."""
    tallies = {kind: Tally() for kind in wanted}
    stream = chain.from_iterable(cases(kind, count, number) for kind, count in wanted.items())
    workers = [Worker() for _ in range(jobs)]
    free = list(workers)

    def one(case: Case) -> tuple[Case, Outcome]:
        worker = free.pop()
        try:
            return case, worker.run(case)
        finally:
            free.append(worker)

    try:
        with ThreadPoolExecutor(jobs) as pool:
            for case, outcome in in_order(pool, one, stream, 4 * jobs):
                tallies[case.kind].add(outcome)
                if outcome.wrong:
                    tell(case, outcome)
    finally:
        for worker in workers:
            worker.close()
    return tallies


def in_order(
    pool: ThreadPoolExecutor, one: Callable[[Case], tuple[Case, Outcome]], stream: Iterator[Case], ahead: int
) -> Iterator[tuple[Case, Outcome]]:
    """As pool.map, but with no more than `ahead` cases in memory: some have megabytes."""
    waiting = deque(pool.submit(one, case) for case in islice(stream, ahead))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(pool.submit(one, case) for case in islice(stream, 1))


def keep(folder: Path, index: int, case: Case, outcome: Outcome) -> None:
    """The files of a case, its command, and what it said."""
    place = folder / f"{index:04d} {case.kind}"
    place.mkdir(parents=True, exist_ok=True)
    for name, data in case.files.items():
        (place / name).write_bytes(data)
    said = f"{' '.join(case.argv)}\nthen run: {case.then_run}\nwrong: {outcome.wrong}\nexit: {outcome.code}\n"
    (place / "said.txt").write_text(said + f"\n--- stderr\n{outcome.err}\n--- stdout\n{outcome.out}", encoding="utf-8")


@click.command(help=__doc__)
@click.option("--cases", "count", default=12_000, show_default=True, help="Of all kinds together.")
@click.option("--seed", "number", default=0, show_default=True)
@click.option("--jobs", default=2, show_default=True)
@click.option("--kind", "kinds", type=click.Choice(sorted(KINDS)), multiple=True, help="Only these.")
@click.option("--keep", "folder", type=click.Path(path_type=Path), help="Where failing cases are kept.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where the figures are written.")
def main(
    count: int, number: int, jobs: int, kinds: tuple[str, ...], folder: Path | None, json_path: Path | None
) -> None:
    """See the module."""
    os.environ["OMP_NUM_THREADS"] = "1"
    chosen = kinds or tuple(KINDS)
    kept: list[str] = []

    def tell(case: Case, outcome: Outcome) -> None:
        print(f"{case.kind}: {outcome.wrong}: {outcome.err.strip()[-300:]}", flush=True)
        if folder:
            keep(folder, len(kept), case, outcome)
        kept.append(outcome.wrong)

    tallies = fuzz(dict.fromkeys(chosen, count // len(chosen)), number, jobs, tell)
    table = Table(box=None)
    for column in (
        "kind",
        "cases",
        "exit 0",
        "exit 2",
        "exit 3",
        "other",
        "CPU s",
        "slowest s",
        "MB on top",
        "failures",
    ):
        table.add_column(column, justify="right")
    for kind, tally in tallies.items():
        codes = tally.codes or Counter()
        known = [codes[code] for code in ("0", "2", "3")]
        figures = [tally.cases, *known, tally.cases - sum(known), round(tally.cpu_s), round(tally.slowest_s, 2)]
        table.add_row(kind, *map(str, figures), f"{tally.most_bytes / 1e6:.0f}", str(tally.failures))
    Console().print(table)
    if json_path:
        found = {kind: {**asdict(tally), "codes": dict(tally.codes or {})} for kind, tally in tallies.items()}
        json_path.write_text(json.dumps({"seed": number, "kinds": found, "failures": kept}, indent=2), encoding="utf-8")
    sys.exit(bool(kept))


if __name__ == "__main__":
    main()
