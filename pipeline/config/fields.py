"""The types of the config's values: what each accepts, how it is parsed from YAML and how it is written back.

Every number has an upper bound, so that no config can ask for more than the program can count, list or name. Values
that only the machine limits (memory, disk) are checked against the plan instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, InstanceOf, PlainSerializer, Strict, ValidationInfo

from pipeline.config.messages import Expected, allowed
from pipeline.config.yaml_reader import CommandLineText
from pipeline.core import image_formats, lengths
from pipeline.core.files import path_fault
from pipeline.core.image_formats import OUTPUT_SUFFIXES, PROFILE_SUFFIXES, PROFILES, ProfileName
from pipeline.core.text import BYTE_UNITS, TIME_UNITS, bytes_text, seconds_text, shown
from pipeline.core.vgg_layers import ALIGN_PX, CONV_NAMES

MAX_SIDE_PX = image_formats.MAX_SIDE_PX
MAX_PIXELS = MAX_SIDE_PX**2
# A chunk is the smallest unit of I/O, so it must fit into memory: one of 16,384 px is 3 GiB.
MAX_CHUNK_PX = 2**14
# Every stage reads every style.
MAX_STYLES = 100
# From 16 to 1,000,000 px, each stage 1.2 times the size of the one before.
MAX_STAGES = 64
# More than any machine has cores.
MAX_WORKERS = 256
MAX_THREADS = 1024
# The journal has a line for each iteration.
MAX_ITERATIONS = 100_000
# Far below where the square of a sum of float64 overflows.
MAX_WEIGHT = 1e12
MAX_BYTES = 2**60
MAX_SECONDS = 24 * 3600
# Networks that come with the package, by name; docs/feedforward.md says how each was trained.
PACKAGED_NETWORKS: Mapping[str, Path] = {"strokes": Path(__file__).parents[1] / "assets" / "strokes.safetensors"}
# The limits of Linux and its file systems. Longer names that are derived from a path are checked before the run.
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095


def _absolute(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    if not text:
        raise ValueError("an empty path")
    base = Path.cwd() if isinstance(value, CommandLineText) or not info.context else info.context["base"]
    if fault := path_fault(base / text):
        raise ValueError(fault)
    if any(len(part.encode()) > MAX_NAME_BYTES for part in Path(text).parts) or len(text.encode()) > MAX_PATH_BYTES:
        raise ValueError(f"a name longer than {MAX_NAME_BYTES} bytes, or a path longer than {MAX_PATH_BYTES}")
    try:
        path = base / Path(text).expanduser()
        # Resolve the folder but not the name: the suffix of a link gives the format, that of its target may differ.
        return path.parent.resolve() / path.name if path.is_absolute() else path
    except RuntimeError as error:
        raise ValueError(f"the home folder of {shown(text)!r} cannot be determined; write the full path") from error


def _packaged(value: object) -> object:
    """The file of a packaged network, if `value` is its name."""
    return PACKAGED_NETWORKS.get(value, value) if isinstance(value, str) else value


def _known_layer(name: str) -> str:
    if name not in CONV_NAMES:
        raise ValueError(f"unknown layer; {allowed(name, CONV_NAMES)}")
    return name


def _output_suffix(path: Path) -> Path:
    if path.suffix.lower() not in OUTPUT_SUFFIXES:
        suffix = f"the suffix {shown(path.suffix)!r}" if path.suffix else "no suffix"
        raise ValueError(f"has {suffix}, but the suffix selects the format; {allowed(path.suffix, OUTPUT_SUFFIXES)}")
    return path


def _profile_suffix(path: Path) -> Path:
    if path.suffix.lower() not in PROFILE_SUFFIXES:
        raise ValueError(f"is not the file of a profile; {allowed(path.suffix, PROFILE_SUFFIXES)}")
    return path


def _known_profile(path: Path) -> Path:
    if path.suffix.lower() not in PROFILE_SUFFIXES:
        names = [*PROFILES, *PROFILE_SUFFIXES]
        raise ValueError(f"neither a known profile nor a file of one; {allowed(path.name, names)}")
    return path


def _parse_bytes(value: object) -> object:
    """`value` in bytes if it is text such as 4GiB. Anything else is left for the type check to refuse."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z]+)", value) if isinstance(value, str) else None
    factors = {unit.lower(): factor for unit, factor in BYTE_UNITS.items()}
    if match is None or match[2].lower() not in factors:
        return value
    return int(float(match[1]) * factors[match[2].lower()])


