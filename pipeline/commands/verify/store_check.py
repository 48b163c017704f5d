"""What is wrong in a run directory: its records, its store, the files that it began with. Nothing is written here."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import store
from pipeline.core.files import is_of_the_system
from pipeline.executors.threads import Engine
from pipeline.rundir.open import stage_path
from pipeline.rundir.paths import store_path
from pipeline.rundir.position import Position
from pipeline.store import integrity
from pipeline.store import metadata as zarr_files
from pipeline.store.array import StageArray
from pipeline.store.checksums import checksum, unpacked
from pipeline.store.chunk_file import ChunkError
from pipeline.store.integrity import CheckSpec, Finding, OnProgress
from pipeline.store.layout import METADATA, gram_key, is_stage_array, kept_files, slot_names
from pipeline.store.metadata import group_metadata

# Where a repair puts what it does not understand, beside what it cuts off the journal and the store.
FOREIGN = "foreign-files"
_ROOT = re.compile(rf"manifest\.json|journal\.jsonl|lock|lock\.owner|store\.zarr|{FOREIGN}|.*\.damaged-[0-9]+")
_STAGE = re.compile(r"stage_([0-9]+)")


@dataclass(frozen=True)
class Problem:
    """One file that is not what it should be.

    `kind`: changed, truncated, missing, foreign or unreadable. `chunk`: its (row, column), where it is one of `array`.
    """

    path: Path
    kind: str
    what: str
    stage: int | None = None
    array: str | None = None
    chunk: tuple[int, int] | None = None

    def __str__(self) -> str:
        place = "" if self.stage is None else f" (stage {self.stage}"
        place += f", {self.array}" if self.array else ""
        place += f", chunk row {self.chunk[0]}, column {self.chunk[1]}" if self.chunk else ""
        return f"{self.kind}: {self.path}{place and place + ')'} {self.what}"


@dataclass(frozen=True)
class ExpectedStage:
    """What the store must hold of one stage, by the journal.

    `live`: arrays whose content counts, with their chunks' checksums. `spare`: arrays that the next iteration writes
    over, whose content is nobody's. `metadata`: checksum of every metadata file, under its path in the stage.
    """

    stage: int
    folder: Path
    live: Mapping[str, str]
    spare: tuple[str, ...]
    metadata: Mapping[str, str]

    @property
    def arrays(self) -> tuple[str, ...]:
        """All arrays of the stage."""
        return *self.live, *self.spare


@dataclass
class StoreDamage:
    """What was found in the store; `checked` of `total` chunks were read, the others only looked at."""

    problems: list[Problem] = field(default_factory=list)
    leftovers: list[Path] = field(default_factory=list)
    checked: int = 0
    total: int = 0


@dataclass(frozen=True)
class SampleSpec:
    """Read only this share of every array's chunks, at least one."""

    share: float
    seed: int


def expected_stages(work_dir: Path, position: Position, ended: bool) -> list[ExpectedStage]:
    """What the store must hold at this position. `ended`: the current stage needs nothing but its result any more."""
    return [
        _held(stage_path(work_dir, stage), stage, position.slots[stage], sums, ended or stage < position.stage)
        for stage, sums in sorted(position.checksums.items())
    ]


def _held(folder: Path, stage: int, slot: int, sums: Mapping[str, str], ended: bool) -> ExpectedStage:
    metadata = {name: value for name, value in sums.items() if name.endswith(METADATA)}
    if ended:
        kept = {name: sums[name] for name in kept_files(slot, sums)}
        live = {name: value for name, value in kept.items() if name not in metadata}
        return ExpectedStage(stage, folder, live, (), {name: kept[name] for name in kept if name in metadata})
    names = [name.removesuffix(f"/{METADATA}") for name in metadata if name != METADATA]
    idle = slot_names(1 - slot, averaged=True)
    spare = tuple(name for name in names if name in idle or name not in sums)
    return ExpectedStage(stage, folder, {name: sums[name] for name in names if name not in spare}, spare, metadata)


def store_damage(
    work_dir: Path, held: Sequence[ExpectedStage], sample: SampleSpec | None, engine: Engine, on_progress: OnProgress
) -> StoreDamage:
    """Everything in the store that is not what the journal says."""
    found = StoreDamage()
    _check_group(store_path(work_dir) / METADATA, held, found)
    arrays: dict[Path, StageArray | None] = {}
    for stage in held:
        sound = _check_metadata(stage, found)
        for name in stage.arrays:
            arrays[stage.folder / name] = _opened(stage, name, found) if name in sound else None
    specs = list(_specs(arrays, sample, found))
    findings = integrity.damage(specs, engine, on_progress)
    found.problems += [problem_of(finding, held) for finding in findings]
    _check_names(work_dir, held, arrays, found)
    return found


def group_checksums(held: Sequence[ExpectedStage]) -> set[int]:
    """What the store's own metadata may be: it holds nothing, and is as every stage's, or as zarr writes it today."""
    return {checksum(group_metadata()), *(int(unpacked(stage.metadata[METADATA])[0]) for stage in held)}


def _check_group(path: Path, held: Sequence[ExpectedStage], found: StoreDamage) -> None:
    if not path.parent.exists() and not held:
        return  # killed before it made its store
    try:
        if checksum(path.read_bytes()) not in group_checksums(held):
            found.problems.append(Problem(path, "changed", "is not what was written there"))
    except FileNotFoundError:
        found.problems.append(Problem(path, "missing", "is missing"))
    except OSError as error:
        found.problems.append(Problem(path, "unreadable", f"cannot be read ({error.strerror})"))


