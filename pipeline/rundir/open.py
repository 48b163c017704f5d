"""Opens a run directory: begins a run there, or checks that the run in it has this config."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from pipeline import store
from pipeline.config import (
    ADDED_LATER,
    AnyConfig,
    ApplyConfig,
    Config,
    Key,
    dotted,
    field_at,
    input_files,
    is_default,
    result_fields,
    undotted,
)
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError, DamagedStateError
from pipeline.core.image_formats import RGB8
from pipeline.core.text import shown, stage_name
from pipeline.network import WeightsSource, sha256_of
from pipeline.plan import Plan, tile_threads
from pipeline.rundir.journal import Journal, standing
from pipeline.rundir.manifest import begun_manifest, read_manifest, stages_of, trusted_manifest, write_manifest
from pipeline.rundir.paths import journal_path, manifest_path, store_path
from pipeline.rundir.position import Position
from pipeline.rundir.records import FORMAT, Begun, ContentKind, KeptConfig, Manifest, Record, StageSizes
from pipeline.rundir.space import check_space
from pipeline.store import ALPHA, METADATA, metadata, result_name


def stage_path(work_dir: Path, stage: int) -> Path:
    """The Zarr group of one stage."""
    return store_path(work_dir) / f"stage_{stage}"


def newest_canvas(work_dir: Path, position: Position, stage: int) -> store.StageArray:
    """The result of `stage`: its canvas after the last committed iteration, or the average of its canvases.

    Reads compare checksums. Raises ChunkError if the metadata is damaged.
    """
    return _checked(work_dir, position, stage, result_name(position.slots[stage], position.checksums[stage]))


def newest_moments(work_dir: Path, position: Position, stage: int) -> list[store.StageArray]:
    """Adam's m and v of a finished stage that kept them. Raises ChunkError if their metadata is damaged."""
    return [_checked(work_dir, position, stage, f"{name}_{position.slots[stage]}") for name in ("m", "v")]


def content_alpha(work_dir: Path, position: Position, stage: int) -> store.StageArray | None:
    """The content's alpha at the size of `stage`, or None. Raises ChunkError if its metadata is damaged."""
    return _checked(work_dir, position, stage, ALPHA) if ALPHA in position.checksums[stage] else None


def _checked(work_dir: Path, position: Position, stage: int, name: str) -> store.StageArray:
    folder, checksums = stage_path(work_dir, stage), position.checksums[stage]
    # changed metadata may still be valid: another height, or integers for the same bytes
    metadata.check_metadata(folder, f"{name}/{METADATA}", checksums[f"{name}/{METADATA}"])
    return store.open_array(folder, name, checksums[name])


@dataclass(frozen=True)
class RunState:
    """The run in a run directory, as its journal was read, with its records and its position."""

    journal: Journal
    records: list[Record]
    position: Position


def check_run(config: AnyConfig, planned: Plan, identify: Callable[[], Identity]) -> RunState:
    """Read the run in the run directory, of which there may be none. Writes nothing.

    `identify`: called only if there is a run, because it reads all inputs. Raises ConfigError that lists every change
    that would change the output image, DamagedStateError, SpaceError.
    """
    journal = Journal(journal_path(config.work_dir))
    records, position = standing(journal)
    state = RunState(journal, records, position)
    if position.is_fixed:  # stages were rendered, which must have been from the same config and inputs
        manifest = trusted_manifest(manifest_path(config.work_dir), records)
        refuse_changes(config, manifest, identify())
        refuse_other_stages(config, manifest, planned)
        refuse_unknown_stage(config.work_dir, manifest, position)
        return state
    if lost_its_stages(config.work_dir, records):
        raise DamagedStateError(
            f"{journal.path}: records no stage, but {store_path(config.work_dir)} holds one, which would be "
            "overwritten. Restore the journal from a copy, or start again: `pipeline verify --repair` sets the store "
            "aside."
        )
    check_space(config, planned, 0)
    return state


