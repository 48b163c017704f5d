"""The schema of a run's manifest and journal: typed, strict records.

The names on disk are the field names here, and no others in the program: renaming a variable elsewhere changes no
journal. Every record has the version of this schema. Records without a version are older than versions; their unknown
fields are ignored. Adding, renaming or removing a field takes a new VERSION.

Files may come from a stranger, and a checksum is not a signature: values of the wrong type are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from pipeline.config import MAX_ITERATIONS, MAX_SIDE_PX, MAX_STYLES, MAX_THREADS
from pipeline.core.color_spaces import WorkingSpace
from pipeline.core.text import shown

VERSION = 4
FORMAT = 2  # of a run directory, as the manifest says
MAX_MANIFEST_BYTES = 2**20  # a hundred styles take 0.2 MB
MAX_JOURNAL_BYTES = 2**30  # 100,000² px and 1,000 iterations take 0.6 GB, nearly all of it checksums
MAX_OWNER_BYTES = 1000
_MAX_STAGES = 64  # as in a config
_MAX_STATISTICS = 2**20  # the covariance of 1,024 channels

_Count = Annotated[int, Field(ge=0, le=MAX_ITERATIONS)]
_Stage = Annotated[int, Field(ge=0, lt=_MAX_STAGES)]
_Side = Annotated[int, Field(ge=1, le=MAX_SIDE_PX)]
_Size = Annotated[tuple[_Side, _Side], Field(strict=False)]  # JSON has lists; its numbers are still strict
_Line = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=5000)]
# Names of arrays and of metadata files. They become paths, so that separators are refused.
_File = Annotated[str, StringConstraints(pattern=r"^([a-z0-9_]+|([a-z0-9_]+/)?zarr\.json)$")]
_Sums = dict[_File, str]
_Numbers = dict[_Line, float]


M = TypeVar("M", bound=BaseModel)


class OtherVersionError(ValueError):
    """A record of a later version of this schema."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class _Kept(BaseModel):
    """A part of the manifest's config: names only the fields that are read without validating the whole config."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")


class KeptOptimizer(_Kept):
    """The optimizer section."""

    max_iterations: _Count


class KeptConfig(_Kept):
    """The config that a run began with, with the keys of the version that wrote it."""

    output: _Line
    optimizer: KeptOptimizer | None = None  # `apply` has none
    working_space: WorkingSpace = "srgb"


class StageSizes(_Strict):
    """(height, width) in px of a stage's canvas and styles. `max_iterations`: None in runs older than the field."""

    size: _Size
    style_sizes: Annotated[list[_Size], Field(max_length=MAX_STYLES)]
    max_iterations: _Count | None = None


class ContentKind(_Strict):
    """Bit depth and alpha of the content. The defaults are those of runs older than these fields."""

    bits: Literal[8, 16] = 8
    alpha: bool = False


class Manifest(_Strict):
    """What a run began with. `threads`: CPU threads of one tile. `inputs`: SHA-256 by config key.

    `dpi`: the resolution of the last stage's canvas on paper. `command`: what began it.
    """

    # 1: without dpi, as manifests older than versions; 3: without command
    version: Literal[1, 3, 4] = 4
    command: Literal["run", "apply"] = "run"
    format: int
    created: _Line
    config: KeptConfig
    stages: Annotated[list[StageSizes], Field(min_length=1, max_length=_MAX_STAGES)]
    content: ContentKind = ContentKind()
    dpi: float | None = None
    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)]
    result_fields: dict[_Line, _Line | int | float | bool | None]
    inputs: dict[_Line, _Line]

    @model_validator(mode="after")
    def _has_what_its_command_needs(self) -> Self:
        if self.command == "run" and self.config.optimizer is None:
            raise ValueError("config.optimizer: missing")
        return self