def _parse_seconds(value: object) -> object:
    """`value` in seconds if it is text such as 30s or 5min, or a whole number."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([A-Za-z]+)", value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in TIME_UNITS:
        return float(value) if type(value) is int else value
    return float(match[1]) * TIME_UNITS[match[2].lower()]


def parse_px(value: object) -> object:
    """`value` as a number if it is text such as 4096px. Anything else is left for the type check."""
    match = re.fullmatch(r"([0-9]{1,9}) ?px", value) if isinstance(value, str) else None
    return value if match is None else int(match[1])


def _parse_length(value: object) -> object:
    """`value` as a length if it is written as one. A length itself is what a default or Python code gives."""
    return value if isinstance(value, lengths.Length) else lengths.Length.parse(value)


Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
SidePx = Annotated[Int, Field(ge=ALIGN_PX, le=MAX_SIDE_PX)]
Pixels = Annotated[Int, Field(ge=1, le=MAX_PIXELS)]
File = Annotated[Path, BeforeValidator(_absolute), Expected("a path")]
NetworkFile = Annotated[File, BeforeValidator(_packaged)]
IccFile = Annotated[File, AfterValidator(_profile_suffix), Expected("a path to a profile (.icc)")]
Output = Annotated[File, AfterValidator(_output_suffix)]
Share = Annotated[Float, Field(ge=0, le=MAX_WEIGHT)]
Layers = dict[Annotated[str, AfterValidator(_known_layer)], Annotated[Float, Field(gt=0, le=MAX_WEIGHT)]]
Bytes = Annotated[
    Int,
    Field(gt=0, le=MAX_BYTES),
    BeforeValidator(_parse_bytes),
    PlainSerializer(bytes_text),
    Expected(f"a size such as 4GiB, or a number of bytes, up to {bytes_text(MAX_BYTES)}"),
]
Seconds = Annotated[
    Float,
    Field(ge=0, le=MAX_SECONDS),
    BeforeValidator(_parse_seconds),
    PlainSerializer(seconds_text),
    Expected(f"a time such as 30s, 5min or 1h, up to {seconds_text(MAX_SECONDS)}"),
]
Length = Annotated[
    InstanceOf[lengths.Length], BeforeValidator(_parse_length), PlainSerializer(str), Expected(lengths.EXPECTED)
]
Dpi = Annotated[Float, Field(ge=lengths.MIN_DPI, le=lengths.MAX_DPI)]
_KnownProfile = Annotated[File, AfterValidator(_known_profile), Expected("a path to a profile (.icc)")]
Profile = Annotated[ProfileName | _KnownProfile, Field(union_mode="left_to_right")]
StartName = Literal["content", "noise", "gray"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$"), Expected("one of auto, cpu, cuda, cuda:N")]
Devices = Annotated[
    Literal["auto"]
    | Annotated[
        tuple[Annotated[str, Field(pattern=r"^(cpu|cuda:[0-9]{1,3})$")], ...],
        Field(min_length=1, max_length=MAX_WORKERS),
    ],
    Expected("auto, or a list of devices, as in [cuda:0, cuda:1]"),
]
_Address = Annotated[str, Field(pattern=r"^(tcp|tls)://[^/\s]+:[0-9]{1,5}$")]
Scheduler = Annotated[
    Literal["none"] | _Address | File,
    Field(union_mode="left_to_right"),
    Expected("none, an address such as tls://host:8786, or a path to a scheduler file"),
]
