"""Looking at everything a run needs before it starts: headers, plan, output, disk. Torch is not needed for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline.config import Config
from pipeline.device import Device, resolve_device
from pipeline.errors import ConfigError, SpaceError
from pipeline.image_export import check_output
from pipeline.image_header import read_header
from pipeline.places import refuse_links_at_top, refuse_own_state
from pipeline.plan import Plan, make_plan
from pipeline.weights import weights_bytes, widths_for_plan


def plan(config: Config) -> Plan:
    """What a run of `config` will do and need, from the image headers alone; nothing is rendered or written.

    Raises ConfigError if it cannot fit in memory or the output's format cannot hold it, InputError for an image or
    weights that cannot be used.
    """
    return plan_on(config, resolve_device(config.compute.device))


def plan_on(config: Config, device: Device) -> Plan:
    """`plan` for a device that is already known."""
    content = read_header(config.content, config.limits)
    styles = [read_header(style.image, config.limits) for style in config.styles]
    widths = widths_for_plan(config.network.name, config.network.weights, config.limits.max_weights_bytes)
    weights = weights_bytes(config.network.name, config.network.weights)
    refuse_own_state(config.output, config.work_dir)
    planned = make_plan(config, content, styles, widths, weights, device.name, device.memory_bytes)
    height, width = planned.stages[-1].size
    check_output(config.output, width, height, config.export.bits, config.export.compression)
    return planned


def check_space(config: Config, planned: Plan) -> None:
    """Raise SpaceError if the disk has no room for what the run has yet to write."""
    used = folder_bytes(config.work_dir)
    store_need = max(0, planned.disk_bytes - used)
    folders = {"store": (config.work_dir, store_need), "picture": (config.output.parent, planned.output_bytes)}
    shared = _device_of(config.work_dir) == _device_of(config.output.parent)
    for what, (folder, need) in folders.items():
        total = store_need + planned.output_bytes if shared else need
        free = shutil.disk_usage(existing_parent(folder)).free
        if total > free:
            raise SpaceError(
                f"{folder}: the run still needs {total / 2**30:.2f} GiB here for its "
                f"{'store and picture' if shared else what}, but {free / 2**30:.2f} GiB are free, and it would stop "
                "half-way. Make room, or put work_dir or output on another disk, or choose a smaller size."
            )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`; zero if it does not exist."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def existing_parent(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def make_work_dir(work_dir: Path) -> None:
    """Make the run directory, or check that it is one.

    Raises ConfigError if it cannot serve, DamagedStateError if there are links in it.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"work_dir {work_dir}: cannot be made ({error.strerror}). Choose another work_dir."
        ) from error
    if not os.access(work_dir, os.W_OK | os.X_OK):
        raise ConfigError(f"work_dir {work_dir}: cannot be written to. Change its permissions or choose another.")
    refuse_links_at_top(work_dir)
    ours = {"lock", "lock.owner", "manifest.json.partial"}
    names = {path.name for path in work_dir.iterdir()}
    if not names & {"manifest.json", "journal.jsonl"} and names - ours:
        raise ConfigError(
            f"work_dir {work_dir}: holds files that are not a run's, and a run deletes what it does not know. "
            "Choose an empty or a new folder."
        )


def _device_of(folder: Path) -> int:
    return existing_parent(folder).stat().st_dev
