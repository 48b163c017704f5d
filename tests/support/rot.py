"""Damages a run, one file at a time, and checks that `verify` and `run` detect it.

Used by tests/faults/test_verify.py and tools/torture/rot.py. One uninterrupted run per codec gives snapshots of its
folder at the positions of STATES. A trial restores a snapshot, damages one file, and calls `verify` and `run`; some
trials repair the run too.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

import pipeline
from pipeline import store
from pipeline.core.errors import PipelineError
from pipeline.core.events import Event, IterationDone, StageDone, WorkDone
from pipeline.core.image_formats import RGB8, PixelKind
from pipeline.rundir.journal import Journal
from pipeline.rundir.position import position_of
from pipeline.rundir.records import CanvasLost, as_json
from pipeline.store.layout import result_name, slot_names
from tests.support.e2e import MEASURED, canvases, write_run
from tests.support.reference import narrow_state

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"codec": "none"},
    "zstd": {"codec": "zstd"},
    "lz4": {"codec": "lz4"},
    "compact": {"codec": "none", "state_dtype": "compact"},
    # with optional arrays: averages, and a content with alpha and 16 bits
    "rich": {"codec": "none", "state_dtype": "compact"},
}
# Three stages of 1, 4 and 20 chunks.
ITERATIONS = 4
RUN: dict[str, Any] = {
    "output": "out.tif",
    "initial_size": 40,
    "network": {"name": "vgg19", "weights": "weights.safetensors"},
    "optimizer": {"max_iterations": ITERATIONS},
}
# By name of a state: (stage, its iterations that are done, work that has begun or None).
STATES: dict[str, tuple[int, int, str | None]] = {
    "first iteration": (0, 0, "gradient pass"),
    "last iteration done": (1, ITERATIONS, None),
    "between stages": (1, ITERATIONS, "done"),
    "preparation": (2, 0, "content"),
    "after an iteration": (2, 3, None),
    "in an update": (2, 3, "update pass"),
}
FINISHED = "finished"
KINDS = ("flip", "delete", "truncate", "swap", "lost write", "foreign")
INPUTS = ("content.png", "style.png", "weights.safetensors")


@dataclass
class Base:
    """An uninterrupted run: its snapshots by state, and its results."""

    folder: Path
    variant: str
    snapshots: dict[str, Path] = field(default_factory=dict)
    older: dict[str, bytes] = field(default_factory=dict)
    picture: bytes = b""
    canvases: dict[str, bytes] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def raw(self) -> bool:
        """Whether chunks are stored uncompressed."""
        return VARIANTS[self.variant]["codec"] == "none"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def work_dir(self) -> Path:
        return self.folder / "run"

    def put_back(self, state: str) -> None:
        """Restore the folder of this state."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.snapshots[state], self.folder)

    def differences(self) -> list[str]:
        """The results of the run in the folder that differ from the uninterrupted one, except lost canvases."""
        records = Journal(self.work_dir / "journal.jsonl").read()
        lost = tuple(f"stage_{record.stage}/" for record in records if isinstance(record, CanvasLost))
        now = canvases(self.work_dir)
        wrong = [name for name in self.canvases if now.get(name) != self.canvases[name] and not name.startswith(lost)]
        wrong += ["picture"] if (self.folder / "out.tif").read_bytes() != self.picture else []
        return wrong + (["results"] if results_of(self.work_dir) != self.results else [])


def results_of(work_dir: Path) -> list[dict[str, Any]]:
    """The records of stages and iterations that were not rolled back, without times."""
    records = map(as_json, Journal(work_dir / "journal.jsonl").read())
    work = [record for record in records if record["type"] in ("stage_prepared", "iteration", "stage_done")]
    return [{key: record[key] for key in record if key not in MEASURED} for record in work]


