"""What lies in a run directory, and beginning a run there, or checking that it is the run of this config."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import store
from pipeline.config.config import Config, input_files, result_fields
from pipeline.config.messages import field_at
from pipeline.config.sections import NEW
from pipeline.config.yaml_reader import dotted, undotted
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError, DamagedStateError
from pipeline.core.image_formats import RGB8
from pipeline.core.text import shown
from pipeline.network.weights import WeightsSource, sha256_of
from pipeline.plan.device import default_threads
from pipeline.plan.plan import Plan
from pipeline.rundir.journal import Journal, standing
from pipeline.rundir.manifest import begun_manifest, read_manifest, trusted_manifest, write_manifest
from pipeline.rundir.paths import journal_path, manifest_path, store_path
from pipeline.rundir.position import Position
from pipeline.rundir.records import FORMAT, Begun, ContentKind, KeptConfig, Manifest, Record, StageSizes
from pipeline.rundir.space import check_space
from pipeline.store import metadata
from pipeline.store.layout import ALPHA, METADATA, result_name


def stage_path(work_dir: Path, stage: int) -> Path:
    """The Zarr group of one stage."""
    return store_path(work_dir) / f"stage_{stage}"


def newest_canvas(work_dir: Path, position: Position, stage: int) -> store.StageArray:
    """The canvas of `stage` after its last committed iteration, or the average, where it is averaged: its result.

    It checks itself. Raises ChunkError.
    """
    return _checked(work_dir, position, stage, result_name(position.slots[stage], position.checksums[stage]))


def content_alpha(work_dir: Path, position: Position, stage: int) -> store.StageArray | None:
    """The alpha of the content at the size of `stage`, if it has one; it checks itself. Raises ChunkError."""
    return _checked(work_dir, position, stage, ALPHA) if ALPHA in position.checksums[stage] else None


def _checked(work_dir: Path, position: Position, stage: int, name: str) -> store.StageArray:
    folder, checksums = stage_path(work_dir, stage), position.checksums[stage]
    # A description that was changed may still describe: another height, or integers for the same bytes.
    metadata.check_metadata(folder, f"{name}/{METADATA}", checksums[f"{name}/{METADATA}"])
    return store.open_array(folder, name, checksums[name])


def open_run(config: Config, planned: Plan, weights: WeightsSource, cancel: CancelToken) -> Journal:
    """The journal of the run directory; begins a run there, or checks that it is the run of this config.

    Raises Stopped soon after `cancel` is set.
    Raises ConfigError listing every field whose change would change the picture, SpaceError.
    """
    journal = Journal(journal_path(config.work_dir))
    path = manifest_path(config.work_dir)
    wanted = identity(config, weights, cancel)
    records, position = standing(journal)
    if position.slots:
        manifest = trusted_manifest(path, records)
        refuse_changes(config, manifest, wanted)
        refuse_other_stages(config, manifest, planned)
        journal.repair_tail()
        return journal
    if lost_its_stages(config.work_dir, records):
        raise DamagedStateError(
            f"{journal.path}: holds no stage, but {store_path(config.work_dir)} does, which would be rendered again. "
            "Restore the journal from a copy, or begin again: `pipeline verify --repair` sets the store aside."
        )
    check_space(config, planned, 0)
    # Nothing is prepared yet, so a config or an image that was corrected after an error is no change. The manifest
    # comes before the store: a folder that holds anything without one is taken for somebody else's.
    journal.repair_tail()
    manifest = _new_manifest(config, planned, wanted)
    if not (_same_manifest(begun_manifest(records), manifest) and _same_manifest(_manifest_at(path), manifest)):
        write_manifest(path, manifest)
        journal.append(Begun(manifest=manifest, time=now()))
    metadata.create_store(store_path(config.work_dir))
    return journal


def _new_manifest(config: Config, planned: Plan, wanted: Identity) -> Manifest:
    compute = config.compute
    return Manifest(
        format=FORMAT,
        created=now(),
        config=KeptConfig.model_validate(config.model_dump(mode="json")),
        stages=_stage_sizes(planned),
        content=ContentKind(**asdict(planned.stages[-1].content or RGB8)),
        threads=default_threads(compute.workers) if compute.threads == "auto" else compute.threads,
        result_fields=wanted.result_fields,
        inputs=wanted.inputs,
    )


def _stage_sizes(planned: Plan) -> list[StageSizes]:
    return [
        StageSizes(size=stage.size, style_sizes=list(stage.style_sizes), max_iterations=stage.max_iterations)
        for stage in planned.stages
    ]


@dataclass(frozen=True)
class Identity:
    """All that decides a picture: values by config key, and the SHA-256 of every file that is read."""

    result_fields: dict[str, Any]
    inputs: dict[str, str]


def identity(config: Config, weights: WeightsSource, cancel: CancelToken) -> Identity:
    """That of a run of `config`. Raises Stopped soon after `cancel` is set."""
    inputs = {dotted(key): sha256_of(path, cancel) for key, path in input_files(config)}
    return Identity(result_fields(config), inputs | {"network.weights": weights.sha256})


def lost_its_stages(work_dir: Path, records: Sequence[Record]) -> bool:
    """Whether a journal that holds no stage once held some: `begun` comes before the store, a stage before the next."""
    begun = begun_manifest(records) is not None
    return stage_path(work_dir, 1).exists() or (not begun and store_path(work_dir).exists())


def _manifest_at(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except DamagedStateError:
        return None


def _same_manifest(found: Manifest | None, manifest: Manifest) -> bool:
    """Whether they are the same, but for the time."""
    return found is not None and found == manifest.model_copy(update={"created": found.created})


def refuse_unknown_stage(work_dir: Path, manifest: Manifest, position: Position) -> None:
    """Raise DamagedStateError if the journal stands at a stage that the manifest does not know."""
    if position.stage >= (known := len(manifest.stages)):
        raise DamagedStateError(
            f"{journal_path(work_dir)}: stands at stage {position.stage}, but the manifest beside it knows stages 0 to "
            f"{known - 1} alone, so the two are not of one run. Restore the run directory from a copy."
        )


def refuse_changes(config: Config, manifest: Manifest, wanted: Identity) -> None:
    """Raise ConfigError with every field of `wanted` that differs from the manifest."""
    old, new = manifest.result_fields, wanted.result_fields
    before, now_given = manifest.config.model_dump(), config.model_dump(mode="json")
    changes: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        was, becomes = _value(key, old, before), _value(key, new, now_given)
        if was != becomes:
            changes.append(f"  {key}: was {was}, is {becomes}")
    files, files_now = manifest.inputs, wanted.inputs
    changed = [key for key in sorted(files.keys() | files_now.keys()) if files.get(key) != files_now.get(key)]
    changes += [f"  {key}: the content of the file has changed" for key in changed]
    if changes:
        raise ConfigError(
            f"{config.work_dir} holds a run of another config, and going on would mix two pictures. Changed:\n"
            + "\n".join(changes)
            + "\nPut these back, or give the new config its own work_dir, or delete the old one."
        )


_NOT_GIVEN = "not given"


def _value(key: str, fields: Mapping[str, Any], config: object) -> object:
    """What a dotted key is in a run: not all that have their default are among its result fields.

    `config`: as a manifest keeps it. A key that came later has its default there; what a stage does not say is as for
    the others.
    """
    parts = undotted(key)
    if parts[0] == "stages" and len(parts) == 3 and fields.get(key) is None:
        return _NOT_GIVEN  # a section of a stage, whose own keys are compared
    if key in fields:
        return fields[key]
    inner = config
    for depth, part in enumerate(parts):
        if isinstance(inner, Mapping) and part in inner:
            inner = inner[part]
        elif isinstance(inner, list) and part in range(len(inner)):
            inner = inner[int(part)]
        elif parts[0] == "stages" and depth in (2, 3) and parts[2] != "styles":
            return _value(dotted(parts[2:]), fields, config)
        elif isinstance(inner, Mapping) and depth == len(parts) - 1:
            field = field_at(Config, parts)
            return field.default if field.json_schema_extra == NEW else _NOT_GIVEN
        else:
            return _NOT_GIVEN
    return inner if inner is None or isinstance(inner, int | float) else shown(str(inner), 200)


def refuse_other_stages(config: Config, manifest: Manifest, planned: Plan) -> None:
    """Raise ConfigError if the plan's stages are not those of the run, whose arrays have the sizes of the manifest."""
    old, new = ([(one.size, one.style_sizes) for one in stages] for stages in (manifest.stages, _stage_sizes(planned)))
    if old == new:
        return
    pairs = enumerate(itertools.zip_longest(old, new))
    number = next(index for index, (one, other) in pairs if one != other)
    was, now_is = (_told_stage(stages[number]) if number < len(stages) else "not there" for stages in (old, new))
    raise ConfigError(
        f"{config.work_dir}: stage {number} of this run is {was}, but this version of pipeline plans it as {now_is}: "
        "the arrays on disk would not fit. Finish the run with the version that began it, or give this config another "
        "work_dir."
    )


def _told_stage(stage: tuple[tuple[int, int], list[tuple[int, int]]]) -> str:
    (height, width), styles = stage
    beside = ", ".join(f"{style_width}×{style_height}" for style_height, style_width in styles)
    return f"{width}×{height} px" + (f" with styles of {beside} px" if beside else "")


def now() -> str:
    """The time for records, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
