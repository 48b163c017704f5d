"""Whether the passes of `apply` keep activations on the disk, or compute the layers before again. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import ApplyConfig
from pipeline.core.errors import ConfigError, storage
from pipeline.core.text import size_text
from pipeline.core.tiling import Size
from pipeline.feedforward import activations, cost
from pipeline.feedforward.spec import TransformSpec
from pipeline.plan import Device
from pipeline.rundir import stage_path
from pipeline.rundir.space import free_space
from pipeline.store import BFLOAT16, ArraySpec, other_slot

# Operations saved per byte of activations that is read or written, above which storing them is worth it. Estimates of
# what a processor computes while a disk moves a byte (100 GFLOP/s, 400 MB/s), and a GPU (30 TFLOP/s, 2 GB/s); measured
# were 52 GFLOP/s on one thread (docs/feedforward.md).
_LEAST_GAIN = {"cpu": 250, "gpu": 15_000}
# Of the free disk space, which others need too.
_LARGEST_SHARE = 0.5


@dataclass(frozen=True)
class Strategy:
    """`arrays`: of the activations that are kept; empty: none are. `notes`: what was chosen and why, for people."""

    arrays: Mapping[str, ArraySpec]
    notes: tuple[str, ...] = ()

    @property
    def keeps(self) -> bool:
        """Whether activations are kept."""
        return bool(self.arrays)


RECOMPUTE = Strategy({})


def strategies(config: ApplyConfig, specs: Sequence[TransformSpec], size: Size, device: Device) -> list[Strategy]:
    """What `config` asks for; with `auto` what is worth it, and then what is done where that has no room in memory.

    `size`: (height, width) of the content. Raises ConfigError where there is nothing to store.
    """
    asked, arrays = config.activations, _arrays(config, specs, size)
    if asked == "recompute" or (asked == "auto" and not arrays):
        return [RECOMPUTE]
    if not arrays:
        raise nothing_kept(config)
    disk = f"{size_text(sum(array.stored_bytes for array in arrays.values()))} of disk space"
    if asked != "auto":
        about = ", approximate: their numbers have 8 bits" if asked == "bfloat16" else ""
        return [Strategy(arrays, (f"activations: stored between the passes, in {disk}{about}",))]
    stage = stage_path(config.work_dir, 0)
    with storage(stage):
        if stage.is_dir():  # of a run that has begun: what it began with
            kept = any(other_slot(path.name) for path in stage.iterdir())
            return [Strategy(arrays, (f"activations: stored in {disk}, as this run began",)) if kept else RECOMPUTE]
    gain, times = _gain(specs, size, arrays)
    least = _LEAST_GAIN["cpu" if device.name == "cpu" else "gpu"]
    if gain < least:
        why = f"storing them saves {gain:,.0f} operations per byte on the disk, and on {device.name} {least:,} pay off"
        return [Strategy({}, (f"activations: computed again in each pass: {why}",))]
    free = free_space(config.work_dir)
    if sum(array.stored_bytes for array in arrays.values()) > free * _LARGEST_SHARE:
        why = f"stored they would take {disk}, more than half of the {size_text(free)} that are free"
        return [Strategy({}, (f"activations: computed again in each pass: {why}",))]
    saved = f"activations: stored between the passes, in {disk}: {times:.1f} times less to compute"
    return [
        Strategy(arrays, (saved,)),
        Strategy({}, ("activations: computed again in each pass: stored they do not fit into memory.limit",)),
    ]


def nothing_kept(config: ApplyConfig) -> ConfigError:
    """The error of a config that stores activations of networks that have none to store."""
    return ConfigError(
        f"activations: {config.activations} is for networks with instance norm; {config.networks[0].file} has no "
        "passes that begin at activations. Leave this key out."
    )


def _arrays(config: ApplyConfig, specs: Sequence[TransformSpec], size: Size) -> dict[str, ArraySpec]:
    form = "float64" if config.compute.dtype == "float64" else "float32"
    if "bfloat16" in (config.activations, config.compute.dtype):
        form = BFLOAT16.name
    arrays: dict[str, ArraySpec] = {}
    for number, spec in enumerate(specs):
        arrays |= activations.array_specs(spec, number, size, config.store.chunk_px, form)
    return arrays


def _gain(specs: Sequence[TransformSpec], size: Size, arrays: Mapping[str, ArraySpec]) -> tuple[float, float]:
    """Operations saved per byte of activations that is moved; and how many times less there is to compute."""
    flop = {True: 0, False: 0}
    moved = 0
    for number, spec in enumerate(specs):
        for keeps in flop:
            steps = activations.steps_of(spec, number, size, keeps)
            flop[keeps] += sum(cost.flop(spec, size, step) for step in steps)
            moved += activations.bytes_moved(steps, arrays)
    return (flop[False] - flop[True]) / moved, flop[False] / flop[True]
