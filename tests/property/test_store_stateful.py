"""The store's own reads and writes against plain Zarr on the same files, in random order: both see the same array, and
the checksums that writing returned match when it is read.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pipeline import store
from pipeline.core.tiling import Rect, chunks_of
from pipeline.store.checksums import checksum

SIDES = st.integers(1, 50)


class TwoReaders(RuleBasedStateMachine):
    """One array on disk, read and written by the store and by zarr; `model` is the expected content."""

    codec: str

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())

    @initialize(
        height=SIDES, width=SIDES, channels=st.integers(1, 4), dtype=st.sampled_from(["float32", "float64", "uint8"])
    )
    def create(self, height: int, width: int, channels: int, dtype: str) -> None:
        store.create_stage(self.folder / "stage_0")
        store.create_array(self.folder / "stage_0", "a", (height, width, channels), 16, dtype, self.codec)
        self.model = np.zeros((height, width, channels), dtype)
        self.array = store.open_array(self.folder / "stage_0", "a")
        self.sums = dict.fromkeys(self.array.chunk_indices(), checksum(np.zeros(self.array.chunk_shape, dtype)))

    @property
    def theirs(self) -> Any:
        """The array as plain zarr opens it."""
        return zarr.open_array(self.folder / "stage_0" / "a", mode="r+").with_config({"write_empty_chunks": True})

    @property
    def checked(self) -> store.StageArray:
        """The array with checksums, which verifies what it reads."""
        return store.open_array(self.folder / "stage_0", "a", self.array.packed(self.sums))

    def rect(self, data: st.DataObject, step: int = 1) -> Rect:
        """A rectangle of whole steps, or up to the border."""
        height, width, _ = self.model.shape
        y0 = data.draw(st.integers(0, (height - 1) // step)) * step
        x0 = data.draw(st.integers(0, (width - 1) // step)) * step
        y1 = min(height, y0 + data.draw(st.integers(1, 1 + (height - 1 - y0) // step)) * step)
        x1 = min(width, x0 + data.draw(st.integers(1, 1 + (width - 1 - x0) // step)) * step)
        return Rect(y0, y1, x0, x1)

    def values(self, data: st.DataObject, rect: Rect) -> np.ndarray:
        """Noise, or zeros, which zarr does not store by default."""
        shape = (rect.height, rect.width, self.model.shape[2])
        if data.draw(st.booleans(), label="zeros"):
            return np.zeros(shape, self.model.dtype)
        return np.random.default_rng(data.draw(st.integers(0, 99))).uniform(0, 255, shape).astype(self.model.dtype)

    @rule(data=st.data())
    def we_write_chunks(self, data: st.DataObject) -> None:
        rect = self.rect(data, 16)
        values = self.values(data, rect)
        self.sums |= self.array.write_window(rect, values)
        self.model[rect.y0 : rect.y1, rect.x0 : rect.x1] = values

    @rule(data=st.data())
    def they_write_anywhere(self, data: st.DataObject) -> None:
        rect = self.rect(data)
        values = self.values(data, rect)
        self.theirs[rect.y0 : rect.y1, rect.x0 : rect.x1] = values
        self.model[rect.y0 : rect.y1, rect.x0 : rect.x1] = values
        for cy, cx, _ in chunks_of(rect, 16):
            chunk = np.empty(self.array.chunk_shape, self.array.dtype)
            self.array.read_chunk(cy, cx, chunk)
            self.sums[cy, cx] = checksum(chunk)

    @rule(data=st.data(), checked=st.booleans())
    def both_read_a_window(self, data: st.DataObject, checked: bool) -> None:
        rect = self.rect(data)
        ours = (self.checked if checked else self.array).read_window(rect)
        assert np.array_equal(ours, self.model[rect.y0 : rect.y1, rect.x0 : rect.x1])
        assert np.array_equal(ours, self.theirs[rect.y0 : rect.y1, rect.x0 : rect.x1])

    @rule(data=st.data())
    def we_read_a_chunk(self, data: st.DataObject) -> None:
        cy, cx = data.draw(st.sampled_from(self.array.chunk_indices()))
        chunk = np.empty(self.array.chunk_shape, self.array.dtype)
        self.checked.read_chunk(cy, cx, chunk)
        part = self.model[cy * 16 : cy * 16 + 16, cx * 16 : cx * 16 + 16]
        assert np.array_equal(chunk[self.array.valid_part(cy, cx)], part)
        assert np.count_nonzero(chunk) == np.count_nonzero(part)  # the padding stays zero

    @invariant()
    def every_chunk_has_its_file(self) -> None:
        if hasattr(self, "array"):
            assert all(self.array.chunk_path(cy, cx).is_file() for cy, cx in self.array.chunk_indices())

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


@pytest.mark.parametrize("codec", ["none", "zstd", "lz4"])
def test_two_readers_see_one_array(codec):
    """A difference from Zarr would give a store that other readers cannot read, or a wrong image."""
    machine = type("Machine", (TwoReaders,), {"codec": codec})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=15, deadline=None))
