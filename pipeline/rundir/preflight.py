"""Checks everything that a run needs before it starts: image headers, plan, output. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pipeline.config import AnyConfig, ApplyConfig, Config, ExportConfig, PrintSize, dotted, input_files
from pipeline.core.color_spaces import SpaceName
from pipeline.core.errors import ConfigError
from pipeline.core.files import same_file
from pipeline.images import (
    ImageHeader,
    OutputColors,
    check_colors,
    check_output,
    output_profile,
    proof_profile,
    read_header,
    refuse_unheeded,
    wanted_space,
)
from pipeline.network import weights_bytes, widths_for_plan
from pipeline.plan import Device, Plan, initial_px, make_plan, run_device, with_size_in_px
from pipeline.rundir.notes import color_notes, export_notes
from pipeline.rundir.paths import refuse_own_state
from pipeline.rundir.process_settings import process_settings

C = TypeVar("C", Config, ApplyConfig, AnyConfig)


@process_settings()
def plan(config: Config) -> Plan:
    """What a run of `config` will compute and need, from the image headers alone; nothing is rendered or written.

    Raises ConfigError if the run does not fit in memory or the output format cannot store the image, InputError for an
    image or weights that cannot be used.
    """
    return plan_on(resolved(config), run_device(config.compute))


def with_initial_size(config: Config) -> Config:
    """The config with the number that `initial_size: auto` stands for. Raises InputError for an unusable image."""
    if config.initial_size != "auto":
        return config
    return config.model_copy(update={"initial_size": initial_px(config, _headers(config))})


def resolved(config: C) -> C:
    """The config as a run renders it and a resume compares it: `size` in px, and a working space for `auto`.

    Raises ConfigError for a size that no image can have, InputError for an unusable content or profile.
    """
    if isinstance(config.size, PrintSize):
        content = read_header(config.content, config.limits) if config.content is not None else None
        config = with_size_in_px(config, (content.height_px, content.width_px) if content is not None else None)
    if config.working_space == "auto":
        space = wanted_space(output_profile(config.export.profile, config.content, config.limits))
        config = config.model_copy(update={"working_space": space})
        config.model_fields_set.discard("working_space")  # not given: a refused resume then says what to add
    return config


def _headers(config: Config) -> dict[Path, ImageHeader]:
    no_images = (("network", "weights"), ("proof",), ("init", "apply"), ("init", "wct"))
    return {path: read_header(path, config.limits) for key, path in input_files(config) if key not in no_images}


def plan_on(config: Config, device: Device) -> Plan:
    """`plan` for a device that is already known; `config`: from `resolved`."""
    images = _headers(config)
    widths = widths_for_plan(config.network.name, config.network.weights, config.limits.max_weights_bytes)
    weights = weights_bytes(config.network.name, config.network.weights)
    # all that can be refused is refused here, because a run finds the rest only after hours
    refuse_own_state(config.output, config.work_dir)
    planned = make_plan(config, images, widths, weights, device)
    return with_checked_output(config, planned, images)


def with_checked_output(config: AnyConfig, planned: Plan, images: Mapping[Path, ImageHeader]) -> Plan:
    """The plan with the kind of its output images, and notes on colours.

    Raises ConfigError for what cannot be written.
    """
    for name, (height, width) in planned.outputs.items():
        check_output(Path(name), width, height, planned.picture.bits, config.export.compression)
    _check_outputs(config, planned)
    refuse_unheeded(config.output, config.export.changed, planned.picture.alpha)
    colors = output_colors(config.export, config.canvas_space, config.content)
    check_colors(config.output, colors, config.export.compression)
    if config.proof is not None:
        proof_profile(config.proof)
    notes = (*planned.notes, *color_notes(config, images, colors), *export_notes(config.output, config.export, colors))
    if colors.profile.space == "CMYK":
        planned = _with_four_channels(planned)
    return replace(planned, picture=colors.picture_kind(planned.picture), notes=notes)


def _with_four_channels(planned: Plan) -> Plan:
    """The plan with the disk space of the inks: CMYK has a channel more than RGB, and as many as RGB with alpha."""
    channels = planned.picture.channels
    files, levels = (size_bytes * 4 // channels for size_bytes in (planned.output_bytes, planned.levels_bytes))
    return replace(planned, output_bytes=files, levels_bytes=levels)


def _check_outputs(config: AnyConfig, planned: Plan) -> None:
    """Raise ConfigError for output images that have too many px with their edges, or the name of an input."""
    pixels = sum(height * width for height, width in planned.outputs.values())
    if pixels > config.limits.max_result_pixels:
        raise ConfigError(
            f"export: with its edges at {planned.dpi:g} dpi the result would have {pixels:,} px, beyond "
            f"limits.max_result_pixels ({config.limits.max_result_pixels:,}). Choose smaller edges, or another dpi."
        )
    for key, path in input_files(config):
        for name in planned.outputs:
            if same_file(Path(name), path):
                raise ConfigError(f"output {name}: a panel has the name of {dotted(key)}, which would be overwritten.")


def output_colors(export: ExportConfig, space: SpaceName, content: Path | None) -> OutputColors:
    """How the canvas is exported. `space`: its own. Raises ConfigError, InputError for a profile."""
    profile = output_profile(export.profile, content)
    return OutputColors(profile, space, export.intent, export.black_point_compensation)