class WrittenPicture(_Strict):
    """An output image: a file, or a folder with all its files. `modified_ns`: the time of the newest file."""

    size_bytes: Annotated[int, Field(ge=0)]
    modified_ns: int
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Record(_Strict):
    """Base class: one line of the journal. `time`: when it was committed, in UTC."""

    version: Literal[1] = 1
    time: _Line = ""


class Begun(Record):
    """A run began. Holds a copy of the manifest."""

    type: Literal["begun"] = "begun"
    manifest: Manifest


class StagePrepared(Record):
    """The arrays of a stage are complete, computed in tiles of `tile_px` (None in runs older than the field).

    `content_energies`: ‖φ_l(o)‖² by layer key. `areas`: n_r,l by style key, if there are regions. `alpha` and
    `adam_steps`: the step size and the number of Adam's steps that the stage continues; None and 0 if it starts afresh.
    `carries`: its m and v are kept for the stage after it.
    """

    version: Literal[1, 2] = 2  # type: ignore[assignment]  # 1: without alpha, adam_steps and carries
    type: Literal["stage_prepared"] = "stage_prepared"
    stage: _Stage
    tile_px: _Side | None = None
    content_energies: _Numbers
    areas: _Numbers = {}
    checksums: _Sums
    alpha: float | None = None
    adam_steps: _Count = 0
    carries: bool = False


class MeasuredIteration(_Strict):
    """What an iteration measured. Losses: of the canvas that it read.

    `remaining_s`: the seconds from here to the end of the run as they were estimated then; None: there was no estimate.
    """

    iteration: _Count
    objective: float
    content_loss: float
    style_loss: float
    layer_losses: _Numbers = {}
    mean_abs_u: float
    max_abs_u: float
    alpha: float | None
    seconds: _Numbers
    busy: _Numbers = {}
    stepped: bool
    remaining_s: Annotated[float, Field(ge=0, le=1e18)] | None = None


class Iteration(MeasuredIteration, Record):
    """An iteration is complete. `checksums`: of the arrays that it wrote.

    `before`: the iterations between the last commit and this one, of a stage in memory, in their order. Their arrays
    are not on the disk: one record commits all, so that no crash leaves a part of them.
    """

    version: Literal[1, 3, 4] = 4  # type: ignore[assignment]  # 1: without remaining_s; 3: without before
    type: Literal["iteration"] = "iteration"
    stage: _Stage
    checksums: _Sums
    before: tuple[MeasuredIteration, ...] = Field((), strict=False, max_length=MAX_ITERATIONS)

    @property
    def each(self) -> list[Iteration]:
        """A record of each iteration; those of `before` have no checksums."""
        stage, time = self.stage, self.time
        earlier = [Iteration(stage=stage, checksums={}, time=time, **vars(measured)) for measured in self.before]
        return [*earlier, self.model_copy(update={"before": ()})]


def measured_alone(record: Iteration) -> MeasuredIteration:
    """What the record measured, without what it commits."""
    return MeasuredIteration(**{name: getattr(record, name) for name in MeasuredIteration.model_fields})


def iterations_of(records: Iterable[Record], stage: int | None = None) -> list[Iteration]:
    """A record of each iteration, of one stage or of all, whether it was committed alone or with others."""
    commits = (record for record in records if isinstance(record, Iteration) and stage in (None, record.stage))
    return [iteration for commit in commits for iteration in commit.each]


class Pass(Record):
    """A pass of `apply` over the whole picture is complete.

    `network`: its number in the config. `norm`: the norm whose statistics it has measured, mean and variance by
    channel; or the sums of features and of their products. None for a pass that has written a canvas. `checksums`: of
    what it wrote. `remaining_s`: as in Iteration.
    """

    version: Literal[4] = 4  # type: ignore[assignment]
    type: Literal["pass"] = "pass"
    stage: _Stage
    iteration: _Count
    network: _Count = 0
    norm: _Line | None = None
    mean: Annotated[list[float], Field(max_length=_MAX_STATISTICS)] = []
    variance: Annotated[list[float], Field(max_length=_MAX_STATISTICS)] = []
    seconds: _Numbers
    busy: _Numbers = {}
    checksums: _Sums = {}
    remaining_s: Annotated[float, Field(ge=0, le=1e18)] | None = None


