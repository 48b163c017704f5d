"""Compares the store with the journal: chunks, array metadata and file names. Read-only."""

from __future__ import annotations

import math
import random
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import store
from pipeline.core.files import is_of_the_system
from pipeline.core.text import stage_name
from pipeline.executors import Executor
from pipeline.rundir import Position, stage_path, store_path
from pipeline.store import (
    METADATA,
    CheckSpec,
    ChunkError,
    Finding,
    OnProgress,
    StageArray,
    check_metadata,
    checksum,
    gram_key,
    group_metadata,
    integrity,
    is_aid,
    is_stage_array,
    kept_files,
    packed,
    read_gram,
    slot_names,
)

# The folder to which a repair moves unknown files, in the run directory.
FOREIGN = "foreign-files"
_ROOT = re.compile(
    rf"manifest\.json|journal\.jsonl|lock|lock\.owner|tasks\.(?:lock|token|probe.*)|store\.zarr|{FOREIGN}|.*\.damaged-[0-9]+"
)
_STAGE = re.compile(r"stage_([0-9]+)")


@dataclass(frozen=True)
class Problem:
    """One damaged or foreign file.

    `kind`: changed, truncated, missing, foreign or unreadable. `chunk`: (row, column) of a chunk of `array`.
    """

    path: Path
    kind: str
    what: str
    stage: int | None = None
    array: str | None = None
    chunk: tuple[int, int] | None = None

    def __str__(self) -> str:
        place = "" if self.stage is None else f" ({stage_name(self.stage)}"
        place += f", {self.array}" if self.array else ""
        place += f", chunk row {self.chunk[0]}, column {self.chunk[1]}" if self.chunk else ""
        return f"{self.kind}: {self.path}{place and place + ')'} {self.what}"


@dataclass(frozen=True)
class ExpectedStage:
    """What the store must hold of one stage according to the journal.

    `live`: the packed chunk checksums of every array that is still read. `spare`: arrays that the next iteration
    overwrites, whose content is unused. `metadata`: the checksum of every metadata file, by its path in the stage.
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
    """All damage in the store. `checked` of `total` chunks were read; of the others only the size was compared."""

    problems: list[Problem] = field(default_factory=list)
    leftovers: list[Path] = field(default_factory=list)
    checked: int = 0
    total: int = 0


@dataclass(frozen=True)
class SampleSpec:
    """Read only this share of every array's chunks, at least one. `seed`: which ones."""

    share: float
    seed: int = field(default_factory=lambda: secrets.randbits(32))


def expected_stages(work_dir: Path, position: Position, ended: bool) -> list[ExpectedStage]:
    """What the store must hold at this position. `ended`: the current stage needs no iteration, only its result."""
    stages = []
    for stage, sums in sorted(position.checksums.items()):
        only_result = ended or stage < position.stage
        slot, names = position.slots[stage], tuple(sums)
        if only_result:
            names = kept_files(slot, sums, moments=stage in position.carrying)
        stages.append(_expected_stage(stage_path(work_dir, stage), stage, slot, {name: sums[name] for name in names}))
    return stages


def _expected_stage(folder: Path, stage: int, slot: int, sums: Mapping[str, str]) -> ExpectedStage:
    metadata = {name: value for name, value in sums.items() if name.endswith(METADATA)}
    names = [name.removesuffix(f"/{METADATA}") for name in metadata if name != METADATA]
    idle = slot_names(1 - slot, averaged=True)
    spare = tuple(name for name in names if name in idle or name not in sums)
    return ExpectedStage(stage, folder, {name: sums[name] for name in names if name not in spare}, spare, metadata)


def store_damage(
    work_dir: Path,
    stages: Sequence[ExpectedStage],
    sample: SampleSpec | None,
    executor: Executor,
    on_progress: OnProgress,
) -> StoreDamage:
    """Everything in the store that differs from the journal."""
    damage = StoreDamage()
    _check_group(store_path(work_dir) / METADATA, stages, damage)
    arrays: dict[Path, StageArray | None] = {}
    for stage in stages:
        intact = _check_metadata(stage, damage)
        for name in stage.arrays:
            arrays[stage.folder / name] = _open(stage, name, damage) if name in intact else None
    specs = list(_specs(arrays, sample, damage))
    findings = integrity.damage(specs, executor, on_progress)
    damage.problems += [problem_of(finding, stages) for finding in findings]
    _check_names(work_dir, stages, arrays, damage)
    return damage


def _check_group(path: Path, stages: Sequence[ExpectedStage], damage: StoreDamage) -> None:
    """The store's own metadata: the same as that of every stage, or what today's zarr writes."""
    if not path.parent.exists() and not stages:
        return  # the run was killed before it created its store
    checksums = {packed([checksum(group_metadata())]), *(stage.metadata[METADATA] for stage in stages)}
    errors = [_metadata_error(path.parent, METADATA, value) for value in checksums]
    if None not in errors and errors[0] is not None:
        damage.problems.append(problem_of((path, errors[0]), []))


def _check_metadata(stage: ExpectedStage, damage: StoreDamage) -> set[str]:
    """The names of the arrays whose metadata is intact."""
    intact = set()
    for name, checksums in stage.metadata.items():
        if error := _metadata_error(stage.folder, name, checksums):
            damage.problems.append(problem_of((stage.folder / name, error), [stage]))
        else:
            intact.add(name.removesuffix(f"/{METADATA}"))
    return intact