def _check_metadata(stage: ExpectedStage, found: StoreDamage) -> set[str]:
    """Names of the arrays whose metadata is what was written."""
    sound = set()
    for name, sums in stage.metadata.items():
        try:
            zarr_files.check_metadata(stage.folder, name, sums)
            sound.add(name.removesuffix(f"/{METADATA}"))
        except (ChunkError, OSError) as error:
            found.problems.append(problem_of((stage.folder / name, error), [stage]))
    return sound


def _opened(stage: ExpectedStage, name: str, found: StoreDamage) -> StageArray | None:
    """An array that checks its chunks if they count; None for one that takes no window, and is checked here."""
    key = gram_key(name)
    if key is None:
        return store.open_array(stage.folder, name, stage.live.get(name))
    found.total += 1
    found.checked += 1
    try:
        zarr_files.read_gram(stage.folder, key, stage.live[name])
    except (ChunkError, OSError) as error:
        found.problems.append(problem_of((stage.folder / name / "c" / "0" / "0", error), [stage]))
    return None


def _specs(
    arrays: Mapping[Path, StageArray | None], sample: SampleSpec | None, found: StoreDamage
) -> Iterator[CheckSpec]:
    rng = random.Random(sample.seed if sample else 0)
    for array in arrays.values():
        if array is None:
            continue
        indices = array.chunk_indices()
        if array.checksums is None:
            yield from integrity.specs_of(array, indices)
            continue
        found.total += len(indices)
        chosen = rng.sample(indices, math.ceil(sample.share * len(indices))) if sample else indices
        found.checked += len(chosen)
        yield from integrity.specs_of(array, sorted(chosen))
        others = sorted(set(indices) - set(chosen))
        yield from integrity.specs_of(replace(array, checksums=None), others)


def problem_of(finding: Finding, held: Sequence[ExpectedStage]) -> Problem:
    """A finding, with the stage, array and chunk that its path names."""
    path, error = finding
    kind, what = (
        (error.kind, error.what) if isinstance(error, ChunkError) else ("unreadable", f"cannot be read ({error})")
    )
    for stage in held:
        if path.is_relative_to(stage.folder):
            array, *inner = path.relative_to(stage.folder).parts
            chunk = (int(inner[1]), int(inner[2])) if inner and inner[0] == "c" else None
            return Problem(path, kind, what, stage.stage, array if inner else None, chunk)
    return Problem(path, kind, what)


# --- files that should not be there ---------------------------------------------------------------------------------


def _check_names(
    work_dir: Path, held: Sequence[ExpectedStage], arrays: Mapping[Path, StageArray | None], found: StoreDamage
) -> None:
    """Tell what is left over, and what nobody here has made."""
    last = max((stage.stage for stage in held), default=-1)
    known = {stage.folder: stage for stage in held}
    top = store_path(work_dir)
    for path in _entries(top):
        stage_number = _STAGE.fullmatch(path.name)
        if path in known:
            _check_stage_names(known[path], arrays, known[path].stage == last, found)
        elif stage_number or _is_left_over(path):
            # a stage that was prepared but not committed, or that a repair took back: prepared anew, it is replaced
            found.leftovers.append(path)
        elif path.name != METADATA:
            found.problems.append(_foreign(path, None, None))


def _check_stage_names(
    stage: ExpectedStage, arrays: Mapping[Path, StageArray | None], newest: bool, found: StoreDamage
) -> None:
    for path in _entries(stage.folder):
        if path.name in stage.arrays:
            array = arrays[path]
            keys = _chunk_files(path, array)
            if keys is not None:
                _check_array_names(path, {*keys, path / METADATA}, stage.stage, found)
        elif _is_left_over(path) or (newest and is_stage_array(path.name)):
            found.leftovers.append(path)  # the stage has ended, and the next run frees it
        elif path.name != METADATA:
            found.problems.append(_foreign(path, stage.stage, None))


def _chunk_files(path: Path, array: StageArray | None) -> set[Path] | None:
    """The chunk files of an array; None where its metadata is damaged, so that nobody knows them."""
    if array is not None:
        return {array.chunk_path(cy, cx) for cy, cx in array.chunk_indices()}
    return {path / "c" / "0" / "0"} if gram_key(path.name) else None


def _check_array_names(array_dir: Path, files: Collection[Path], stage: int, found: StoreDamage) -> None:
    folders = {parent for file in files for parent in file.parents}
    for path in _walk(array_dir, folders):
        if path in files:
            continue
        if _is_left_over(path):
            found.leftovers.append(path)
        else:
            found.problems.append(_foreign(path, stage, array_dir.name))


def _walk(folder: Path, into: Collection[Path]) -> Iterator[Path]:
    """All that is below `folder`, without looking into folders that are not among `into`, nor naming those."""
    for path in _entries(folder):
        if path in into and path.is_dir():
            yield from _walk(path, into)
        else:
            yield path


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_left_over(path: Path) -> bool:
    """Whether nothing reads a file: what a killed run left, or a desktop or a file server put there."""
    return path.name.endswith(".partial") or is_of_the_system(path.name)


def _foreign(path: Path, stage: int | None, array: str | None) -> Problem:
    return Problem(path, "foreign", "is nothing that a run makes", stage, array)


def foreign_at_the_top(work_dir: Path, own: Callable[[Path], bool]) -> tuple[list[Problem], list[Path]]:
    """(foreign files, leftovers) in the run directory itself. `own`: whether a path is a picture or an input."""
    problems, leftovers = [], []
    for path in _entries(work_dir):
        if _is_left_over(path) or ".partial-" in path.name:
            leftovers.append(path)
        elif not _ROOT.fullmatch(path.name) and not own(path):
            problems.append(_foreign(path, None, None))
    return problems, leftovers


def as_dict(problem: Problem) -> dict[str, Any]:
    """A problem as JSON-able data."""
    return {**vars(problem), "path": str(problem.path)}
