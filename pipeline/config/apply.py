"""The config of `pipeline apply`: a picture through image transformation networks.

Keys that `run` has too mean the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.config import Config, input_files, read_overridden, refuse_other_command, validated
from pipeline.config.conflicts import compute_conflicts, picture_conflicts
from pipeline.config.fields import Bool, File, NetworkFile, Output, Share, SidePx, parse_px
from pipeline.config.messages import Conflict, ConflictsError, Expected
from pipeline.config.output_sections import ExportConfig
from pipeline.config.overrides import override
from pipeline.config.sections import (
    COMPARED_BY_CONTENT,
    HARMLESS,
    ComputeConfig,
    LimitsConfig,
    MemoryConfig,
    PrintSize,
    Section,
    StoreConfig,
    new,
)
from pipeline.config.settings import OnPaper, default_work_dir
from pipeline.config.yaml_reader import CommandLineText, Document, Key, Place, plain_value, read
from pipeline.core.color_spaces import SpaceName, WorkingSpace
from pipeline.core.image_formats import OUTPUT_SUFFIXES
from pipeline.core.text import shown

_MAX_NETWORKS = 16
Styles = dict[Annotated[str, Field(max_length=200)], Share]


class ApplyNetwork(Section):
    """A network, the style that it applies, and where."""

    file: NetworkFile = Field(
        description="network: .safetensors of `pipeline train`, .pth of pytorch/examples, or strokes, a packaged one",
        examples=["net.safetensors"],
        json_schema_extra=COMPARED_BY_CONTENT,
    )
    styles: Styles | None = Field(
        None, max_length=1000, description="weight of each style of a network with several; null: its first"
    )
    mask: File | None = Field(
        None,
        description="mask for this network: same aspect ratio as the content; white = apply, black = leave",
        json_schema_extra=COMPARED_BY_CONTENT,
    )


class WctConfig(Section):
    """Whitening and colouring: any style through encoder–decoder pairs."""

    levels: Annotated[tuple[Annotated[int, Field(ge=1, le=5)], ...], Expected("a list of levels from 5 to 1")] = Field(
        (5, 4, 3, 2, 1), min_length=1, max_length=5, description="levels, in order; 5: the coarsest"
    )
    strength: Annotated[float, Field(ge=0, le=1)] = Field(
        0.6, description="0: the content's features, 1: the style's; the paper: 0.6"
    )


def _as_networks(value: object) -> object:
    """One file is a list of one network."""
    return [{"file": value}] if isinstance(value, str | Path) else value


class ApplyConfig(Section):
    """The settings of one picture, which do not contradict each other. All paths are absolute."""

    networks: Annotated[
        tuple[ApplyNetwork, ...], BeforeValidator(_as_networks), Expected("a network's file, or a list of networks")
    ] = Field(
        min_length=1,
        max_length=_MAX_NETWORKS,
        description="network's file, or several networks with masks",
        examples=[[{"file": "net.safetensors"}]],
    )
    content: File = Field(description="content image", examples=["content.jpg"], json_schema_extra=COMPARED_BY_CONTENT)
    style: File | None = Field(
        None,
        description="style image, for a file of encoder–decoder pairs (whitening and colouring)",
        json_schema_extra=COMPARED_BY_CONTENT,
    )
    wct: WctConfig = Field(WctConfig(), description="whitening and colouring")
    output: Output = Field(
        description=f"output image, {' '.join(OUTPUT_SUFFIXES)}", examples=["result.tif"], json_schema_extra=HARMLESS
    )
    work_dir: File = Field(
        default_factory=default_work_dir,
        description="run directory, which holds the state; by default beside the output",
        json_schema_extra=HARMLESS,
    )
    size: Annotated[SidePx | OnPaper | None, BeforeValidator(parse_px)] = Field(
        None, description="long side of the output; null: as the content, times the network's factor"
    )
    color: Literal["style", "luminance"] = Field(
        "style", description="where the colours come from; luminance keeps the content's colours"
    )
    match_histogram: Bool = Field(
        False,
        description="give each channel of an enlargement the histogram of the content's",
        json_schema_extra=new(False),
    )
    working_space: WorkingSpace = Field(
        "auto", description="colours that the canvas can have; auto: sRGB, or more for a wider export.profile"
    )
    activations: Literal["auto", "recompute", "store", "bfloat16"] = Field(
        "auto",
        description="passes compute the layers before again, or store activations; auto: as the plan says; bfloat16: "
        "stored in half the space, approximate",
        json_schema_extra=new("auto"),
    )
    compute: ComputeConfig = Field(ComputeConfig(), description="device, precision and parallelism")
    memory: MemoryConfig = Field(MemoryConfig(), description="host memory", json_schema_extra=HARMLESS)
    store: StoreConfig = Field(StoreConfig(), description="state on disk")
    limits: LimitsConfig = Field(LimitsConfig(), description="limits checked at the start", json_schema_extra=HARMLESS)
    export: ExportConfig = Field(ExportConfig(), description="file format of the output", json_schema_extra=HARMLESS)

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        if conflicts := [
            *_networks(self),
            *compute_conflicts(self.compute),
            *_processes(self.compute),
            *picture_conflicts(self.output, self.work_dir, self.export, input_files(self)),
        ]:
            raise ConflictsError(conflicts)
        return self

    @property
    def canvas_space(self) -> SpaceName:
        """The colour space of the canvas; the working space is only `auto` until the run begins."""
        return "srgb" if self.working_space == "auto" else self.working_space

    @property
    def proof(self) -> None:
        """A run's key that this config does not have."""

    @property
    def size_px(self) -> int | None:
        """`size` of a config in which it is in px; see rundir.resolved."""
        assert not isinstance(self.size, PrintSize), "the size in px depends on the content's header"
        return self.size

    @property
    def masks(self) -> tuple[Path, ...]:
        """The mask of each network; empty without masks."""
        return tuple(network.mask for network in self.networks if network.mask is not None)