def _metadata_error(folder: Path, name: str, checksums: str) -> ChunkError | OSError | None:
    try:
        check_metadata(folder, name, checksums)
        return None
    except (ChunkError, OSError) as error:
        return error


def _open(stage: ExpectedStage, name: str, damage: StoreDamage) -> StageArray | None:
    """The array, with checksums if it is live; None for a style target, which is one small file and checked here."""
    key = gram_key(name)
    if key is None:
        return store.open_array(stage.folder, name, stage.live.get(name))
    damage.total += 1
    damage.checked += 1
    try:
        read_gram(stage.folder, key, stage.live[name])
    except (ChunkError, OSError) as error:
        damage.problems.append(problem_of((stage.folder / name / "c" / "0" / "0", error), [stage]))
    return None


def _specs(
    arrays: Mapping[Path, StageArray | None], sample: SampleSpec | None, damage: StoreDamage
) -> Iterator[CheckSpec]:
    rng = random.Random(sample.seed if sample else 0)
    for array in arrays.values():
        if array is None:
            continue
        indices = array.chunk_indices()
        if array.checksums is None:
            yield from integrity.specs_of(array, indices)
            continue
        damage.total += len(indices)
        chosen = rng.sample(indices, math.ceil(sample.share * len(indices))) if sample else indices
        damage.checked += len(chosen)
        yield from integrity.specs_of(array, sorted(chosen))
        # comparing sizes reads no pixels, so the sample does not spare it
        others = sorted(set(indices) - set(chosen))
        yield from integrity.specs_of(replace(array, checksums=None), others)


def problem_of(finding: Finding, stages: Sequence[ExpectedStage]) -> Problem:
    """A finding as a problem, with the stage, array and chunk that its path names."""
    path, error = finding
    kind, what = "unreadable", f"cannot be read ({error})"
    if isinstance(error, ChunkError):
        kind, what = error.kind, error.what
    for stage in stages:
        if path.is_relative_to(stage.folder):
            array, *inner = path.relative_to(stage.folder).parts
            chunk = (int(inner[1]), int(inner[2])) if inner and inner[0] == "c" else None
            return Problem(path, kind, what, stage.stage, array if inner else None, chunk)
    return Problem(path, kind, what)


# --- file names -----------------------------------------------------------------------------------------------------


def _check_names(
    work_dir: Path, stages: Sequence[ExpectedStage], arrays: Mapping[Path, StageArray | None], damage: StoreDamage
) -> None:
    """Lists leftovers, and files that no run makes."""
    newest = max((stage.stage for stage in stages), default=-1)
    expected = {stage.folder: stage for stage in stages}
    for path in _entries(store_path(work_dir)):
        if path in expected:
            _check_stage_names(expected[path], arrays, expected[path].stage == newest, damage)
        elif _STAGE.fullmatch(path.name) or _is_left_over(path):
            # a stage that was prepared but not committed, or was rolled back: its next preparation replaces it
            damage.leftovers.append(path)
        elif path.name != METADATA:
            damage.problems.append(_foreign(path, None, None))


def _check_stage_names(
    stage: ExpectedStage, arrays: Mapping[Path, StageArray | None], newest: bool, damage: StoreDamage
) -> None:
    for path in _entries(stage.folder):
        if path.name in stage.arrays:
            files = _chunk_files(path, arrays[path])
            if files is not None:
                _check_array_names(path, {*files, path / METADATA}, stage.stage, damage)
        elif _is_left_over(path) or (newest and is_stage_array(path.name)):
            damage.leftovers.append(path)  # the stage has ended, and the next run deletes its other arrays
        elif path.name != METADATA and not (is_aid(path.name) and path.is_file()):
            damage.problems.append(_foreign(path, stage.stage, None))


def _chunk_files(path: Path, array: StageArray | None) -> set[Path] | None:
    """The chunk files of an array; None if its metadata, which defines them, is damaged."""
    if array is not None:
        return {array.chunk_path(cy, cx) for cy, cx in array.chunk_indices()}
    return {path / "c" / "0" / "0"} if gram_key(path.name) else None


def _check_array_names(array_dir: Path, files: Collection[Path], stage: int, damage: StoreDamage) -> None:
    folders = {parent for file in files for parent in file.parents}
    for path in _walk(array_dir, folders):
        if path in files:
            continue
        if _is_left_over(path):
            damage.leftovers.append(path)
        else:
            damage.problems.append(_foreign(path, stage, array_dir.name))


def _walk(folder: Path, into: Collection[Path]) -> Iterator[Path]:
    """All entries below `folder`; folders in `into` are entered, and others are named but not entered."""
    for path in _entries(folder):
        if path in into and path.is_dir():
            yield from _walk(path, into)
        else:
            yield path


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_left_over(path: Path) -> bool:
    """Whether nothing reads a file: a temporary file of a killed run, or one of a desktop or a file server."""
    return path.name.endswith(".partial") or is_of_the_system(path.name)


def _foreign(path: Path, stage: int | None, array: str | None) -> Problem:
    return Problem(path, "foreign", "is nothing that a run makes", stage, array)


def foreign_at_the_top(work_dir: Path, own: Callable[[Path], bool]) -> tuple[list[Problem], list[Path]]:
    """(foreign files, leftovers) in the run directory itself. `own`: whether a path is an output image or an input."""
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
