"""Small runs that are killed, and the checks on their state and on their final result."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.image_formats import PixelKind
from tests.support.e2e import Child, Event, Nursery, canvases, gradient_tiles, keys_of, leftovers, results, write_run
from tests.support.syscalls import HALVED, Call, Verdict, Watch

KILLED = -signal.SIGKILL

# Two stages of two iterations, the second of four tiles: covers ingest, all passes, upsampling and export.
SMALL_RUN: dict[str, Any] = {
    "initial_size": 32,
    "optimizer": {"max_iterations": 2},
    "compute": {"device": "cpu", "tile_px": 32},
    "store": {"chunk_px": 32, "commit_interval": 0},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "tiff": {"output": "out.tif"},
    # in memory, and committed at the end of a stage: its last iteration but one first
    "deepzoom": {"output": "out.dz", "init": "noise", "store": {"chunk_px": 32, "commit_interval": "1h"}},
    "ome-zarr": {
        "output": "out.zarr",
        "store": {"chunk_px": 32, "codec": "zstd", "commit_interval": 0},
        "content_kind": PixelKind(16, alpha=True),
        "optimizer": {"max_iterations": 2, "carry": True},
    },
    "power": {
        "output": "out.png",
        # in memory, and committed after every iteration
        "store": {"chunk_px": 32, "durability": "power", "state_dtype": "compact", "commit_interval": "0.001s"},
        "optimizer": {"max_iterations": 2, "average": 0.9, "carry": True},
        "stage_ratio": 1.9,  # 32, 61 and 64 px, of which the second is left out
        "stage_smoothing": True,
        "style_stages": False,
        "dequantize": True,
    },
}


def write_variant(folder: Path, variant: str, **keys: Any) -> Path:
    """Write the inputs and the config of a small run to `folder`; returns the config."""
    return write_run(folder, (64, 64), (48, 40), **{**SMALL_RUN, **VARIANTS[variant], **keys})


@dataclass(frozen=True)
class Ending:
    """The result of a run: the records of its work, its store, its output image, and temporary files left behind."""

    results: list[dict[str, Any]]
    canvases: dict[str, bytes]
    output: dict[str, bytes]
    leftovers: list[str]

    @staticmethod
    def of(config: Path) -> Ending:
        """The result of the run of a config."""
        work_dir, output = places(config)
        return Ending(results(work_dir), canvases(work_dir), tree(output), leftovers(output))

    def differences(self, other: Ending) -> list[str]:
        """The names of the parts that differ."""
        return [name for name in vars(self) if getattr(self, name) != getattr(other, name)]


def places(config: Path) -> tuple[Path, Path]:
    """work_dir and output of a config."""
    keys = yaml.safe_load(config.read_text())
    return config.parent / keys["work_dir"], config.parent / keys["output"]


def tree(path: Path) -> dict[str, bytes]:
    """Every file at or below `path`, by its relative path."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


PHASES = ("preparation", "iteration", "between stages", "export")
_INGEST = ("content", "style", "style Gram", "canvas", "content features")
_PASSES = ("Gram pass", "gradient pass", "update pass")


def phase_of(events: list[Event]) -> str:
    """The phase of a run after these events; `between stages` is the preparation of any stage but the first."""
    for event in reversed(events):
        kind, what, later = event["event"], event.get("what"), event.get("stage", 0) > 0
        if what in _PASSES or kind == "IterationDone":
            return "iteration"
        if what == "export" or (kind == "StageDone" and later):  # there are two stages
            return "export"
        if what in _INGEST or kind in ("StageStarted", "StageDone"):
            return "between stages" if later or kind == "StageDone" else "preparation"
    return "preparation"


@dataclass
class Score:
    """The attempts at one run: the phases in which they were killed, and the gradient tiles of all of them."""

    kills: list[str] = field(default_factory=list)
    tiles: int = 0
    problems: list[str] = field(default_factory=list)
    code: int = 0

    def add(self, child: Child) -> None:
        """Add a finished attempt; any exit other than success or SIGKILL is a problem."""
        self.code, events = child.wait(), child.events()
        self.tiles += gradient_tiles(events)
        if self.code == KILLED:
            self.kills.append(phase_of(events))
        elif self.code:
            self.problems.append(f"exit {self.code}: {child.err.strip().splitlines()[-1:]}")


def damage(work_dir: Path) -> list[str]:
    """The problems that `verify` finds in `work_dir`; none if the run can resume."""
    from pipeline import verify
    from pipeline.core.errors import PipelineError

    if not {"manifest.json", "journal.jsonl"} & {path.name for path in work_dir.glob("*")}:
        return []  # killed before the run was created
    try:
        return [str(problem) for problem in verify(work_dir).remaining]
    except PipelineError as error:
        return [str(error)]


def start(nursery: Nursery, config: Path, **options: Any) -> Child:
    """Start `pipeline run`, or `apply` if it is a config of that, with events on its output."""
    command = "apply" if "networks" in yaml.safe_load(config.read_text()) else "run"
    return nursery.start(command, "-c", config, "--log-format", "json", **options)


