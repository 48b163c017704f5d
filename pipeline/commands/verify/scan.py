"""Scans a whole run directory: journal, manifest, inputs and store. Read-only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pipeline.commands.commits import end_reason
from pipeline.commands.verify.store_check import (
    ExpectedStage,
    Problem,
    SampleSpec,
    StoreDamage,
    expected_stages,
    foreign_at_the_top,
    store_damage,
)
from pipeline.config import AnyConfig, ApplyConfig, Config, dotted, faults_in, input_files, result_fields
from pipeline.core.errors import DamagedStateError
from pipeline.core.events import Sink, reporter
from pipeline.executors import Executor
from pipeline.network import sha256_of, weights_path
from pipeline.rundir import (
    Identity,
    Journal,
    JournalState,
    Manifest,
    OtherFormatError,
    Position,
    begun_manifest,
    checked_position,
    journal_path,
    links_in_store,
    lost_its_stages,
    manifest_path,
    read_manifest,
    refuse_changes,
    refuse_unknown_stage,
    resolved,
    stages_of,
    store_path,
)


@dataclass(frozen=True)
class ScanResult:
    """The content of a run directory, and all damage to it.

    `manifest`: from the journal if its file is damaged; None if both are. `expected`: what the store must hold.
    `inputs_intact`: all input files are those that the run began with. `leftovers`: files that nothing reads.
    `checked` of `total` chunks were read.
    """

    work_dir: Path
    manifest: Manifest | None
    journal: JournalState
    position: Position
    expected: list[ExpectedStage]
    problems: list[Problem]
    leftovers: list[Path]
    notes: list[str]
    inputs_intact: bool
    checked: int
    total: int


@dataclass(frozen=True)
class _InputSpec:
    """An input file, and its SHA-256 when the run began."""

    key: str
    path: Path
    sha256: str


def input_task(spec: _InputSpec) -> Problem | None:
    """Compares an input file with the hash in the manifest; None if it is intact."""
    restore = f"({spec.key}); restore the file that the run began with"
    try:
        if sha256_of(spec.path) == spec.sha256:
            return None
        return Problem(spec.path, "changed", f"is another file than when the run began {restore}")
    except OSError as error:
        if not spec.path.exists():
            return Problem(spec.path, "missing", f"is missing {restore}")
        return Problem(spec.path, "unreadable", f"cannot be read {restore} ({error})")


def scan(
    work_dir: Path, config: AnyConfig | None, sample: SampleSpec | None, executor: Executor, sink: Sink
) -> ScanResult:
    """Compare everything in a run directory with the journal and the manifest.

    `config`: gives the paths of inputs that have moved since the run began. Raises ConfigError if it is the config of
    another run, OtherFormatError for a run of another version.
    """
    journal = Journal(journal_path(work_dir)).inspect()
    position = checked_position(journal.records, journal_path(work_dir))
    problems, notes = _journal_problems(work_dir, journal, position)
    manifest, manifest_problems = _manifest(manifest_path(work_dir), journal, position)
    config = _config(work_dir, config, manifest, position)
    ended = position.stage_done or bool(config and manifest and position.slots and _ended(position, config, manifest))
    # before the first stage is prepared, inputs may still be changed
    specs = _input_specs(work_dir, manifest, config) if position.slots and manifest and config else []
    inputs = [problem for problem in executor.map(input_task, specs) if problem is not None]
    expected = expected_stages(work_dir, position, ended)
    if links := [Problem(path, "foreign", f"{what}, and no run makes one") for path, what in links_in_store(work_dir)]:
        in_store = StoreDamage(links)  # a file behind a link may be anybody's, so nothing is read through one
        notes.append("the store is not looked into while there are links in it")
    elif position.cleaned:  # a killed `clean` leaves some of it, which nothing reads
        in_store = StoreDamage(leftovers=[store_path(work_dir)] if store_path(work_dir).exists() else [])
    else:
        progress = reporter(sink, position.stage, "verify")
        in_store = store_damage(work_dir, expected, sample, executor, progress)
    foreign, leftovers = foreign_at_the_top(work_dir, lambda path: _is_own(path, config, position))
    return ScanResult(
        work_dir=work_dir,
        manifest=manifest,
        journal=journal,
        position=position,
        expected=expected,
        problems=[*problems, *manifest_problems, *inputs, *in_store.problems, *foreign],
        leftovers=[*leftovers, *in_store.leftovers],
        notes=notes,
        inputs_intact=not inputs,
        checked=in_store.checked,
        total=in_store.total,
    )


def _journal_problems(work_dir: Path, journal: JournalState, position: Position) -> tuple[list[Problem], list[str]]:
    """(problems, notes) of the journal."""
    path = journal_path(work_dir)
    if journal.damaged_line is not None:
        what = f"line {journal.damaged_line} or the one before it was changed; only what comes before it can be trusted"
        return [Problem(path, "changed", what)], []
    notes = ["the journal's last line is incomplete: a crash cut it short, and the next run drops it"]
    notes = notes[: journal.torn]
    if not position.is_fixed and lost_its_stages(work_dir, journal.records):
        kind = "truncated" if path.exists() else "missing"
        return [Problem(path, kind, f"has no record of what is in {store_path(work_dir)}")], notes
    if position.cleaned:
        notes.append("the state was deleted with `pipeline clean`: there is no canvas to check")
    elif not position.slots:
        notes.append("no stage is prepared yet, so the next run reads the inputs as they are then")
    return [], notes


def _manifest(path: Path, journal: JournalState, position: Position) -> tuple[Manifest | None, list[Problem]]:
    """(the manifest, or the journal's copy if the file is damaged; what is wrong with the file)."""
    copy = begun_manifest(journal.records)
    try:
        manifest = read_manifest(path)
    except OtherFormatError:
        raise
    except DamagedStateError as error:
        if not path.exists():
            return copy, [Problem(path, "missing", "is missing")]
        return copy, [Problem(path, "changed", f"cannot be read ({error.__cause__})")]
    if position.is_fixed and manifest != copy:
        return copy, [Problem(path, "changed", "is intact, but not the manifest that the journal began with")]
    return manifest, []


def _config(work_dir: Path, given: AnyConfig | None, manifest: Manifest | None, position: Position) -> AnyConfig | None:
    """The given config, else the manifest's; None without a manifest.

    Raises DamagedStateError if the manifest's config is invalid on this machine or in this version, or if the journal
    records a stage that the manifest does not have.
    """
    if manifest is None:
        return None
    refuse_unknown_stage(work_dir, manifest, position)
    if given is not None:
        given = resolved(given)
        if position.is_fixed:
            keys = {dotted(key) for key, _ in input_files(given)}
            keys |= {"network.weights"} if isinstance(given, Config) else set()
            # the content of the files is compared later, where a difference is damage and not another config
            hashes = {key: manifest.inputs.get(key, "not there") for key in keys}
            refuse_changes(given, manifest, Identity(result_fields(given), hashes))
        return given
    model: type[AnyConfig] = ApplyConfig if manifest.command == "apply" else Config
    try:
        # export options are no part of the state, and may be corrected at any time
        values = {**manifest.config.model_dump(), "export": {}}
        if model is ApplyConfig:
            values.pop("optimizer")
        return model.model_validate(values)
    except ValidationError as error:
        raise DamagedStateError(
            f"{manifest_path(work_dir)}: the run's config in it does not work here and now "
            f"({faults_in(error, model)}), so nothing can be checked against it. Correct the cause, or give the run's "
            "config with --config."
        ) from error


def _ended(position: Position, config: AnyConfig, manifest: Manifest) -> bool:
    if not isinstance(config, Config):
        return False
    stage = stages_of(manifest, position)[position.stage]
    settings = config.for_stage(max(stage.size)).optimizer
    if position.stage >= len(manifest.stages):  # it was added, with a number of iterations of its own
        settings = settings.model_copy(update={"max_iterations": stage.max_iterations})
    return position.prepared and end_reason(position, settings) is not None


def _input_specs(work_dir: Path, manifest: Manifest, config: AnyConfig) -> list[_InputSpec]:
    """Raises DamagedStateError if the config reads a file of which the manifest has no hash."""
    files = {dotted(key): path for key, path in input_files(config)}
    if isinstance(config, Config):
        weights = weights_path(config.network.name, config.network.weights)
        files |= {} if weights is None else {"network.weights": weights}
    if missing := files.keys() - manifest.inputs.keys():
        raise DamagedStateError(
            f"{manifest_path(work_dir)}: has no hash of what its config reads as {', '.join(sorted(missing))}, so the "
            "two are not of one run. Restore the run directory from a copy."
        )
    return [_InputSpec(key, path, manifest.inputs[key]) for key, path in files.items()]


def _is_own(path: Path, config: AnyConfig | None, position: Position) -> bool:
    """Whether a path in the run directory is an output image, a part of one, or an input."""
    outputs = {Path(output) for output in position.pictures} | ({config.output} if config else set())
    if any(path.name.startswith(output.stem) and path.parent == output.parent for output in outputs):
        return True  # a DeepZoom image is a file and a folder
    inputs = [item for _, item in input_files(config)] if config else []
    return any(path == item or path in item.parents for item in inputs)
