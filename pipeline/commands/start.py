"""How a run starts: what it does first, or why it is refused. `run` acts on this, and `plan` tells it.

Nothing here writes: `run` passes through the same checks before it creates or changes a file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from pipeline.commands.status import refuse_cleaned
from pipeline.config import MAX_ITERATIONS, AnyConfig, ApplyConfig, Config, ExportConfig, is_default, result_fields
from pipeline.core.cancel import NEVER, CancelToken
from pipeline.core.errors import ConfigError, PipelineError, Stopped
from pipeline.core.events import Note, Sink, ignore
from pipeline.core.files import taken
from pipeline.feedforward.start_file import check_start_file
from pipeline.network import find_weights, sha256_of, weights_path
from pipeline.plan import Plan, Sheet, sheets_of, whole_of, with_added_stages
from pipeline.rundir import (
    Identity,
    Journal,
    Manifest,
    Pictures,
    Position,
    Record,
    RunState,
    check_run,
    check_space,
    check_work_dir,
    identity,
    is_as_written,
    is_one_of,
    iterations_of,
    journal_path,
    manifest_path,
    read_manifest,
    refuse_changes,
    refuse_foreign,
    refuse_links,
    refuse_locked,
    refuse_misplaced,
    resolved,
    standing,
)
from pipeline.rundir.process_settings import process_settings

_FOREIGN = "this run did not make it"
_MAX_STAGES = 64  # as in the journal
_PROFILE_DIGEST = "profile_sha256"  # beside the export options of a record


C = TypeVar("C", Config, AnyConfig)


@dataclass(frozen=True)
class Start:
    """The start of a run that is not refused.

    `planned`: with the stages that were added to the run, also by this start, which has to record that if `adds` is
    not None. `state`: of the run on disk, as it is now. `missing`: the output images that are not there.
    """

    config: AnyConfig
    planned: Plan
    state: RunState
    adds: int | None
    missing: tuple[Path, ...]

    @property
    def text(self) -> str:  # noqa: PLR0911 - one for each kind of start
        """What `pipeline run` does, in words."""
        at, stages = self.state.position, len(self.planned.stages)
        if self.adds is not None:
            return f"adds a stage of {self.adds} iterations to the finished run"
        if not at.is_fixed:
            return "starts from the beginning"
        if at.stage_done and at.stage == stages - 1:
            if not self.missing:
                names = list(self.planned.outputs)
                return f"does nothing: {', '.join(names)} {'is' if len(names) == 1 else 'are'} already there"
            return f"writes {', '.join(map(str, self.missing))} from the finished run, and renders nothing"
        if at.stage_done:
            return f"resumes with stage {at.stage + 2} of {stages}"
        iterations = self.planned.stages[at.stage].max_iterations
        if isinstance(self.config, ApplyConfig):
            return f"resumes after {at.iteration} of {iterations} passes"
        return f"resumes in stage {at.stage + 1} of {stages}, after {at.iteration} of {iterations} iterations"


def has_begun(work_dir: Path) -> bool:
    """Whether a run has begun in this folder."""
    return taken(manifest_path(work_dir)) or taken(journal_path(work_dir))


def check_start(
    config: AnyConfig,
    planned: Plan,
    identify: Callable[[], Identity],
    *,
    force: bool = False,
    more_iterations: int | None = None,
    cancel: CancelToken = NEVER,
) -> Start:
    """Refuse what `run` refuses, and say how it starts. `planned`: without added stages. `identify`: see check_run.

    `more_iterations`: of a stage to add to a finished run. Raises the errors of errors.py.
    """
    refuse_misplaced(config.work_dir)
    if config.work_dir.exists():
        refuse_links(config.work_dir)
    if not (force or has_begun(config.work_dir)):
        refuse_foreign_outputs(planned, {})
    state = check_run(config, planned, identify)
    position = state.position
    if isinstance(config, Config) and not position.is_fixed:
        check_start_file(config, planned.stages[0])
    adds = _added(config, planned, position, more_iterations)
    extended = with_added_stages(planned, position.added if adds is None else (*position.added, adds))
    missing = missing_sheets(config, extended, position, cancel)
    there = adds is None and not missing
    if not there:
        refuse_cleaned(config.work_dir, position)
        if not force:
            refuse_foreign_outputs(extended, position.pictures, cancel)
    if position.is_fixed and not there:
        check_stage_space(config, extended, position, position.stage + position.stage_done)
    return Start(config, extended, state, adds, tuple(sheet.path for sheet in missing))


def check_stage_space(config: AnyConfig, planned: Plan, position: Position, stage: int) -> None:
    """Raise SpaceError if the disks lack space from this stage on, which may be prepared already."""
    prepared = position.prepared and position.stage == stage
    # uncompressed arrays are allocated when the stage is prepared, and overwritten in place
    allocated = prepared and config.store.codec == "none"
    check_space(config, planned, stage + allocated)


def _added(config: AnyConfig, planned: Plan, position: Position, more_iterations: int | None) -> int | None:
    """The iterations of a stage to add now. None: none is asked for, or the one that is asked for is being rendered."""
    if more_iterations is None:
        return None
    refuse_cleaned(config.work_dir, position)
    last = len(planned.stages) + len(position.added) - 1
    if not (position.stage == last and position.stage_done and position.exported):
        if position.added and position.added[-1] == more_iterations:
            return None
        raise ConfigError(
            f"--more-iterations: the run in {config.work_dir} is not finished, and only a finished one is continued. "
            "Run it without this option first."
        )
    if more_iterations > MAX_ITERATIONS:
        raise ConfigError(f"--more-iterations {more_iterations}: a stage has {MAX_ITERATIONS:,} iterations at most.")
    if last + 1 >= _MAX_STAGES:
        raise ConfigError(f"--more-iterations: the run has {last + 1} stages already, and no run has more.")
    return more_iterations


def refuse_foreign_outputs(planned: Plan, pictures: Pictures, cancel: CancelToken = NEVER) -> None:
    """Raise ConfigError if an output path has a file that this run did not write."""
    for output in planned.outputs:
        refuse_foreign(Path(output), pictures, _FOREIGN, cancel)


def missing_sheets(config: AnyConfig, planned: Plan, position: Position, cancel: CancelToken) -> list[Sheet]:
    """The output images that are not there as an export of the last canvas with today's options would write them.

    Without the state an image counts wherever it is now: the folder may have been moved since it was written.
    """
    sheets = sheets_of(config.output, planned.stages[-1].size, config.export.model_copy(update={"dpi": planned.dpi}))
    options = export_options(config, planned)
    if position.cleaned:
        same = (path for path, before in position.exported.items() if before is None or _same(before, options))
        pictures = [picture for path in same if (picture := position.pictures[path][-1]) is not None]
        return [sheet for sheet in sheets if not is_one_of(sheet.path, pictures, cancel)]
    return [sheet for sheet in sheets if not _is_there(sheet.path, options, position, cancel)]


def _is_there(output: Path, options: dict[str, object], position: Position, cancel: CancelToken) -> bool:
    before = position.exported.get(str(output))
    if not before or not _same(before, options) or before.get("profile", "srgb") != options["profile"]:
        return False
    return is_as_written(output, position.pictures[str(output)][-1], cancel)


def _same(before: Mapping[str, object], options: Mapping[str, object]) -> bool:
    """Whether an image was written with these options, wherever the file of its profile was then."""
    # an image from before an option was written as with the option's default
    written, wanted = ({**ExportConfig().model_dump(mode="json"), **given} for given in (before, options))
    names = [Path(str(given.pop("profile"))).name for given in (written, wanted)]
    if _PROFILE_DIGEST not in before:  # of a version that did not record it
        wanted.pop(_PROFILE_DIGEST, None)
    return written == wanted and names[0] == names[1]


def export_options(config: AnyConfig, planned: Plan) -> dict[str, object]:
    """The options of the run's own export, as its record has them: with the digest of a profile's file."""
    options = config.export.model_copy(update={"bits": planned.picture.bits}).model_dump(mode="json")
    profile = config.export.profile
    return {**options, _PROFILE_DIGEST: sha256_of(profile)} if isinstance(profile, Path) else options


def with_finished_run(
    config: Config, sink: Sink = ignore, cancel: CancelToken = NEVER, more_iterations: int | None = None
) -> Config:
    """The config in the run directory of a finished run that differs in nothing but the name of its output.

    Without `work_dir` in the config, another name of the output means another run directory, and the image would be
    rendered again. The config itself if there is no such run beside the output, or a run has begun under the new name.
    """
    if not is_default(config, ("work_dir",)) or has_begun(config.work_dir):
        return config
    identify = identifier(config, sink, cancel)
    for work_dir in sorted(config.output.parent.glob("*.run")):
        try:
            manifest = read_manifest(manifest_path(work_dir))
            position = standing(Journal(journal_path(work_dir)))[1]
        except (PipelineError, OSError):
            continue  # another program's folder, or a run that cannot be read: it is of no use here
        # what was added to a finished run may be unfinished: the same command resumes it
        finished = (position.stage, position.stage_done) >= (len(manifest.stages) - 1, True)
        usable = finished and (not position.cleaned or has_written(position, config.output))
        if usable and _is_run_of(config, manifest, identify):
            then = "its image is written, nothing is rendered" if more_iterations is None else "it is continued"
            sink(Note(f"{work_dir} holds the finished run of this config: {then}"))
            return config.model_copy(update={"work_dir": work_dir})
    return config


def has_written(position: Position, output: Path) -> bool:
    """Whether a run has written `output`, or panels of it."""
    return any(output in (Path(name), whole_of(Path(name))[0]) for name in position.pictures)


def with_own_run(config: C) -> C:
    """The config in the run directory of the run that wrote its output, which may have begun under another name."""
    if not is_default(config, ("work_dir",)) or has_begun(config.work_dir):
        return config
    for work_dir in sorted(config.output.parent.glob("*.run")):
        try:
            position = standing(Journal(journal_path(work_dir)))[1]
        except (PipelineError, OSError):
            continue  # as in with_finished_run
        if has_written(position, config.output):
            return config.model_copy(update={"work_dir": work_dir})
    return config


def _is_run_of(config: Config, manifest: Manifest, identify: Callable[[], Identity]) -> bool:
    try:
        # the inputs are read only where all settings are the same
        refuse_changes(config, manifest, Identity(result_fields(config), manifest.inputs))
        refuse_changes(config, manifest, identify())
    except ConfigError:
        return False
    return True


def identifier(config: Config, sink: Sink, cancel: CancelToken) -> Callable[[], Identity]:
    """A function that reads all inputs at its first call. It raises what find_weights raises, and Stopped."""

    @cache
    def identify() -> Identity:
        weights = find_weights(config.network.name, config.network.weights, config.seed, sink, cancel)
        return identity(config, weights, cancel)

    return identify


def outlook(
    config: Config, planned: Plan, *, more_iterations: int | None = None, stop: threading.Event | None = None
) -> str:
    """What `run` would do with this config now, in words, or why it would refuse. Reads all inputs if there is a run.

    Raises Stopped soon after `stop` is set.
    """
    return outlook_and_plan(config, planned, more_iterations, CancelToken(stop))[0]


@process_settings()
def outlook_and_plan(
    config: Config, planned: Plan, more_iterations: int | None = None, cancel: CancelToken = NEVER
) -> tuple[str, Plan]:
    """What `outlook` says, and the plan with the stages that were added to the run on disk."""
    weights = weights_path(config.network.name, config.network.weights)
    if weights is not None and not weights.is_file() and has_begun(config.work_dir):
        return "downloads the weights of the network first; whether it is refused is not known before", planned
    try:
        config = resolved(config)
        if weights is None or weights.is_file():
            config = with_finished_run(config, cancel=cancel, more_iterations=more_iterations)
        if config.work_dir.exists():
            refuse_locked(config.work_dir)
            check_work_dir(config.work_dir)
        identify = identifier(config, ignore, cancel)
        start = check_start(config, planned, identify, more_iterations=more_iterations, cancel=cancel)
    except Stopped:
        raise
    except PipelineError as error:
        return f"is refused: {error}", planned
    return start.text, start.planned


def measured_iterations(records: Sequence[Record]) -> list[tuple[int, int, float]]:
    """(stage, iteration, seconds) of every iteration that the journal records."""
    return [
        (one.stage, one.iteration, one.busy.get("wall", sum(one.seconds.values()))) for one in iterations_of(records)
    ]
