"""What a run's manifest and journal hold: typed, strict records, with names of their own, from which all is read.

The names on disk are those of the fields here, and of nothing else in the program: a variable that is renamed elsewhere
changes no journal. Every record carries the version of this schema. Records without one are from before there were
versions: of those, fields that are not known here are left out. A field that is added, renamed or removed takes a new
VERSION.

Files may come from a stranger, and a checksum is not a signature: what is not of the right type is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from pipeline.config.fields import MAX_ITERATIONS, MAX_SIDE_PX, MAX_STYLES, MAX_THREADS
from pipeline.core.text import shown

VERSION = 1
FORMAT = 2  # of a run directory, as the manifest says
MAX_MANIFEST_BYTES = 2**20  # with a hundred styles 0.2 MB
MAX_JOURNAL_BYTES = 2**30  # of 100,000² px and 1,000 iterations 0.6 GB, nearly all of it checksums
MAX_OWNER_BYTES = 1000
_MAX_STAGES = 64  # sizes double

_Count = Annotated[int, Field(ge=0, le=MAX_ITERATIONS)]
_Stage = Annotated[int, Field(ge=0, lt=_MAX_STAGES)]
_Side = Annotated[int, Field(ge=1, le=MAX_SIDE_PX)]
_Size = Annotated[tuple[_Side, _Side], Field(strict=False)]  # JSON has lists; its numbers are still strict
_Line = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=5000)]
# Names of arrays, and of metadata: a repair writes there.
_File = Annotated[str, StringConstraints(pattern=r"^([a-z0-9_]+|([a-z0-9_]+/)?zarr\.json)$")]
_Sums = dict[_File, str]
_Numbers = dict[_Line, float]


M = TypeVar("M", bound=BaseModel)


class OtherVersionError(ValueError):
    """A record of a later version of this schema."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class _Kept(BaseModel):
    """A part of a config as the manifest keeps it: only what is read without validating the whole is named here."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")


class KeptOptimizer(_Kept):
    """The optimizer section."""

    max_iterations: _Count


class KeptConfig(_Kept):
    """The config that a run began with, in the words of the version that wrote it."""

    output: _Line
    optimizer: KeptOptimizer


class StageSizes(_Strict):
    """(height, width) in px of a stage's canvas and styles. `max_iterations`: None in runs from before it was kept."""

    size: _Size
    style_sizes: Annotated[list[_Size], Field(max_length=MAX_STYLES)]
    max_iterations: _Count | None = None


class ContentKind(_Strict):
    """The pixels of the content; runs from before this was kept have these."""

    bits: Literal[8, 16] = 8
    alpha: bool = False


class Manifest(_Strict):
    """What a run began with. `threads`: CPU threads of one tile. `inputs`: SHA-256 by config key."""

    version: Literal[1] = 1  # those from before there were versions have the same fields
    format: int
    created: _Line
    config: KeptConfig
    stages: Annotated[list[StageSizes], Field(min_length=1, max_length=_MAX_STAGES)]
    content: ContentKind = ContentKind()
    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)]
    result_fields: dict[_Line, _Line | int | float | bool | None]
    inputs: dict[_Line, _Line]


class WrittenPicture(_Strict):
    """A picture as it was written: a file, or a folder with all its files. `modified_ns`: of the newest of them."""

    size_bytes: Annotated[int, Field(ge=0)]
    modified_ns: int
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Record(_Strict):
    """Root of the records: one line of the journal each. `time`: in UTC, when it was committed."""

    version: Literal[1] = 1
    time: _Line = ""


class Begun(Record):
    """A run began; the manifest once more."""

    type: Literal["begun"] = "begun"
    manifest: Manifest


class StagePrepared(Record):
    """The arrays of a stage are there, in tiles of `tile_px` (None: from before it was kept).

    `content_energies`: ‖φ_l(o)‖² by layer. `areas`: n_r,l by style key, where there are regions.
    """

    type: Literal["stage_prepared"] = "stage_prepared"
    stage: _Stage
    tile_px: _Side | None = None
    content_energies: _Numbers
    areas: _Numbers = {}
    checksums: _Sums


class Iteration(Record):
    """An iteration is complete. Losses are those of the canvas it read; `checksums` are of the arrays it wrote."""

    type: Literal["iteration"] = "iteration"
    stage: _Stage
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
    checksums: _Sums


class StageDone(Record):
    """A stage ended after `iterations`."""

    type: Literal["stage_done"] = "stage_done"
    stage: _Stage
    iterations: _Count | None = None
    reason: _Line


class SmallerTile(Record):
    """The device has no memory for tiles larger than this."""

    type: Literal["smaller_tile"] = "smaller_tile"
    tile_px: _Side


class Exporting(Record):
    """A picture is whole and gets its name next. `picture`: None in records from before it was kept."""

    type: Literal["exporting"] = "exporting"
    output: _Line
    picture: WrittenPicture | None = None


class Exported(Record):
    """A picture has its name. `options`: those of its export."""

    type: Literal["exported"] = "exported"
    output: _Line
    options: dict[_Line, Any] | None = None
    picture: WrittenPicture | None = None


class CanvasLost(Record):
    """A repair gave up the canvas of a stage that the run no longer needs."""

    type: Literal["canvas_lost"] = "canvas_lost"
    stage: _Stage


class RolledBack(Record):
    """A repair took back all records from this index on."""

    type: Literal["rolled_back"] = "rolled_back"
    records: Annotated[int, Field(ge=0)]


_KINDS = (Begun, StagePrepared, Iteration, StageDone, SmallerTile, Exporting, Exported, CanvasLost, RolledBack)
_BY_TYPE: Mapping[str, type[Record]] = {str(kind.model_fields["type"].default): kind for kind in _KINDS}


def parse_json(data: bytes) -> Any:
    """JSON as data. Raises ValueError, also for what Python's reader lets through: NaN, and nesting beyond use."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def as_json(record: Record) -> dict[str, Any]:
    """The record as a line of the journal has it."""
    data = record.model_dump(mode="json")
    return {"type": data["type"], **data}  # what it is comes first, for people who read it


def parse_record(data: Any) -> Record:
    """The record that a journal's line holds. Raises ValueError for what is none, OtherVersionError for a later one."""
    _refuse_later(data)
    kind = data.get("type") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in _BY_TYPE:
        raise ValueError(f"type: {shown(str(kind), 100)} is no kind of record")
    model = _BY_TYPE[kind]
    if "version" not in data:
        data = {name: value for name, value in data.items() if name in model.model_fields}
    return _validated(model, data)


def parse_manifest(data: Any) -> Manifest:
    """The manifest that a file holds. Raises ValueError for what is none, OtherVersionError for a later one."""
    _refuse_later(data)
    return _validated(Manifest, data)


def _refuse_later(data: Any) -> None:
    """Before anything else of it is looked at: a later version may have other kinds, and other fields."""
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
