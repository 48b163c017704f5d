"""Looking over a whole run directory: its records, its inputs, its store. Nothing is written here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from pipeline.commands.run import end_reason
from pipeline.commands.verify.store_check import (
    ExpectedStage,
    Problem,
    SampleSpec,
    StoreDamage,
    expected_stages,
    foreign_at_the_top,
    store_damage,
)
from pipeline.config.config import Config, input_files, result_fields
from pipeline.config.messages import faults_in
from pipeline.config.yaml_reader import dotted
from pipeline.core.errors import DamagedStateError
from pipeline.core.events import Sink, WorkDone
from pipeline.executors.graph import Executor
from pipeline.network.weights import sha256_of, weights_path
from pipeline.rundir.journal import Journal, JournalState
from pipeline.rundir.manifest import OtherFormatError, begun_manifest, read_manifest
from pipeline.rundir.open import Identity, lost_its_stages, refuse_changes, refuse_unknown_stage
from pipeline.rundir.paths import journal_path, links_in_store, manifest_path, store_path
from pipeline.rundir.position import Position, checked_position
from pipeline.rundir.records import Manifest


@dataclass(frozen=True)
class ScanResult:
    """What a run directory holds, and what is wrong with it.

    `manifest`, `config`: what the run began with; None if nothing readable says so. `ended`: the current stage needs no
    iteration any more. `held`: what the store must hold. `inputs_whole`: all that a stage is prepared from is as it
    was. `checked` of `total` chunks were read.
    """

    work_dir: Path
    manifest: Manifest | None
    config: Config | None
    journal: JournalState
    position: Position
    ended: bool
    held: list[ExpectedStage]
    problems: list[Problem]
    leftovers: list[Path]
    notes: list[str]
    inputs_whole: bool
    checked: int
    total: int


@dataclass(frozen=True)
class _InputSpec:
    """An input file, and its SHA-256 when the run began."""

    key: str
    path: Path
    sha256: str


def input_task(spec: _InputSpec) -> Problem | None:
    """What is wrong with an input file."""
    restore = f"({spec.key}); restore the file that the run began with"
    try:
        if sha256_of(spec.path) == spec.sha256:
            return None
        return Problem(spec.path, "changed", f"is another file than when the run began {restore}")
    except OSError as error:
        if not spec.path.exists():
            return Problem(spec.path, "missing", f"is missing {restore}")
        return Problem(spec.path, "unreadable", f"cannot be read {restore} ({error})")


def scan(work_dir: Path, config: Config | None, sample: SampleSpec | None, engine: Executor, sink: Sink) -> ScanResult:
    """Everything that is wrong in a run directory.

    `config`: where the inputs are now, if not where the run began with them. Raises ConfigError if it is another run's,
    OtherFormatError for a run of another version.
    """
    journal = Journal(journal_path(work_dir)).inspect()
    position = checked_position(journal.records, journal_path(work_dir))
    problems, notes = _journal_problems(work_dir, journal, position)
    manifest, manifest_problems = _manifest(manifest_path(work_dir), journal, position)
    if manifest is not None:
        refuse_unknown_stage(work_dir, manifest, position)
    config = _config(work_dir, config, manifest, position)
    ended = position.stage_done or bool(config and manifest and position.slots and _ended(position, config, manifest))
    specs = _input_specs(work_dir, manifest, config) if position.slots and manifest and config else []
    inputs = [found for found in engine.map(input_task, specs) if found is not None]
    held = expected_stages(work_dir, position, ended)
    if links := [Problem(path, "foreign", f"{what}, and no run makes one") for path, what in links_in_store(work_dir)]:
        in_store = StoreDamage(links)  # nothing is read through a link
        notes.append("the store is not looked into while there are links in it")
    else:
        told = partial(_tell, sink, position.stage)
        in_store = store_damage(work_dir, held, sample, engine, told)
    foreign, leftovers = foreign_at_the_top(work_dir, lambda path: _is_own(path, config, position))
    return ScanResult(
        work_dir=work_dir,
        manifest=manifest,
        config=config,
        journal=journal,
        position=position,
        ended=ended,
        held=held,
        problems=[*problems, *manifest_problems, *inputs, *in_store.problems, *foreign],
        leftovers=[*leftovers, *in_store.leftovers],
        notes=notes,
        inputs_whole=not inputs,
        checked=in_store.checked,
        total=in_store.total,
    )


def _tell(sink: Sink, stage: int, done: int, total: int) -> None:
    sink(WorkDone(stage, "verify", done, total))


def _journal_problems(work_dir: Path, journal: JournalState, position: Position) -> tuple[list[Problem], list[str]]:
    path = journal_path(work_dir)
    if journal.damaged_line is not None:
        what = f"line {journal.damaged_line} or the one before it was changed; only what comes before it can be trusted"
        return [Problem(path, "changed", what)], []
    notes = ["the journal's last line is not whole: a crash cut it short, and the next run drops it"]
    if not position.slots:
        if lost_its_stages(work_dir, journal.records):
            kind = "truncated" if path.exists() else "missing"
            return [Problem(path, kind, f"has no record of what is in {store_path(work_dir)}")], notes[: journal.torn]
        notes = [*notes[: journal.torn], "no stage is prepared yet, and the next run takes the inputs as they are then"]
        return [], notes
    return [], notes[: journal.torn]


def _manifest(path: Path, journal: JournalState, position: Position) -> tuple[Manifest | None, list[Problem]]:
    """(the manifest, from the journal if need be; what is wrong with its file)."""
    copy = begun_manifest(journal.records)
    try:
        manifest = read_manifest(path)
    except OtherFormatError:
        raise
    except DamagedStateError as error:
        if not path.exists():
            return copy, [Problem(path, "missing", "is missing")]
        return copy, [Problem(path, "changed", f"cannot be read ({error.__cause__})")]
    if position.slots and manifest != copy:
        return copy, [Problem(path, "changed", "is whole, but not the manifest that the journal began with")]
    return manifest, []


def _config(work_dir: Path, given: Config | None, manifest: Manifest | None, position: Position) -> Config | None:
    """The config of the run, with the paths of the given one; None if nothing says what the run began with.

    Raises DamagedStateError for one in the manifest that is none here and now.
    """
    if manifest is None:
        return None
    if given is not None and position.slots:
        keys = {dotted(key) for key, _ in input_files(given)} | {"network.weights"}
        same_files = {
            key: manifest.inputs.get(key, "not there") for key in keys
        }  # their content is a problem of its own
        refuse_changes(given, manifest, Identity(result_fields(given), same_files))
    if given is not None:
        return given
    try:
        # how a picture is written is no part of the state, and may be corrected at any time
        return Config.model_validate({**manifest.config.model_dump(), "export": {}})
    except ValidationError as error:
        raise DamagedStateError(
            f"{manifest_path(work_dir)}: the run's config in it does not work here and now "
            f"({faults_in(error, Config)}), so nothing can be checked against it. Correct the cause, or give the run's "
            "config with --config."
        ) from error


def _ended(position: Position, config: Config, manifest: Manifest) -> bool:
    settings = config.for_stage(max(manifest.stages[position.stage].size)).optimizer
    return position.prepared and end_reason(position, settings) is not None


def _input_specs(work_dir: Path, manifest: Manifest, config: Config) -> list[_InputSpec]:
    """Raises DamagedStateError if the manifest's config reads what its inputs do not name."""
    files = {dotted(key): path for key, path in input_files(config)}
    if (weights := weights_path(config.network.name, config.network.weights)) is not None:
        files["network.weights"] = weights
    if missing := files.keys() - manifest.inputs.keys():
        raise DamagedStateError(
            f"{manifest_path(work_dir)}: has no hash of what its config reads as {', '.join(sorted(missing))}, so the "
            "two are not of one run. Restore the run directory from a copy."
        )
    return [_InputSpec(key, path, manifest.inputs[key]) for key, path in files.items()]


def _is_own(path: Path, config: Config | None, position: Position) -> bool:
    """Whether a path in the run directory is the run's picture, a part of it, or an input."""
    outputs = {Path(output) for output in position.pictures} | ({config.output} if config else set())
    if any(path.name.startswith(output.stem) and path.parent == output.parent for output in outputs):
        return True  # a DeepZoom picture is a file and a folder
    inputs = [item for _, item in input_files(config)] if config else []
    return any(path == item or path in item.parents for item in inputs)
