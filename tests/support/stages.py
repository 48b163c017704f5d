"""Stages prepared from files into a real store, beside the same problem for the whole-image reference (reference.py).

"Relative" is the largest error over the largest value.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import pyvips
import torch
from safetensors.torch import load_file

import pipeline
from pipeline.config.config import Config, load_config
from pipeline.core.events import ignore
from pipeline.core.tiling import Rect
from pipeline.executors.graph import Executor
from pipeline.executors.threads import ThreadExecutor
from pipeline.network.weights import NetworkSpec, find_weights
from pipeline.plan.network_cost import layers_in_use
from pipeline.render.iteration import Iterations
from pipeline.render.measurements import IterationResult
from pipeline.render.preparation import Prepared, prepare
from pipeline.render.stage import Stage
from pipeline.rundir.journal import Journal
from pipeline.rundir.open import newest_canvas
from pipeline.rundir.position import position_of
from pipeline.rundir.preflight import plan
from pipeline.rundir.records import Iteration, Record, as_json
from pipeline.store.array import open_array
from pipeline.store.layout import gram_name, layer_key
from pipeline.store.metadata import read_gram
from tests.support import reference
from tests.support.inputs import write_config, write_image

EXACT = 1e-10


# Tiles in flight in the executor of a prepared stage.
TILES = 2


class InOrder(Executor):
    """Runs the nodes one after another, in the order of the graph: what any other order has to be equal to."""

    def __exit__(self, *_: object) -> None:
        pass

    def _run(self, graph, keys, on_done, proceed):
        values = {}
        for key, node in graph.items():
            values[key] = node.function(*(values[need] for need in node.needs))
            on_done(key)
        if proceed is not None:
            proceed(values[keys[0]])
        return [values[key] for key in keys]

    def collect_profile(self) -> None:
        pass


@dataclass(frozen=True)
class Case:
    """A stage whose canvas is noise, and the same problem for the reference."""

    stage: Stage
    started: Prepared
    problem: reference.Problem
    canvas: np.ndarray

    @property
    def tiles(self) -> list[Rect]:
        return [tile.inner for tile in self.stage.tiles]

    def read(self, name: str) -> np.ndarray:
        return read_whole(open_array(self.stage.stage_dir, name))

    def iterate(self) -> IterationResult:
        """The stage's first iteration."""
        results: list[IterationResult] = []
        iterations = Iterations(self.stage, self.started.content_energies, self.started.areas)
        iterations.iterate(0, None, self.started.checksums, results.append)
        return results[0]


class Rendering:
    """The first four iterations of a stage, as `run` does them; any of them may be tried again."""

    def __init__(self, case: Case) -> None:
        self._iterations = Iterations(case.stage, case.started.content_energies)
        self._checksums, self.results = dict(case.started.checksums), list[IterationResult]()
        self.follows = True  # one more iteration
        self.committed = threading.Event()

    def _commit(self, result: IterationResult) -> bool:
        self.results.append(result)
        self.committed.set()
        self._checksums |= result.checksums
        return self.follows

    def iterate(self) -> None:
        alpha = self.results[0].alpha if self.results else None
        self._iterations.iterate(len(self.results), alpha, self._checksums, self._commit)

    def finish(self) -> tuple[list[float], dict[str, str]]:
        """Objectives and checksums."""
        while len(self.results) < 4:
            self.iterate()
        return [result.objective for result in self.results], self._checksums


def delayed(task, seconds: Iterator[float]):
    def slow_task(spec):
        time.sleep(next(seconds))
        result = task(spec)
        time.sleep(next(seconds))
        return result

    return slow_task


def read_whole(array) -> np.ndarray:
    return array.read_window(Rect(0, array.shape[0], 0, array.shape[1]))