def open_run(config: AnyConfig, planned: Plan, identify: Callable[[], Identity], state: RunState) -> None:
    """Make a checked run directory ready to append to, and begin a run there unless it holds one of this config.

    `state`: from check_run, under the lock. Raises StorageError.
    """
    state.journal.repair_tail()
    if state.position.is_fixed:
        return
    # Nothing is prepared yet, so that a config or an image may be corrected after an error. The manifest is written
    # before the store: a folder with files but without a manifest is refused as not a run's.
    path, manifest = manifest_path(config.work_dir), _new_manifest(config, planned, identify())
    if not (_same_manifest(begun_manifest(state.records), manifest) and _same_manifest(_manifest_at(path), manifest)):
        write_manifest(path, manifest)
        state.journal.append(Begun(manifest=manifest, time=now()))
    metadata.create_store(store_path(config.work_dir))


def _new_manifest(config: AnyConfig, planned: Plan, identity_now: Identity) -> Manifest:
    return Manifest(
        format=FORMAT,
        command=command_of(config),
        created=now(),
        config=KeptConfig.model_validate(config.model_dump(mode="json")),
        stages=_stage_sizes(planned),
        content=ContentKind(**asdict(planned.stages[-1].content or RGB8)),
        dpi=planned.dpi,
        threads=tile_threads(config.compute),
        result_fields=identity_now.result_fields,
        inputs=identity_now.inputs,
    )


def _stage_sizes(planned: Plan) -> list[StageSizes]:
    return [
        StageSizes(size=stage.size, style_sizes=list(stage.style_sizes), max_iterations=stage.max_iterations)
        for stage in planned.stages
    ]


@dataclass(frozen=True)
class Identity:
    """Everything that determines an output image: values by config key, and the SHA-256 of every input file."""

    result_fields: dict[str, Any]
    inputs: dict[str, str]


def identity(config: Config, weights: WeightsSource, cancel: CancelToken) -> Identity:
    """The identity of a run of `config`. Hashes all inputs; raises Stopped soon after `cancel` is set."""
    inputs = {dotted(key): sha256_of(path, cancel) for key, path in input_files(config)}
    return Identity(result_fields(config), inputs | {"network.weights": weights.sha256})


def lost_its_stages(work_dir: Path, records: Sequence[Record]) -> bool:
    """Whether a journal without stages has lost records, given the order of writing: `begun`, the store, stages."""
    begun = begun_manifest(records) is not None
    return stage_path(work_dir, 1).exists() or (not begun and store_path(work_dir).exists())


def _manifest_at(path: Path) -> Manifest | None:
    try:
        return read_manifest(path)
    except DamagedStateError:
        return None


def _same_manifest(old: Manifest | None, manifest: Manifest) -> bool:
    """Whether the manifests differ in nothing but the time."""
    return old is not None and old == manifest.model_copy(update={"created": old.created})


def refuse_unknown_stage(work_dir: Path, manifest: Manifest, position: Position) -> None:
    """Raise DamagedStateError if the journal records a stage that the manifest does not have."""
    if position.stage >= (stages := len(stages_of(manifest, position))):
        raise DamagedStateError(
            f"{journal_path(work_dir)}: records {stage_name(position.stage)}, but the manifest beside it has stages 1 "
            f"to {stages} only, so the two are not of one run. Restore the run directory from a copy."
        )


def refuse_changes(config: AnyConfig, manifest: Manifest, identity_now: Identity) -> None:
    """Raise ConfigError with every field of `identity_now` that differs from the manifest."""
    if manifest.command != command_of(config):
        raise ConfigError(
            f"{config.work_dir} was begun by `pipeline {manifest.command}`, and to resume with `pipeline "
            f"{command_of(config)}` would mix two images. Give the new config its own work_dir, or delete the old one."
        )
    old, new = manifest.result_fields, identity_now.result_fields
    old_config, new_config = manifest.config.model_dump(), config.model_dump(mode="json")
    changes: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        old_value, new_value = (
            _value(key, fields, values, type(config)) for fields, values in ((old, old_config), (new, new_config))
        )
        if old_value != new_value:
            remedy = _remedy(config, undotted(key), old_value, old_config)
            is_new = not any(line.endswith(remedy) for line in changes)
            changes.append(f"  {key}: was {_in_yaml(old_value)}, is {_in_yaml(new_value)}" + remedy * is_new)
    files, files_now = manifest.inputs, identity_now.inputs
    changed = [key for key in sorted(files.keys() | files_now.keys()) if files.get(key) != files_now.get(key)]
    changes += [f"  {key}: {_what_changed(key, config)}" for key in changed]
    if changes:
        raise ConfigError(
            f"{config.work_dir} holds a run of another config, and to resume would mix two images. Changed:\n"
            + "\n".join(changes)
            + "\nRestore these values, or give the new config its own work_dir, or delete the old one."
        )