class Watch:
    """A sink that takes the snapshots."""

    def __init__(self, base: Base, folder: Path):
        self.base, self.folder = base, folder
        self._reached = (0, 0)
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:  # events come from several threads
            self._hear(event)

    def _hear(self, event: Event) -> None:
        work = None
        if isinstance(event, IterationDone):
            self._reached = (event.stage, event.iteration + 1)
        elif isinstance(event, StageDone):
            work = "done"
        elif isinstance(event, WorkDone) and event.done > 0:
            work = event.what
            if event.stage > self._reached[0]:
                self._reached = (event.stage, 0)
        for state, position in STATES.items():
            if position == (*self._reached, work) and state not in self.base.snapshots:
                self.take(state)
        if self._reached == (2, 1) and not self.base.older:
            # the content of the slot if a write two iterations later is lost
            stage = self.base.work_dir / "store.zarr" / "stage_2"
            self.base.older = {relative(self.base, path): path.read_bytes() for path in files_below(stage)}

    def take(self, state: str) -> None:
        target = self.folder / state
        shutil.copytree(self.base.folder, target, ignore=shutil.ignore_patterns("lock*", "0.*.partial"))
        self.base.snapshots[state] = target


def make_base(folder: Path, variant: str) -> Base:
    """Render a run and take snapshots meanwhile."""
    base = Base(folder / "here", variant)
    optimizer = {**RUN["optimizer"], "average": 0.8 if variant == "rich" else 0.0}
    kind = PixelKind(16, alpha=True) if variant == "rich" else RGB8
    write_run(base.folder, (150, 110), (60, 50), kind, **{**RUN, "optimizer": optimizer}, store=VARIANTS[variant])
    save_file(narrow_state(), base.folder / "weights.safetensors")
    watch = Watch(base, folder)
    pipeline.run(pipeline.load_config(base.config), sink=watch)
    watch.take(FINISHED)
    base.picture = (base.folder / "out.tif").read_bytes()
    base.canvases = canvases(base.work_dir)
    base.results = results_of(base.work_dir)
    assert set(base.snapshots) == {*STATES, FINISHED}
    return base


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def relative(base: Base, path: Path) -> str:
    return str(path.relative_to(base.folder))


# --- kinds of files ---------------------------------------------------------------------------------------------------

RECORDS = ("manifest", "journal", "input")
# What a resume reads before it renders, besides RECORDS; a finished run with its image reads only RECORDS.
READ = ("metadata", "state", "features", "style target", "needed canvas", "needed alpha")


def sort_files(base: Base) -> dict[str, list[Path]]:
    """The files of the run by their kind."""
    top = base.work_dir / "store.zarr"
    position = position_of(Journal(base.work_dir / "journal.jsonl").read())
    files: dict[str, list[Path]] = {
        "manifest": [base.work_dir / "manifest.json"],
        "journal": [base.work_dir / "journal.jsonl"],
        "input": [base.folder / name for name in INPUTS],
        "group metadata": [top / "zarr.json"],
    }
    for stage, slot in position.slots.items():
        ended = stage < position.stage or position.stage_done or position.iteration == ITERATIONS
        for path in files_below(top / f"stage_{stage}"):
            array = path.relative_to(top / f"stage_{stage}").parts[0]
            result = result_name(slot, position.checksums[stage])
            what = _of_ended(path, array, result, stage == position.stage) if ended else _of_current(path, array, slot)
            if what is not None:
                files.setdefault(what, []).append(path)
    return files


def _of_ended(path: Path, array: str, result: str, newest: bool) -> str | None:
    """The kind of a file of a stage that has ended; None for one that the next run deletes."""
    if array == "zarr.json":
        return "group metadata"
    if array == "alpha":
        return "finished metadata" if path.name == "zarr.json" else "alpha"
    if array != result:
        return None
    return "needed canvas" if newest else "finished metadata" if path.name == "zarr.json" else "finished canvas"


def _of_current(path: Path, array: str, slot: int) -> str:
    if path.name == "zarr.json":
        return "metadata"
    newest, idle = (slot_names(number, averaged=True) for number in (slot, 1 - slot))
    kinds = dict.fromkeys(newest, "state") | dict.fromkeys((*idle, "gradient"), "spare")
    kinds |= {"content": "content", "alpha": "needed alpha"}
    return kinds.get(array, "features" if array.startswith("features") else "style target")


