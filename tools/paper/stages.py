"""Stages of a run, driven one iteration at a time, so that experiments can read or change the state in between.

They use the program's own preparation, passes, Adam and store, without journal and resume. Arrays are (H, W, 3), rows
down, with pixels and gradients as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import pipeline
from pipeline import store
from pipeline.config.config import Config
from pipeline.core.events import ignore
from pipeline.core.tiling import Rect
from pipeline.executors.threads import ThreadExecutor
from pipeline.network.weights import NetworkSpec, find_weights
from pipeline.plan.device import default_threads
from pipeline.plan.network_cost import layers_in_use
from pipeline.plan.plan import StagePlan
from pipeline.render import preparation
from pipeline.render.iteration import Iterations
from pipeline.render.measurements import IterationResult
from pipeline.render.stage import Stage
from pipeline.store.layout import GRADIENT
from tools.docs.make_controls import merged

SAMPLES = Path(__file__).parents[2] / "configs" / "samples"
CONTENT, STYLE = SAMPLES / "landscape.jpg", SAMPLES / "strokes.jpg"


# What the paper's figures are about: its stages and losses, whatever the program's defaults are.
BASE: dict[str, Any] = {
    "stage_ratio": 2,
    "style_stages": True,
    "dequantize": False,
    "init_noise": 0,
    "network": {
        "padding": "replicate",
        "pooling": "max",
        "style_layers": {f"conv{block}_1": 0.2 for block in range(1, 6)},
    },
    "loss": {"kind": "normalized", "tv_weight": 0},
    "optimizer": {"color_space": "rgb", "coarse_iterations": 1},
}


def write_config(folder: Path, name: str, values: Mapping[str, Any]) -> Config:
    """Write the config of a run called `name` to `folder`, with `values` over those of BASE, and load it."""
    values = merged(BASE, dict(values))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"output": f"{name}.png", **values}, sort_keys=False), encoding="utf-8")
    return pipeline.load_config(path)


class Driven:
    """One stage of the run of `config`, prepared in its work_dir and iterated by the caller."""

    def __init__(
        self, config: Config, plan: StagePlan, executor: ThreadExecutor, previous: store.StageArray | None = None
    ):
        """`previous`: the canvas of the previous stage. The config must set compute.tile_px."""
        config = config.for_stage(max(plan.size))
        weights = find_weights(config.network.name, config.network.weights, config.seed)
        spec = NetworkSpec(
            weights,
            config.network.padding,
            config.network.pooling,
            config.compute.dtype,
            "cpu",
            default_threads(config.compute.workers) if config.compute.threads == "auto" else config.compute.threads,
            pooling_scale=config.network.pooling_scale,
        )
        assert config.compute.tile_px != "auto"
        config.work_dir.mkdir(parents=True, exist_ok=True)
        self.stage = Stage(
            config,
            plan,
            layers_in_use(config, weights.widths, plan.scales),
            spec,
            config.work_dir / f"stage_{plan.index}",
            executor,
            ignore,
            config.compute.tile_px,
        )
        prepared = preparation.prepare(self.stage, previous)
        self.checksums, self._energies = dict(prepared.checksums), prepared.content_energies
        self.iteration, self.alpha, self._iterations = 0, None, Iterations(self.stage, self._energies)

    def iterate(self, one_more: Callable[[IterationResult], bool] = lambda _: False) -> IterationResult:
        """Run the next iteration. `one_more`: whether another follows, whose Gram pass may start early."""
        results: list[IterationResult] = []

        def commit(result: IterationResult) -> bool:
            results.append(result)
            return one_more(result)

        self._iterations.iterate(self.iteration, self.alpha, self.checksums, commit)
        (result,) = results
        self.checksums |= result.checksums
        self.alpha, self.iteration = result.alpha or None, self.iteration + 1
        return result

    def to_its_end(self) -> Iterator[IterationResult]:
        """Iterate until the config's optimizer ends the stage; yields the result of each iteration."""
        settings = self.stage.config.optimizer

        def continues(result: IterationResult) -> bool:
            return result.stepped and result.mean_abs_u >= settings.stop_condition

        while self.iteration < settings.max_iterations:
            result = self.iterate(continues)
            yield result
            if not continues(result):
                return

    @property
    def canvas(self) -> store.StageArray:
        """The canvas that the next iteration reads."""
        return store.open_array(self.stage.stage_dir, f"canvas_{self.iteration % 2}")

    def pixels(self) -> np.ndarray:
        """The whole canvas."""
        return self.canvas.read_window(self._whole)

    def gradient(self) -> np.ndarray:
        """The whole gradient of the last iteration."""
        return store.open_array(self.stage.stage_dir, GRADIENT).read_window(self._whole)

    def place(self, pixels: np.ndarray, iteration: int, alpha: float | None) -> None:
        """Continue at `iteration` from a canvas that was computed elsewhere."""
        self.iteration, self.alpha = iteration, alpha
        array = self.canvas
        self.checksums[array.path.name] = array.packed(array.write_window(self._whole, pixels))
        for moment in ("m", "v"):  # any values will do: the gradient does not depend on them
            zeros = store.open_array(self.stage.stage_dir, f"{moment}_{iteration % 2}")
            self.checksums[zeros.path.name] = zeros.packed(zeros.write_window(self._whole, np.zeros_like(pixels)))
        self._iterations = Iterations(self.stage, self._energies)  # discards the Gram sums of the old canvas

    @property
    def _whole(self) -> Rect:
        height, width = self.stage.plan.size
        return Rect(0, height, 0, width)