def _processes(compute: ComputeConfig) -> Iterator[Conflict]:
    if compute.devices != "auto" and compute.workers:
        text = "beside compute.devices it is the number of processes that update a canvas, and apply has none; leave it"
        yield Conflict((("compute", "workers"), ("compute", "devices")), f"{text} out")


def _networks(config: ApplyConfig) -> Iterator[Conflict]:
    unmasked = [index for index, network in enumerate(config.networks) if network.mask is None]
    if len(unmasked) > 1:
        key: Key = ("networks", unmasked[1], "mask")
        yield Conflict((key,), "missing; of several networks only one applies where the masks of the others are black")
    for index, network in enumerate(config.networks):
        if network.styles is not None and not sum(network.styles.values()) > 0:
            yield Conflict((("networks", index, "styles"),), "the weights sum to 0, so they cannot be normalised")


def load_apply_config(path: str | Path, overrides: Sequence[str] = (), *, check_inputs: bool = False) -> ApplyConfig:
    """The config of `pipeline apply` in the YAML file `path`; otherwise as load_config."""
    file = Path(path)
    document = read_overridden(file, overrides)
    refuse_other_command(document, "apply")
    return validated(ApplyConfig, document, Path.cwd() / file.parent, check_inputs)


def is_apply_file(path: str | Path) -> bool:
    """Whether a YAML file is a config of `pipeline apply`: no other has networks."""
    data = read(Path(path)).data
    return isinstance(data, dict) and "networks" in data


def apply_config_of_line(
    network: str,
    content: str,
    output: str,
    size: str | None = None,
    overrides: Sequence[str] = (),
    style: str | None = None,
) -> ApplyConfig:
    """The config of a command line. Raises ConfigError with every problem and the argument that causes it."""
    document = Document("the command line", {})
    for number, (key, text) in enumerate([("networks", network), ("content", content), ("output", output)]):
        document.put([key], CommandLineText(text), Place(1 + number, 0, shown(text)))
    if style is not None:
        document.put(["style"], CommandLineText(style), Place(4, 0, f"--style {shown(style)}"))
    if size is not None:
        value = plain_value(size.strip())
        number_or_text = CommandLineText(value) if isinstance(value, str) else value
        document.put(["size"], number_or_text, Place(5, 0, f"--size {shown(size)}"))
    for number, setting in enumerate(overrides):
        override(document, number, setting)
    return validated(ApplyConfig, document, Path.cwd(), check_inputs=True)


# The config of anything that has a run directory.
AnyConfig = Config | ApplyConfig
