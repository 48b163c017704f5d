"""Checks everything that a run needs before it starts: image headers, plan, output. Does not import torch."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import Config, PrintSize, dotted, input_files
from pipeline.core.errors import ConfigError
from pipeline.core.files import same_file
from pipeline.images import ImageHeader, check_output, read_header, refuse_unheeded
from pipeline.network import weights_bytes, widths_for_plan
from pipeline.plan import Device, Plan, initial_px, make_plan, resolve_device, with_size_in_px
from pipeline.rundir.paths import refuse_own_state
from pipeline.rundir.process_settings import process_settings


@process_settings()
def plan(config: Config) -> Plan:
    """What a run of `config` will compute and need, from the image headers alone; nothing is rendered or written.

    Raises ConfigError if the run does not fit in memory or the output format cannot store the image, InputError for an
    image or weights that cannot be used.
    """
    return plan_on(config, resolve_device(config.compute.device))


def with_initial_size(config: Config) -> Config:
    """The config with the number that `initial_size: auto` stands for. Raises InputError for an unusable image."""
    if config.initial_size != "auto":
        return config
    return config.model_copy(update={"initial_size": initial_px(config, _headers(config))})


def _headers(config: Config) -> dict[Path, ImageHeader]:
    weights_key = ("network", "weights")
    return {path: read_header(path, config.limits) for key, path in input_files(config) if key != weights_key}


def in_pixels(config: Config) -> Config:
    """The config with `size` in px, as a run renders it and a resume compares it.

    Raises ConfigError for a size that no image can have, InputError for an unusable content.
    """
    if not isinstance(config.size, PrintSize):
        return config
    content = read_header(config.content, config.limits) if config.content is not None else None
    return with_size_in_px(config, (content.height_px, content.width_px) if content is not None else None)


def plan_on(config: Config, device: Device) -> Plan:
    """`plan` for a device that is already known."""
    config = in_pixels(config)
    images = _headers(config)
    widths = widths_for_plan(config.network.name, config.network.weights, config.limits.max_weights_bytes)
    weights = weights_bytes(config.network.name, config.network.weights)
    # all that can be refused is refused here, because a run finds the rest only after hours
    refuse_own_state(config.output, config.work_dir)
    planned = make_plan(config, images, widths, weights, device.name, device.memory_bytes)
    for name, (height, width) in planned.outputs.items():
        check_output(Path(name), width, height, planned.picture.bits, config.export.compression)
    _check_outputs(config, planned)
    refuse_unheeded(config.output, config.export.changed, planned.picture.alpha)
    return planned


def _check_outputs(config: Config, planned: Plan) -> None:
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