@dataclass(frozen=True)
class Unbroken:
    """An undisturbed small run: its result, the calls by which it changed files, its events."""

    ending: Ending
    calls: list[Call]
    events: list[Event]

    @staticmethod
    def of(nursery: Nursery, folder: Path, variant: str) -> Unbroken:
        """Run a variant in `folder`."""
        config = write_variant(folder, variant)
        watch, score = Watch(config.parent, lambda _call: Verdict.GO), Score()
        child = start(nursery, config, watch=watch)
        score.add(child)
        assert not score.problems, score.problems
        return Unbroken(Ending.of(config), watch.wait(), child.events())

    def compare(self, config: Path, score: Score) -> None:
        """Add to a score the differences of a finished run from this one."""
        score.problems += self.ending.differences(Ending.of(config)) + damage(places(config)[0])
        # a kill costs at most what was not committed: one iteration of four tiles in the second stage, or both of them
        iterations = 2 if yaml.safe_load(config.read_text())["store"]["commit_interval"] == "1h" else 1
        if score.tiles > (tiles := gradient_tiles(self.events)) + 4 * iterations * len(score.kills):
            score.problems.append(f"{score.tiles} tiles instead of {tiles}")

    def moments(self) -> dict[tuple[Any, ...], str]:
        """The keys of all events in order, and the phase of the run after each."""
        phases = [phase_of(self.events[: number + 1]) for number, event in enumerate(self.events) if keys_of([event])]
        return dict(zip(keys_of(self.events), phases, strict=True))


@dataclass(frozen=True)
class Target:
    """The nth occurrence of a call in a run, and the verdict on it."""

    call: Call
    occurrence: int
    verdict: Verdict

    def __str__(self) -> str:
        middle = "the middle of " if self.verdict is Verdict.HALF else ""
        return f"{middle}{self.call.name} {self.call.path} ({self.occurrence})"

    def judge(self) -> Callable[[Call], Verdict]:
        """A judge for one Watch."""
        counts: Counter[Call] = Counter()

        def judge(call: Call) -> Verdict:
            counts[call] += 1
            return self.verdict if (call, counts[call]) == (self.call, self.occurrence) else Verdict.GO

        return judge


def targets_of(calls: list[Call]) -> list[Target]:
    """A target before every call of a run, and one in the middle of every write."""
    targets: list[Target] = []
    counts: Counter[Call] = Counter()
    for call in calls:
        counts[call] += 1
        verdicts = (Verdict.KILL, Verdict.HALF) if call.name in HALVED else (Verdict.KILL,)
        targets += [Target(call, counts[call], verdict) for verdict in verdicts]
    return targets


def at_number(number: int) -> Callable[[Call], Verdict]:
    """A judge that kills at the call of this number."""
    numbers = itertools.count(1)
    return lambda _call: Verdict.KILL if next(numbers) == number else Verdict.GO


def kill_at(nursery: Nursery, config: Path, target: Target, unbroken: Unbroken, again: int = 0) -> Score:
    """Kill the run of a config at the target, resume it, and compare; a score without kills did not reach the target.

    With `again`, the second start is killed too, at its call of this number.
    """
    score = Score()
    attempt(nursery, config, score, target.judge())
    if score.kills and again:
        attempt(nursery, config, score, at_number(again))
    if score.kills:
        score.add(start(nursery, config))
    unbroken.compare(config, score)
    return score


def attempt(nursery: Nursery, config: Path, score: Score, judge: Callable[[Call], Verdict]) -> None:
    """Start a run under this judge, and check the state that it leaves."""
    watch = Watch(config.parent, judge)
    score.add(start(nursery, config, watch=watch))
    watch.wait()
    score.problems += damage(places(config)[0])


def kill_at_random(nursery: Nursery, config: Path, unbroken: Unbroken, kills: int, rng: random.Random) -> Score:
    """Kill a run up to `kills` times in random phases, each later than the last; let it finish, and compare."""
    score, passed = Score(), -1
    moments = unbroken.moments()
    rank = {key: number for number, key in enumerate(moments)}
    for _ in range(kills):
        ahead = {key: phase for key, phase in moments.items() if rank[key] > passed}
        if not ahead:
            break
        phase = rng.choice(sorted(set(ahead.values())))
        aim = rank[rng.choice([key for key, key_phase in ahead.items() if key_phase == phase])]
        child = start(nursery, config)
        if rng.random() < 0.1:  # most likely before the first event, while it starts or resumes
            time.sleep(rng.uniform(0, 0.3))
        else:
            child.wait_until(lambda events, aim=aim: any(rank.get(key, -1) >= aim for key in keys_of(events)))
            time.sleep(rng.choice((0, rng.uniform(0, 0.01), rng.uniform(0, 0.1))))
        child.kill()
        passed = max([passed, *(rank[key] for key in keys_of(child.events()) if key in rank)])
        score.add(child)
        score.problems += damage(places(config)[0])
    score.add(start(nursery, config))
    unbroken.compare(config, score)
    return score