@contextmanager
def prepared(
    folder: Path,
    weights: Path,
    size: tuple[int, int],
    tile_px: int,
    *,
    style_sizes=((50, 67),),
    style_weights=(1.0,),
    chunk_px: int | None = None,
    network=None,
    loss=None,
    masks=(),
    content_mask=None,
    scales: int = 1,
    **values,
):
    """Write the images and prepare the last stage of a run at `size`, from noise, in tiles of `tile_px`.

    Without `scales`, it is the only one.

    `masks`: per style its (H, W) uint8 mask or None; equal ones are one file. `content_mask`: another, or None.
    """
    content = write_image(folder / "content.png", *size, seed=1).astype(np.float64)
    styles = []
    for index, style_size in enumerate(style_sizes):
        styles.append(write_image(folder / f"style{index}.png", *style_size, seed=2 + index).astype(np.float64))
    painted = [
        {"image": f"style{index}.png", "weight": share, "mask": write_mask(folder, mask)}
        for index, (share, mask) in enumerate(zip(style_weights, masks or [None] * len(styles), strict=True))
    ]
    loss = {**(loss or {}), "content_mask": write_mask(folder, content_mask), "scales": scales}
    path = write_config(
        folder,
        styles=painted,
        # a stage has the scales that are no smaller than the first
        initial_size=max(size) >> scales - 1 if scales > 1 else max(*size, *itertools.chain(*style_sizes)),
        init="noise",
        network={"weights": str(weights), **(network or {})},
        loss=loss,
        **values,
        compute={"dtype": "float64", "device": "cpu", "tile_px": tile_px},
        # few files: on some disks each costs milliseconds
        store={"chunk_px": chunk_px or (tile_px // 2 if tile_px % 32 == 0 else tile_px)},
    )
    config = load_config(path)
    planned = plan(config)
    assert (planned.stages[-1].size, planned.stages[-1].scales) == (size, scales)
    assert scales > 1 or len(planned.stages) == 1
    with ThreadExecutor(TILES) as executor:
        stage = make_stage(config, planned, executor)
        started = prepare(stage, None)
        canvas = read_whole(open_array(stage.stage_dir, "canvas_0"))
        assert canvas.dtype == np.float64
        problem = make_problem(config, content, styles, load_file(weights))
        if masks or content_mask is not None:
            shares = [None if mask is None else mask / 255 for mask in masks]
            kept = None if content_mask is None else content_mask / 255
            problem = replace(problem, masks=shares, content_mask=kept)
        yield Case(stage, started, problem, canvas)


def write_mask(folder: Path, mask: np.ndarray | None) -> str | None:
    """A grey PNG of an (H, W) uint8 mask, named after its pixels; gives its name, None for None."""
    if mask is None:
        return None
    name = f"mask_{zlib.crc32(mask.tobytes()):08x}.png"
    pyvips.Image.new_from_array(np.ascontiguousarray(mask), interpretation="b-w").write_to_file(str(folder / name))
    return name


def make_stage(config: Config, planned, executor: ThreadExecutor) -> Stage:
    source = find_weights(config.network.name, config.network.weights, config.seed)
    return Stage(
        config=config,
        plan=planned.stages[-1],
        layer_use=layers_in_use(config, source.widths, planned.stages[-1].scales),
        network=NetworkSpec(
            source,
            config.network.padding,
            config.network.pooling,
            "float64",
            "cpu",
            pooling_scale=config.network.pooling_scale,
        ),
        stage_dir=config.work_dir / "store.zarr" / "stage_0",
        executor=executor,
        sink=ignore,
        tile_px=planned.tile_px,
    )


def make_problem(config: Config, content: np.ndarray, styles: list[np.ndarray], state) -> reference.Problem:
    return reference.Problem(
        state=state,
        content=content,
        styles=[(image, style.weight) for image, style in zip(styles, config.styles, strict=True)],
        content_layers=config.network.content_layers if config.loss.content_weight else {},
        style_layers=config.network.style_layers if config.loss.style_weight else {},
        kind=config.loss.kind,
        padding=config.network.padding,
        pooling=config.network.pooling,
        pooling_scale=config.network.pooling_scale,
        content_weight=config.loss.content_weight,
        style_weight=config.loss.style_weight,
        tv_weight=config.loss.tv_weight,
        tv_kind=config.loss.tv_kind,
        color=config.color,
        color_space=config.optimizer.color_space,
        scales=config.loss.scales,
    )


def relative(found, wanted) -> float:
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    assert np.abs(wanted).max() > 0
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def assert_exact(case: Case) -> None:
    """Energies, target Grams, canvas Grams, losses and gradient of one iteration, all against the reference."""
    problem, stage = case.problem, case.stage
    for layer, scale in itertools.product(problem.content_layers, range(problem.scales)):
        wanted, key = problem.content_features(scale)[layer], layer_key(layer, scale)
        assert relative(case.started.content_energies[key], wanted.square().sum()) < EXACT
        assert relative(case.read(f"features_{key}"), wanted.permute(1, 2, 0)) < EXACT
    for layer, scale in itertools.product(problem.style_layers, range(problem.scales)):
        for region, key in enumerate(stage.layer_use.guides.keys(layer_key(layer, scale))):
            found = read_gram(stage.stage_dir, key, case.started.checksums[gram_name(key)])
            if problem.kind == "wasserstein":
                mean, second = problem.target_moments(layer, region, scale)
                assert relative(found[:-1, -1], mean) < EXACT and found[-1, -1] == pytest.approx(1, rel=EXACT)
                found, wanted = found[:-1, :-1], second
            else:
                wanted = problem.target_grams(region, scale)[layer]
            assert relative(found, wanted) < EXACT
    result = case.iterate()
    canvas = torch.from_numpy(case.canvas)
    content_loss, style_loss = problem.losses(canvas)
    for found, wanted in (
        (result.content_loss, content_loss),
        (result.style_loss, style_loss),
        (result.objective, problem.objective(canvas)),
    ):
        assert found == pytest.approx(float(wanted), rel=EXACT, abs=0)
    assert relative(case.read("gradient"), problem.gradient(case.canvas)) < EXACT


def each_record(records: Sequence[Record]) -> list[dict]:
    """The records of a journal, with one of each iteration, whether it was committed alone or with others."""
    each = (one for record in records for one in (record.each if isinstance(record, Iteration) else [record]))
    return [as_json(record) for record in each]


def final_canvas(folder: Path, weights: Path, tile_px: int, **values) -> tuple[np.ndarray, list[dict]]:
    """Run two stages in float64 and give the last canvas and the journal, with a record of each iteration."""
    folder.mkdir()
    write_image(folder / "content.png", 83, 131, seed=1)
    write_image(folder / "style.png", 70, 50, seed=2)
    config = load_config(
        write_config(
            folder,
            initial_size=66,
            network={"weights": str(weights), **values.pop("network", {})},
            compute={"dtype": "float64", "device": "cpu", "tile_px": tile_px},
            optimizer={"max_iterations": 4, **values.pop("optimizer", {})},
            store={"chunk_px": 48},
            **values,
        )
    )
    pipeline.run(config)
    records = Journal(config.work_dir / "journal.jsonl").read()
    canvas = newest_canvas(config.work_dir, position_of(records), 1)
    assert canvas.shape == (83, 131, 3)
    return read_whole(canvas), each_record(records)


def literal_stage(
    problem: reference.Problem, canvas: np.ndarray, optimizer, carried=(0.0, 0.0, 0, None)
) -> tuple[np.ndarray, list[dict]]:
    """algorithm.md, "Stages", the inner loop on the whole image; gives the result and what each iteration measured.

    `carried`: m, v, the number of Adam's steps and α that it starts from.
    The result is the last canvas, or Σ_i d^(N−1−i)·p_i / Σ_i d^(N−1−i) of all N that the iterations made.
    """
    p, measured, made = canvas.copy(), [], []
    m, v, steps, alpha = carried
    beta1, beta2, total = optimizer.beta1, optimizer.beta2, optimizer.max_iterations
    for j in range(total):
        objective = float(problem.objective(torch.from_numpy(p)))
        g = problem.gradient(p)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        u = m / np.sqrt(v + optimizer.epsilon)
        b = math.sqrt(1 - beta2 ** (steps + j + 1)) / (1 - beta1 ** (steps + j + 1))
        alpha = alpha or optimizer.target_pixel_change / (b * np.abs(u).max())
        c = 1 if optimizer.schedule == "constant" else 0.05 + 0.95 * (1 + math.cos(math.pi * j / total)) / 2
        p = p - alpha * c * b * (u if problem.color_space == "rgb" else u @ reference.DECORRELATED.numpy().T)
        if optimizer.clip:
            p = np.clip(p, 0, 255)
        made.append(p)
        mean_u, max_u = np.abs(u).mean(), np.abs(u).max()
        measured.append({"objective": objective, "alpha": alpha, "mean_abs_u": mean_u, "max_abs_u": max_u})
        if mean_u < optimizer.stop_condition:
            break
    weights = optimizer.average ** np.arange(len(made))[::-1]  # 0⁰ is 1
    return np.average(made, axis=0, weights=weights), measured