def _what_changed(key: str, config: AnyConfig) -> str:
    if isinstance(config, Config) and key == "network.weights" and config.network.weights is None:
        return (
            f"the run's weights of {config.network.name} are not those that this version uses. Resume with the version "
            "that began the run, or name a copy of its weights file here"
        )
    return "the content of the file has changed"


_NOT_GIVEN = "not given"


def _remedy(config: AnyConfig, key: Key, old_value: object, old_config: object) -> str:
    """What to add to a config that does not have the key, whose default has changed since the run began."""
    if (
        key and get_origin(field_at(type(config), key[:-1]).annotation) is dict
    ):  # a config gives all its entries or none
        key, old_value = key[:-1], _at(old_config, key[:-1])
    if old_value == _NOT_GIVEN or not is_default(config, key):
        return ""
    text = f"; to resume, add `{key[-1]}: {_in_yaml(old_value)}`"
    return text + (f" under `{dotted(key[:-1])}`" if len(key) > 1 else " to the config")


def _at(config: object, key: Key) -> object:
    """The value of a key in a config as manifests have it."""
    for part in key:
        if not (isinstance(config, Mapping) and part in config):
            return _NOT_GIVEN
        config = config[part]
    return config


def _in_yaml(value: object) -> str:
    """A value as a config has it, so that it can be restored."""
    return value if isinstance(value, str) else json.dumps(value)


def _value(key: str, fields: Mapping[str, Any], config: object, model: type[AnyConfig]) -> object:
    """The value of a dotted key in a run, whose result fields leave out some keys that have their default.

    `config`: as in a manifest. Keys that newer versions added have in old runs the value that these had before; keys
    that a stage does not set have the value outside `stages`.
    """
    parts = undotted(key)
    if parts[0] == "stages" and len(parts) == 3 and fields.get(key) is None:
        return _NOT_GIVEN  # a whole section of a stage: its keys are compared one by one
    if key in fields:
        return fields[key]
    inner = config
    for depth, part in enumerate(parts):
        if isinstance(inner, Mapping) and part in inner:
            inner = inner[part]
        elif isinstance(inner, list) and part in range(len(inner)):
            inner = inner[int(part)]
        elif parts[0] == "stages" and depth in (2, 3) and parts[2] != "styles":
            return _value(dotted(parts[2:]), fields, config, model)
        elif isinstance(inner, Mapping):
            inner = _before(field_at(model, parts[: depth + 1]))
        else:
            return _NOT_GIVEN
    return inner if inner is None or isinstance(inner, int | float) else shown(str(inner), 200)


def _before(field: FieldInfo) -> object:
    """What runs from before a key, or a section, was added do: its default means as before."""
    marks = field.json_schema_extra
    if isinstance(marks, dict) and marks.get("resume") == ADDED_LATER:
        return marks["before"]
    if field.is_required() or field.default_factory is not None:
        return _NOT_GIVEN
    return to_jsonable_python(field.default, by_alias=True)


def refuse_other_stages(config: AnyConfig, manifest: Manifest, planned: Plan) -> None:
    """Raise ConfigError if the plan has other stages than the manifest, which has the sizes of the arrays on disk."""
    for number, (stage, plan) in enumerate(itertools.zip_longest(manifest.stages, _stage_sizes(planned))):
        old, new = _stage_text(stage), _stage_text(plan)
        if old != new:
            raise ConfigError(
                f"{config.work_dir}: {stage_name(number)} of this run is {old}, but this version of pipeline plans it "
                f"as {new}: the arrays on disk would not fit. Finish the run with the version that began it, or give "
                "this config another work_dir."
            )


def _stage_text(stage: StageSizes | None) -> str:
    if stage is None:
        return "not there"
    height, width = stage.size
    styles = ", ".join(f"{style_width}×{style_height}" for style_height, style_width in stage.style_sizes)
    return f"{width}×{height} px" + (f" with styles of {styles} px" if styles else "")


def command_of(config: AnyConfig) -> Literal["run", "apply"]:
    """The command that a config is for."""
    return "apply" if isinstance(config, ApplyConfig) else "run"


def now() -> str:
    """The current time in UTC, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
