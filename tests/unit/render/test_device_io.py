"""What a GPU computes on is what is on the disk: the way by the buffers, tried here with the CPU as the device."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from pipeline import store
from pipeline.core.tiling import Rect
from pipeline.plan.device import STAGING_THREADS
from pipeline.render import device_io
from pipeline.store.array import StageArray

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
    found = device_io.load_staged(array, rect, torch.device("cpu"), torch.float32)
    assert found.shape == (1, 3, rect.height, rect.width) and found.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), wanted)
    assert torch.equal(device_io.load(array, rect, "cpu", torch.float32), found)


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_what_is_saved_by_the_buffers_is_what_numpy_would_write(tmp_path, form):
    """The gradient of a tile has one way to the disk on a GPU and another on a CPU, and checksums must fit both."""
    rect = Rect(32, 70, 0, 90)
    values = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (38, 90, 3)).astype(np.float32))
    one, _ = made(tmp_path / "a" / "stage_0", form)
    other, _ = made(tmp_path / "b" / "stage_0", form)
    sums = device_io.save_staged(one, rect, values)
    assert sums == device_io.save(other, rect, values.permute(2, 0, 1))
    assert sums.keys() == {(cy, cx) for cy in (1, 2) for cx in (0, 1, 2)}
    whole = Rect(0, SIZE[0], 0, SIZE[1])
    assert np.array_equal(one.read_window(whole), other.read_window(whole))


class BandError(Exception):
    """Says which band has failed."""


class SlowDisk:
    """Slows down every chunk that is read or written; the bands `failing` fail once another one is under way."""

    def __init__(self, monkeypatch, failing: set[int]) -> None:
        self._failing, self._lock = failing, threading.Lock()
        self._under_way = threading.Event()
        self.begun, self.running = set[int](), 0
        for name, row in (("write_chunk", lambda cy, *_: cy), ("read_parts", lambda rect, *_: rect.y0 // CHUNK)):
            monkeypatch.setattr(StageArray, name, self._slowed(getattr(StageArray, name), row))

    def _slowed(self, method, row):
        def slow_method(array, *args, **options):
            band = row(*args)
            with self._lock:
                self.begun.add(band)
                self.running += 1
            try:
                if band in self._failing:
                    assert self._under_way.wait(60)
                    time.sleep(0.02 * (10 - band))  # a later band fails earlier
                    raise BandError(band)
                self._under_way.set()
                time.sleep(0.3)
                return method(array, *args, **options)
            finally:
                with self._lock:
                    self.running -= 1

        return slow_method


@pytest.mark.parametrize("way", ["save", "load"])
def test_when_a_band_fails_no_other_is_at_work_any_more(tmp_path, monkeypatch, way):
    """A tile tried again in smaller ones would have chunks of the old one written over it, with other checksums."""
    bands = STAGING_THREADS + 4
    array, _ = made(tmp_path / "stage_0", "float32")
    store.create_array(tmp_path / "stage_0", "tall", (bands * CHUNK, CHUNK, 3), CHUNK, "float32", "none")
    array, rect = store.open_array(tmp_path / "stage_0", "tall"), Rect(0, bands * CHUNK, 0, CHUNK)
    if way == "load":
        array.write_window(rect, np.zeros(array.shape, np.float32))
    disk = SlowDisk(monkeypatch, failing={1, 3})
    with pytest.raises(BandError, match="1"):
        if way == "save":
            device_io.save_staged(array, rect, torch.zeros(array.shape))
        else:
            device_io.load_staged(array, rect, torch.device("cpu"), torch.float32)
    assert disk.running == 0
    begun = set(disk.begun)
    assert len(begun) < bands  # those that had not begun do not begin
    time.sleep(0.5)
    assert disk.begun == begun
