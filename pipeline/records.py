"""What a run's manifest and journal may hold: they may come from a stranger, and a crc is not a signature.

Their readers rely on every name and kind checked here; names that they do not know are left alone.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, Strict, StringConstraints, TypeAdapter, ValidationError

from pipeline._fields import MAX_ITERATIONS, MAX_SIDE_PX, MAX_STYLES, MAX_THREADS
from pipeline._yaml import shown

MAX_MANIFEST_BYTES = 2**20  # with a hundred styles 0.2 MB
MAX_JOURNAL_BYTES = 2**30  # of 100,000² px and 1,000 iterations 0.6 GB, nearly all of it checksums
MAX_OWNER_BYTES = 1000
_MAX_STAGES = 64  # sizes double

_Count = Annotated[int, Strict(), Field(ge=0, le=MAX_ITERATIONS)]
_Stage = Annotated[int, Strict(), Field(ge=0, lt=_MAX_STAGES)]
_Side = Annotated[int, Strict(), Field(ge=1, le=MAX_SIDE_PX)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Line = Annotated[str, Strict(), StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$", max_length=5000)]
# Names of arrays, and of metadata: a repair writes there.
_File = Annotated[str, Strict(), StringConstraints(pattern=r"^([a-z0-9_]+|([a-z0-9_]+/)?zarr\.json)$")]
_Sums = dict[_File, Annotated[str, Strict()]]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class _StagePrepared(_Part):
    type: Literal["stage_prepared"]
    stage: _Stage
    content_energies: dict[_Line, _Number]
    areas: dict[_Line, _Number] = {}  # of regions; records from before there were any have none
    checksums: _Sums


class _Iteration(_Part):
    type: Literal["iteration"]
    stage: _Stage
    iteration: _Count
    stepped: Annotated[bool, Strict()]
    alpha: _Number | None
    mean_abs_u: _Number
    max_abs_u: _Number
    objective: _Number
    content_loss: _Number
    style_loss: _Number
    seconds: dict[_Line, _Number]
    checksums: _Sums


class _StageDone(_Part):
    type: Literal["stage_done"]
    stage: _Stage
    reason: _Line


class _SmallerTile(_Part):
    type: Literal["smaller_tile"]
    tile_px: _Side


class _Exporting(_Part):
    type: Literal["exporting", "exported"]
    output: _Line


class _CanvasLost(_Part):
    type: Literal["canvas_lost"]
    stage: _Stage


class _RolledBack(_Part):
    type: Literal["rolled_back"]
    records: Annotated[int, Strict(), Field(ge=0)]


class _Optimizer(_Part):
    max_iterations: _Count


class _Config(_Part):
    output: _Line
    optimizer: _Optimizer


class _StageSizes(_Part):
    size: tuple[_Side, _Side]
    style_sizes: Annotated[list[tuple[_Side, _Side]], Field(max_length=MAX_STYLES)]
    max_iterations: _Count | None = None  # older runs have the config's in every stage


class _Content(_Part):
    model_config = ConfigDict(extra="forbid", frozen=True)
    bits: Literal[8, 16]
    alpha: Annotated[bool, Strict()]


class _Manifest(_Part):
    format: Annotated[int, Strict()]
    created: _Line
    config: _Config
    stages: Annotated[list[_StageSizes], Field(min_length=1, max_length=_MAX_STAGES)]
    content: _Content = _Content(bits=8, alpha=False)
    threads: Annotated[int, Strict(), Field(ge=1, le=MAX_THREADS)]
    result_fields: dict[_Line, _Line | int | float | bool | None]
    inputs: dict[_Line, _Line]


class _Begun(_Part):
    type: Literal["begun"]
    manifest: _Manifest


_KINDS = _Begun | _StagePrepared | _Iteration | _StageDone | _SmallerTile | _Exporting | _CanvasLost | _RolledBack
_RECORD: TypeAdapter[Any] = TypeAdapter(Annotated[_KINDS, Field(discriminator="type")])
_MANIFEST = TypeAdapter(_Manifest)


def parse_json(data: bytes) -> Any:
    """JSON as data. Raises ValueError, also for what Python's reader lets through: NaN, and nesting beyond use."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def check_record(record: object) -> None:
    """Raise ValueError for a journal's record that is none."""
    _check(_RECORD, record)


def check_manifest(manifest: object) -> None:
    """Raise ValueError for a manifest that is none."""
    _check(_MANIFEST, manifest)


def _check(kind: TypeAdapter[Any], value: object) -> None:
    try:
        kind.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(shown(f"{place}: {first['msg']}", 200)) from None
