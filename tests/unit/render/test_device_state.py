"""A stage in a GPU's memory has the bits of one on the disk: tried here with the CPU as the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pipeline
from pipeline.core.tiling import grid
from pipeline.losses.color_space import DECORRELATED, to_pixels
from pipeline.render import adam, device_state, residency
from tests.support.e2e import canvases, run_until, write_run
from tests.unit.commands.test_commits import batches, measured


@pytest.mark.parametrize("beta2", [0.99, 0.9])
@pytest.mark.parametrize("basis", [None, DECORRELATED])
@pytest.mark.parametrize("weight", [None, 1.0, 0.3])
def test_a_step_has_numpys_bits(beta2, basis, weight):
    """A run that moves from a GPU's memory to the disk, or back, would paint another picture."""
    if basis is not None and not device_state.has_same_bits():
        pytest.skip("numpy's matrix routine does not fuse its additions on this processor")
    step = adam.AdamStep(0.9, beta2, 1e-6, 0.37, clip=True, average_weight=weight, basis=basis)
    rng, shape = np.random.default_rng(3), (2, 48, 64, 3)
    spread = 10 ** rng.uniform(-7, 3, shape)
    gradient, m = (rng.normal(size=shape) * spread).astype("f4"), (rng.normal(size=shape) * spread).astype("f4")
    v, canvas = (spread**2).astype("f4"), rng.uniform(-1, 256, shape).clip(0, 255).astype("f4")
    average = rng.uniform(0, 255, shape).astype("f4")
    sources = [torch.from_numpy(array.copy()) for array in (gradient, canvas, m, v, average)]
    targets = [torch.empty(shape) for _ in sources[1:]]
    found = device_state.update(sources if weight else sources[:4], targets if weight else targets[:3], step)
    abs_u = adam.update(gradient, canvas, m, v, np.empty(shape, "f4"), step)
    if weight:
        adam.move_average(average, canvas, gradient, weight)
    wanted = (abs_u, canvas, m, v, *((average,) if weight else ()))
    for array, tensor in zip(wanted, (found, *targets), strict=False):
        assert array.tobytes() == tensor.numpy().tobytes()


def test_one_rounding_where_two_would_differ():
    """A product and a sum that are rounded one after the other differ in an eighth of all cases."""
    if not device_state.has_same_bits():
        pytest.skip("numpy's matrix routine does not fuse its additions on this processor")
    rng = np.random.default_rng(4)
    theta = (rng.normal(size=(512, 512, 3)) * 10 ** rng.uniform(-30, 3, (512, 512, 3))).astype("f4")
    theta[0, :4] = [[0, 1, -1], [1e-42, -1e-44, 3e-45], [0, 0, 0], [-1, 1, 0]]
    wanted = np.empty_like(theta)
    to_pixels(theta, DECORRELATED, 0.81, wanted)
    assert device_state.pixels_of(torch.from_numpy(theta), DECORRELATED, 0.81).numpy().tobytes() == wanted.tobytes()


def test_neighbours_are_updated_together_and_chunks_of_another_row_alone():
    """A chunk that is left out keeps the canvas of two iterations before."""
    chunks = [(cy, cx) for cy in (2, 3) for cx in range(1, 12)]
    groups = list(device_state._groups(chunks))
    assert groups == [(2, 1, 9), (2, 9, 12), (3, 1, 9), (3, 9, 12)]
    assert [(cy, cx) for cy, x0, x1 in groups for cx in range(x0, x1)] == chunks
    assert len(grid(64, 64, 32)) == 4


def test_a_run_in_a_devices_memory_has_the_same_bytes(tmp_path, monkeypatch):
    """The way of every array: read, computed on, updated, committed, and read again after a stop."""
    keys = {
        "loss": {"scales": 2, "tv_weight": 0.2},
        "optimizer": {"max_iterations": 4, "average": 0.9, "carry": True},
        "compute": {"tile_px": 64, "threads": 1},
    }
    made = []

    def on_cpu(grid, chunk_shape, dtype):
        made.append(device_state.DeviceMemory("cpu", grid, chunk_shape, dtype))
        return made[-1]

    endings = []
    for name, interval in (("disk", 0), ("device", "1h")):
        config = write_run(
            tmp_path / name, (90, 75), (60, 50), output="out.tif", **keys, store={"commit_interval": interval}
        )
        if interval:
            monkeypatch.setattr(residency, "HostMemory", on_cpu)
            run_until(config, lambda event: getattr(event, "iteration", 0) == 1 and event.stage == 1)
            assert batches(config) == [3, 1, 1, 1]
        pipeline.run(pipeline.load_config(config))
        assert pipeline.verify(config.parent / "run").remaining == ()
        endings.append((canvases(config.parent / "run"), measured(config), config.with_name("out.tif").read_bytes()))
    assert made
    assert endings[0] == endings[1]
