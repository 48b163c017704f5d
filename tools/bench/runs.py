"""Renders for the benchmarks: synthetic images, random weights of VGG-19's widths, and measurements of a run.

With random weights, time and memory are VGG-19's, but losses and early stops are meaningless.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyvips
import torch
import yaml
from safetensors.torch import save_file

import pipeline
from pipeline.core.events import Event, IterationDone, Note, StageDone, StageStarted
from pipeline.core.vgg_layers import VGG19_WIDTHS
from pipeline.network.vgg import random_state
from pipeline.network.weights import WeightsSource


def synchronised(device: str) -> float:
    """The time after the device has finished its queued work."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(device: str) -> dict[str, Any]:
    """A description of the machine that is measured."""
    name = "none" if device == "cpu" else torch.cuda.get_device_name(device)
    return {
        "gpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def make_image(path: Path, height: int, width: int, seed: int) -> Path:
    """Write an image of noise at several scales, like the spectrum of photographs."""
    rng = np.random.default_rng(seed)
    image = pyvips.Image.black(width, height, bands=3)
    for side in (4, 16, 64, 256):
        noise = pyvips.Image.new_from_array(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        image = image + noise.resize(width / side, vscale=height / side, kernel="cubic") / 4
    image.cast("uchar").copy(interpretation="srgb").write_to_file(str(path))
    return path


def make_weights(path: Path, divisor: int = 1) -> Path:
    """Write random weights in VGG-19's shape, with its widths divided by `divisor`."""
    widths = {name: width // divisor for name, width in VGG19_WIDTHS.items()}
    save_file(random_state(WeightsSource(None, 0, widths, "random")), path)
    return path


@dataclass
class Taken:
    """Measurements of a run.

    `stages`: size (height, width), tiles, seconds, and per iteration `busy` (seconds by kind of work), the objective,
    and `counted` (the result of the callback that `render` received).
    """

    name: str
    seconds: float = 0.0
    stages: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    planned: dict[str, int] = field(default_factory=dict)
    device_bytes: int = 0
    reserved_bytes: int = 0
    host_bytes: int = 0
    exported_s: float = 0.0

    @property
    def last(self) -> dict[str, Any]:
        """The last stage."""
        return self.stages[-1]

    def per_iteration(self, kind: str) -> float:
        """Median seconds of a kind of work (or `wall`) in the last stage, without its first iteration."""
        values = [busy.get(kind, 0.0) for busy in self.last["busy"]]
        return float(np.median(values[1:] or values))


class Watch:
    """An event sink that records a run's measurements."""

    def __init__(self, taken: Taken, count: Callable[[], Any]) -> None:
        self._taken, self._count, self._since = taken, count, time.perf_counter()

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, StageStarted):
            size = (event.height_px, event.width_px)
            lists: dict[str, list[Any]] = {"busy": [], "objective": [], "counted": []}
            self._taken.stages.append({"size": size, "tiles": event.tiles, "started": now, **lists})
        elif isinstance(event, IterationDone):
            self._taken.last["busy"].append(dict(event.busy))
            self._taken.last["objective"].append(event.objective)
            self._taken.last["counted"].append(self._count())
        elif isinstance(event, StageDone):
            self._taken.last["seconds"] = now - self._taken.last.pop("started")
            self._taken.exported_s = now
        elif isinstance(event, Note):
            self._taken.notes.append(str(event.message))


def render(folder: Path, name: str, config: dict[str, Any], count: Callable[[], Any] = lambda: None) -> Taken:
    """Run `config` (without output) in `folder` and delete its files afterwards.

    `count` is called after every iteration, and its results are recorded.
    """
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**config, "output": f"{name}.tif", "work_dir": f"{name}.run"}), encoding="utf-8")
    loaded = pipeline.load_config(path)
    planned = pipeline.plan(loaded)
    on_gpu = planned.device != "cpu"
    taken = Taken(name, planned={"device": planned.device_bytes, "host": planned.projected_mem_bytes})
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        pipeline.run(loaded, sink=Watch(taken, count))
    finally:
        for leftover in (folder / f"{name}.run", folder / f"{name}.tif"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    taken.seconds = time.perf_counter() - start
    taken.exported_s = start + taken.seconds - taken.exported_s
    taken.host_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if on_gpu:
        taken.device_bytes, taken.reserved_bytes = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    flops = [stage.flop_per_iteration for stage in planned.stages]
    for stage, flop in zip(taken.stages, flops, strict=True):
        stage["flop"] = flop
    return taken
