"""Feed thousands of malformed configs, images and weights to the program, and check that it works or refuses cleanly.

Every case runs through the command line's entry point in one of a few long-lived processes, with limits on additional
memory and on time. A case must end with exit code 0 and a plan, or with 2 or 3 and a one-line error (for a config one
line per problem), and print nothing else to stderr. Cases that fail are kept together with their output.

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
# Additional memory that a case may use; `limits.max_decode_bytes` of the cases is a quarter of it.
MEMORY_BYTES = 2**30
CPU_S = 20.0
# Elapsed time, generous because the machine may be busy.
WALL_S = 180.0
# Workers are restarted, because every process caches networks and shapes of weights.
CASES_PER_WORKER = 400
PROBLEM = re.compile(r"(.+:[1-9]\d*:[1-9]\d*|--set .*?): \S.*")
USAGE = re.compile(r"Usage: .*\nTry '.*' for help\.\n\nError: .*\n")


@dataclass(frozen=True)
class Outcome:
    """How a command ended; `wrong`: the reason why that is a failure, or ""."""

    code: int | None
    out: str
    err: str
    cpu_s: float
    grown_bytes: int
    wrong: str = ""


def cases(kind: str, count: int, number: int) -> Iterator[Case]:
    """At most `count` cases of a kind."""
    return KINDS[kind](random.Random(f"{kind} {number}"), count)


def judged(outcome: Outcome, kind: str) -> str:
    """The reason why an outcome is a failure, or ""."""
    if outcome.code not in (0, 2, 3):
        return f"exit code {outcome.code}"
    if outcome.cpu_s > CPU_S:
        return f"{outcome.cpu_s:.0f} s"
    if outcome.code == 0:
        return "output on stderr" if outcome.err else ""
    well_formed = USAGE.fullmatch(outcome.err) if outcome.code == 2 else is_error_message(outcome.err, kind)
    return "" if well_formed and not outcome.out else "malformed error message"


def is_error_message(err: str, kind: str) -> bool:
    """Whether the text is a one-line error, or one line per problem of a config, and nothing else."""
    if not all(char == "\n" or char.isprintable() or char in "\u2028\u202e\ufeff\ufffd" for char in err):
        return False
    if re.fullmatch(r"pipeline: error: .+\n", err):
        return True
    start, _, lines = err.partition("pipeline: error:\n")
    problems = lines.removesuffix("\n").split("\n")
    return not start and kind.startswith("config") and len(problems) <= 41 and all(map(PROBLEM.fullmatch, problems))


# --- in a worker ---


def serve(connection: Any, folder: str) -> None:
    """Run the cases from `connection` until None arrives."""
    import torch  # noqa: PLC0415

    from pipeline.cli import app  # noqa: PLC0415 - keeps the parent process small

    torch.set_num_threads(1)
    os.chdir(folder)
    log = os.open("/dev/null", os.O_RDWR)
    os.dup2(log, 0)
    connection.send("ready")
    while (case := connection.recv()) is not None:
        connection.send(run_case(case, app.main))


def run_case(case: Case, main: Callable[[], Any]) -> Outcome:
    """The outcome of a case's command, or of the run that follows it."""
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
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    before, started = process.memory_info().rss, time.process_time()
    code: int | None = None
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        saved = [os.dup(1), os.dup(2)]
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
            for number, descriptor in enumerate(saved, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
        texts = [read(file) for file in (out, err)]
    grown = peak_bytes() - before
    outcome = Outcome(code, texts[0], texts[1], time.process_time() - started, grown)
    relevant = without_events(outcome) if kind.endswith("run") else outcome
    return Outcome(**{**asdict(outcome), "wrong": judged(relevant, kind)})


def without_events(outcome: Outcome) -> Outcome:
    """The outcome without the event lines that a run prints to stderr."""
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


# --- in the parent process ---


class Worker:
    """A process that runs cases; it is restarted when it dies or hangs."""

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
        assert self._connection.recv() == "ready"  # the time of imports does not count

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
    """Statistics of the cases of one kind."""

    cases: int = 0
    codes: Counter[str] | None = None
    cpu_s: float = 0.0
    slowest_s: float = 0.0
    peak_bytes: int = 0
    failures: int = 0

    def add(self, outcome: Outcome) -> None:
        self.codes = self.codes or Counter()
        self.codes[str(outcome.code)] += 1
        self.cases += 1
        self.cpu_s += outcome.cpu_s
        self.slowest_s = max(self.slowest_s, outcome.cpu_s)
        self.peak_bytes = max(self.peak_bytes, outcome.grown_bytes)
        self.failures += bool(outcome.wrong)


OnFailure = Callable[[Case, Outcome], None]


def fuzz(
    counts: dict[str, int], number: int, jobs: int, on_failure: OnFailure = lambda case, outcome: None
) -> dict[str, Tally]:
    """Run `counts` cases of every kind; `on_failure` is called with every failure."""
    tallies = {kind: Tally() for kind in counts}
    stream = chain.from_iterable(cases(kind, count, number) for kind, count in counts.items())
    workers = [Worker() for _ in range(jobs)]
    free = list(workers)

    def run_one(case: Case) -> tuple[Case, Outcome]:
        worker = free.pop()
        try:
            return case, worker.run(case)
        finally:
            free.append(worker)

    try:
        with ThreadPoolExecutor(jobs) as pool:
            for case, outcome in in_order(pool, run_one, stream, 4 * jobs):
                tallies[case.kind].add(outcome)
                if outcome.wrong:
                    on_failure(case, outcome)
    finally:
        for worker in workers:
            worker.close()
    return tallies


def in_order(
    pool: ThreadPoolExecutor, run_one: Callable[[Case], tuple[Case, Outcome]], stream: Iterator[Case], ahead: int
) -> Iterator[tuple[Case, Outcome]]:
    """Like pool.map, with at most `ahead` cases in memory, because some have megabytes."""
    waiting = deque(pool.submit(run_one, case) for case in islice(stream, ahead))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(pool.submit(run_one, case) for case in islice(stream, 1))


def keep(folder: Path, index: int, case: Case, outcome: Outcome) -> None:
    """Write the files of a failed case, its command and its output to a folder."""
    place = folder / f"{index:04d} {case.kind}"
    place.mkdir(parents=True, exist_ok=True)
    for name, data in case.files.items():
        (place / name).write_bytes(data)
    report = f"{' '.join(case.argv)}\nthen run: {case.then_run}\nwrong: {outcome.wrong}\nexit: {outcome.code}\n"
    (place / "report.txt").write_text(
        report + f"\n--- stderr\n{outcome.err}\n--- stdout\n{outcome.out}", encoding="utf-8"
    )


@click.command(help=__doc__)
@click.option("--cases", "count", default=12_000, show_default=True, help="Cases of all kinds together.")
@click.option("--seed", "number", default=0, show_default=True)
@click.option("--jobs", default=2, show_default=True)
@click.option("--kind", "kinds", type=click.Choice(sorted(KINDS)), multiple=True, help="Run only this kind.")
@click.option("--keep", "folder", type=click.Path(path_type=Path), help="Keep failed cases in this folder.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
def main(
    count: int, number: int, jobs: int, kinds: tuple[str, ...], folder: Path | None, json_path: Path | None
) -> None:
    """Run the cases; exit with 1 if one fails."""
    os.environ["OMP_NUM_THREADS"] = "1"
    chosen = kinds or tuple(KINDS)
    failures: list[str] = []

    def on_failure(case: Case, outcome: Outcome) -> None:
        print(f"{case.kind}: {outcome.wrong}: {outcome.err.strip()[-300:]}", flush=True)
        if folder:
            keep(folder, len(failures), case, outcome)
        failures.append(outcome.wrong)

    tallies = fuzz(dict.fromkeys(chosen, count // len(chosen)), number, jobs, on_failure)
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
        "extra MB",
        "failures",
    ):
        table.add_column(column, justify="right")
    for kind, tally in tallies.items():
        codes = tally.codes or Counter()
        known = [codes[code] for code in ("0", "2", "3")]
        figures = [tally.cases, *known, tally.cases - sum(known), round(tally.cpu_s), round(tally.slowest_s, 2)]
        table.add_row(kind, *map(str, figures), f"{tally.peak_bytes / 1e6:.0f}", str(tally.failures))
    Console().print(table)
    if json_path:
        kinds_json = {kind: {**asdict(tally), "codes": dict(tally.codes or {})} for kind, tally in tallies.items()}
        json_path.write_text(
            json.dumps({"seed": number, "kinds": kinds_json, "failures": failures}, indent=2), encoding="utf-8"
        )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
