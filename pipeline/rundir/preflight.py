"""Looking at everything a run needs before it starts: headers, plan, output, disk. Torch is not needed for it."""

from __future__ import annotations

from pipeline.config.config import Config, input_files
from pipeline.images.header import read_header
from pipeline.images.output_check import check_output, refuse_unheeded
from pipeline.network.weights import weights_bytes, widths_for_plan
from pipeline.plan.device import Device, resolve_device
from pipeline.plan.plan import Plan, make_plan
from pipeline.rundir.paths import refuse_own_state
from pipeline.rundir.process_settings import process_settings


@process_settings()
def plan(config: Config) -> Plan:
    """What a run of `config` will do and need, from the image headers alone; nothing is rendered or written.

    Raises ConfigError if it cannot fit in memory or the output's format cannot hold it, InputError for an image or
    weights that cannot be used.
    """
    return plan_on(config, resolve_device(config.compute.device))


def plan_on(config: Config, device: Device) -> Plan:
    """`plan` for a device that is already known."""
    weights_key = ("network", "weights")
    images = {path: read_header(path, config.limits) for key, path in input_files(config) if key != weights_key}
    widths = widths_for_plan(config.network.name, config.network.weights, config.limits.max_weights_bytes)
    weights = weights_bytes(config.network.name, config.network.weights)
    refuse_own_state(config.output, config.work_dir)
    planned = make_plan(config, images, widths, weights, device.name, device.memory_bytes)
    height, width = planned.stages[-1].size
    check_output(config.output, width, height, planned.picture.bits, config.export.compression)
    refuse_unheeded(config.output, config.export.changed, planned.picture.alpha)
    return planned