# --- faults -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A change to a file. `what`: its kind. `detected`: whether verify has to find it; None if both are right.
    `read`: whether a resume reads the file, and must refuse.
    """

    kind: str
    path: str
    what: str
    detected: bool | None
    read: bool

    def __str__(self) -> str:
        return f"{self.kind}, {self.what}, {self.path}"


def damage(base: Base, state: str, rng: random.Random, kinds: Sequence[str] = KINDS) -> Fault | None:
    """Change one file; None if the random choice cannot be applied to it, or changes nothing."""
    files = sort_files(base)
    what = rng.choice(sorted(files))
    path, kind = rng.choice(files[what]), rng.choice(kinds)
    if kind == "foreign":
        return add_foreign(base, files, rng)
    if what == "spare" and kind in ("swap", "lost write"):
        return None
    before = path.read_bytes()
    if not CHANGES[kind](base, path, rng):
        return None
    if path.exists() and (path.read_bytes() == before or (kind == "flip" and decodes_alike(base, path, before))):
        return None
    gone = not path.exists()
    dead = what == "spare" and not gone and (kind == "flip" or not base.raw)
    if what == "journal" and not gone and kind != "flip":
        return Fault(kind, relative(base, path), what, None, False)  # an earlier position or damage
    read = what in RECORDS or (what in READ and state != FINISHED) or (what == "spare" and not dead)
    return Fault(kind, relative(base, path), what, not dead, read)


def flip(_base: Base, path: Path, rng: random.Random) -> bool:
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return True


def delete(_base: Base, path: Path, _rng: random.Random) -> bool:
    path.unlink()
    return True


def truncate(_base: Base, path: Path, rng: random.Random) -> bool:
    os.truncate(path, rng.randrange(path.stat().st_size))
    return True


def swap(_base: Base, path: Path, rng: random.Random) -> bool:
    """Exchange two chunks of an array, or delete a line of the journal."""
    if path.name == "journal.jsonl":
        lines = path.read_bytes().splitlines(keepends=True)
        lines.pop(rng.randrange(len(lines)))
        path.write_bytes(b"".join(lines))
        return True
    array = array_of(path)
    others = [other for other in files_below(array / "c") if other != path] if array else []
    if not others:
        return False
    other, before = rng.choice(others), path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(before)
    return True


def lose_write(base: Base, path: Path, _rng: random.Random) -> bool:
    """Restore the chunk of two iterations ago."""
    older = base.older.get(relative(base, path))
    if older is None or array_of(path) is None:
        return False
    path.write_bytes(older)
    return True


CHANGES: dict[str, Callable[[Base, Path, random.Random], bool]] = {
    "flip": flip,
    "delete": delete,
    "truncate": truncate,
    "swap": swap,
    "lost write": lose_write,
}


def array_of(path: Path) -> Path | None:
    """The array that a chunk's file belongs to."""
    return next((folder.parent for folder in path.parents if folder.name == "c"), None)


def add_foreign(base: Base, files: dict[str, list[Path]], rng: random.Random) -> Fault:
    """Add a file or a folder that no run makes to a folder of the run."""
    needed = {parent for paths in files.values() for path in paths for parent in path.parents}
    folder = rng.choice(sorted(parent for parent in needed if base.work_dir in (parent, *parent.parents)))
    path = folder / rng.choice(["notes.txt", "9", "zarr.json.bak", ".hidden", "stage_9x"])
    while path.exists():
        path = path.with_name(path.name + "x")
    if rng.random() < 0.3:
        path.mkdir()
    else:
        path.write_bytes(rng.randbytes(20))
    return Fault("foreign", relative(base, path), "foreign file", detected=True, read=False)


def decodes_alike(base: Base, path: Path, before: bytes) -> bool:
    """Whether a changed chunk still decodes to the same pixels: codecs have unused bits."""
    array_dir = array_of(path)
    if base.raw or array_dir is None or array_dir.name.startswith("gram"):
        return False
    array = store.open_array(array_dir.parent, array_dir.name)
    cy, cx = map(int, path.relative_to(array_dir / "c").parts[:2])
    damaged, whole = (np.empty(array.chunk_shape, array.dtype) for _ in range(2))
    after = path.read_bytes()
    try:
        array.read_chunk(cy, cx, damaged)
    except PipelineError:
        return False
    path.write_bytes(before)
    array.read_chunk(cy, cx, whole)
    path.write_bytes(after)
    return damaged.tobytes() == whole.tobytes()


