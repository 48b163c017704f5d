"""What a GPU computes on is what is on the disk: the way by the buffers, tried here with the CPU as the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline import staging, store
from pipeline.tiling import Rect

SIZE, CHUNK = (70, 90), 32


def made(folder, form: str, channels: int = 3):
    """An array of `form`, filled with noise, and its path."""
    store.create_stage(folder)
    store.create_array(folder, "canvas_0", (*SIZE, channels), CHUNK, form, "none")
    array = store.open_array(folder, "canvas_0")
    values = np.random.default_rng(0).uniform(0, 255, (*SIZE, channels)).astype(array.value_dtype)
    array.write_window(Rect(0, SIZE[0], 0, SIZE[1]), values)
    return array, values


@pytest.mark.parametrize("form", ["float32", "uint8", "fixed16", "bfloat16"])
@pytest.mark.parametrize("rect", [Rect(0, 70, 0, 90), Rect(16, 50, 5, 80), Rect(32, 64, 64, 90), Rect(40, 41, 20, 40)])
def test_a_window_that_is_staged_is_the_window(tmp_path, form, rect):
    """A GPU that saw other bits than the CPU would paint another picture; a buffer used too early, a torn one."""
    array, _ = made(tmp_path / "stage_0", form)
    wanted = array.read_window(rect).astype(np.float32)
    found = staging.load_staged(array, rect, torch.device("cpu"), torch.float32)
    assert found.shape == (1, 3, rect.height, rect.width) and found.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), wanted)
    assert torch.equal(staging.load(array, rect, "cpu", torch.float32), found)


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_what_is_saved_by_the_buffers_is_what_numpy_would_write(tmp_path, form):
    """The gradient of a tile has one way to the disk on a GPU and another on a CPU, and checksums must fit both."""
    rect = Rect(32, 70, 0, 90)
    values = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (38, 90, 3)).astype(np.float32))
    one, _ = made(tmp_path / "a" / "stage_0", form)
    other, _ = made(tmp_path / "b" / "stage_0", form)
    sums = staging.save_staged(one, rect, values)
    assert sums == staging.save(other, rect, values.permute(2, 0, 1))
    assert sums.keys() == {(cy, cx) for cy in (1, 2) for cx in (0, 1, 2)}
    whole = Rect(0, SIZE[0], 0, SIZE[1])
    assert np.array_equal(one.read_window(whole), other.read_window(whole))