def steps_of(records: Sequence[Record], stage: int | None = None) -> list[Iteration | Pass]:
    """The iterations of a run, or the passes of `apply`, of one stage or of all."""
    passes = (record for record in records if isinstance(record, Pass) and stage in (None, record.stage))
    return [*iterations_of(records, stage), *passes]


class StageDone(Record):
    """A stage ended after `iterations`."""

    type: Literal["stage_done"] = "stage_done"
    stage: _Stage
    iterations: _Count | None = None
    reason: _Line


class SmallerTile(Record):
    """Larger tiles than this do not fit in the device's memory."""

    type: Literal["smaller_tile"] = "smaller_tile"
    tile_px: _Side


class Exporting(Record):
    """An output image is complete and is renamed next. `picture`: None in records older than the field."""

    type: Literal["exporting"] = "exporting"
    output: _Line
    picture: WrittenPicture | None = None


class Exported(Record):
    """An output image has its name. `options`: the export options that made it."""

    type: Literal["exported"] = "exported"
    output: _Line
    options: dict[_Line, Any] | None = None
    picture: WrittenPicture | None = None


class CanvasLost(Record):
    """A repair gave up the canvas of a stage that the run no longer needs."""

    type: Literal["canvas_lost"] = "canvas_lost"
    stage: _Stage


class RolledBack(Record):
    """A repair rolled back all records from this index on."""

    type: Literal["rolled_back"] = "rolled_back"
    records: Annotated[int, Field(ge=0)]


class StageAdded(Record):
    """The run goes on after its last stage: with one more of the same size, of this many iterations."""

    version: Literal[3] = 3  # type: ignore[assignment]
    type: Literal["stage_added"] = "stage_added"
    iterations: Annotated[int, Field(ge=1, le=MAX_ITERATIONS)]


class Cleaned(Record):
    """The state is deleted from here on: there is no canvas any more, and nothing of the store is read."""

    version: Literal[3] = 3  # type: ignore[assignment]
    type: Literal["cleaned"] = "cleaned"


_KINDS = (
    *(Begun, StagePrepared, Iteration, Pass, StageDone, SmallerTile, Exporting, Exported, CanvasLost, RolledBack),
    *(StageAdded, Cleaned),
)
_BY_TYPE: Mapping[str, type[Record]] = {str(kind.model_fields["type"].default): kind for kind in _KINDS}


def parse_json(data: bytes) -> Any:
    """Parse JSON. Raises ValueError, also for NaN and for deep nesting, which Python's parser accepts or fails on."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def as_json(record: Record) -> dict[str, Any]:
    """The record as it is in a line of the journal."""
    data = record.model_dump(mode="json")
    return {"type": data["type"], **data}  # the type comes first, for human readers


def parse_record(data: Any) -> Record:
    """The record of a journal's line. Raises ValueError if it is invalid, OtherVersionError for a later version."""
    _refuse_later(data)
    kind = data.get("type") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in _BY_TYPE:
        raise ValueError(f"type: {shown(str(kind), 100)} is not a kind of record")
    model = _BY_TYPE[kind]
    if "version" not in data:
        data = {name: value for name, value in data.items() if name in model.model_fields}
    return _validated(model, data)


def parse_manifest(data: Any) -> Manifest:
    """The manifest of a file. Raises ValueError if it is invalid, OtherVersionError for a later version."""
    _refuse_later(data)
    return _validated(Manifest, data)


def _refuse_later(data: Any) -> None:
    """Called before any other check, because a later version may have other types and fields."""
    version = data.get("version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise OtherVersionError(f"version {version}")


def _validated(model: type[M], value: object) -> M:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(shown(f"{place}: {first['msg']}", 200)) from None