# --- trials ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One fault and its results.

    `detected`: by verify. `run_code`: the exit code of a resume, 75 if it began to compute. `ended`: whether the run
    was continued to its end. `problems`: broken promises.
    """

    state: str
    variant: str
    seed: int
    fault: Fault
    detected: bool
    run_code: int
    ended: bool
    mended: bool
    iterations_lost: int
    problems: tuple[str, ...]


def try_fault(
    base: Base, state: str, seed: int, *, mend: bool = False, to_end: bool = False, kinds: Sequence[str] = KINDS
) -> Trial | None:
    """Damage the run in this state, and call verify and run.

    With `to_end`, a run that does not refuse continues to its end; with `mend`, it does so after a repair.
    """
    fault = _put_back_damaged(base, state, seed, kinds)
    if fault is None:
        return None
    before = tree_of(base)
    detected = not pipeline.verify(base.work_dir).clean
    problems = [] if tree_of(base) == before else ["verify wrote"]
    code = run_until_it_computes(base)
    if fault.detected is not None and detected != fault.detected:
        problems.append(f"verify: {'nothing found' if fault.detected else 'called damage'}")
    if fault.read and code != (3 if fault.what == "input" else 6):
        problems.append(f"run went on with {code}")
    ended = to_end and code in (0, 75)
    if ended:
        _put_back_damaged(base, state, seed, kinds)
        problems += _rendered_damage(base)
    mend = mend or (fault.detected is None and not problems)
    lost = 0
    if mend:
        _put_back_damaged(base, state, seed, kinds)
        lost, more = _mend(base, state, fault)
        problems += more
    return Trial(state, base.variant, seed, fault, detected, code, ended, mend, lost, tuple(problems))


def _put_back_damaged(base: Base, state: str, seed: int, kinds: Sequence[str]) -> Fault | None:
    base.put_back(state)
    return damage(base, state, random.Random(seed), kinds)


def _rendered_damage(base: Base) -> list[str]:
    """The problems of the image of a run that continues with its damage. A later refusal is right too."""
    try:
        pipeline.run(pipeline.load_config(base.config))
    except PipelineError:
        return []
    return [] if (base.folder / "out.tif").read_bytes() == base.picture else ["another picture was rendered"]


def tree_of(base: Base) -> dict[str, bytes]:
    return {relative(base, path): path.read_bytes() for path in files_below(base.folder) if path.name != "lock"}


def run_until_it_computes(base: Base) -> int:
    """The exit code of a resume that is stopped as soon as it has computed something."""
    stop = threading.Event()

    def sink(event: Event) -> None:
        if isinstance(event, WorkDone) and event.what != "check" and event.done > 0:
            stop.set()

    try:
        pipeline.run(pipeline.load_config(base.config), sink=sink, stop=stop)
    except PipelineError as error:
        return error.exit_code
    return 75 if stop.is_set() else 0


def _mend(base: Base, state: str, fault: Fault) -> tuple[int, list[str]]:
    """(iterations that the repair discarded, problems)."""
    report = pipeline.verify(base.work_dir, repair=True)
    lost = report.iterations_lost
    if fault.what == "input":
        if report.clean:
            return lost, ["repair: called clean without an input"]
        shutil.copyfile(base.snapshots[state] / fault.path, base.folder / fault.path)
        report = pipeline.verify(base.work_dir, repair=True)
    if not report.clean:
        return lost, [f"repair: left {[str(problem) for problem in report.remaining]}"]
    # without these records the run does not recognise its image
    forgotten = fault.what == "journal" and state == FINISHED
    try:
        pipeline.run(pipeline.load_config(base.config), force=forgotten)
    except PipelineError as error:
        return lost, [f"run after repair: {error}"]
    return lost, [f"after repair another {name}" for name in base.differences()]
