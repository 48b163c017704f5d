"""Arrays on disk: written data is read back, here and by any Zarr 3 reader, and damage is never read as pixels."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import store
from pipeline.core.errors import DamagedStateError
from pipeline.core.image_formats import PixelKind
from pipeline.core.tiling import Rect
from pipeline.store import metadata, ome_zarr

CODECS = ["none", "zstd", "lz4"]
codecs = pytest.mark.parametrize("codec", CODECS)


@pytest.fixture
def stage(tmp_path) -> Path:
    metadata.create_store(tmp_path / "store.zarr")
    store.create_stage(tmp_path / "store.zarr" / "stage_0")
    return tmp_path / "store.zarr" / "stage_0"


def create(stage: Path, codec: str = "none", shape=(70, 45, 3), chunk_px: int = 16, dtype: str = "float32", name="a"):
    store.create_array(stage, name, shape, chunk_px, dtype, codec)
    return store.open_array(stage, name)


def whole(array) -> Rect:
    return Rect(0, array.shape[0], 0, array.shape[1])


def noise(shape, dtype="float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-300, 300, shape).astype(dtype)


# --- one window, one chunk ---


@codecs
@pytest.mark.parametrize(
    "rect",
    [Rect(0, 71, 0, 45), Rect(64, 80, 0, 45), Rect(0, 70, 32, 46), Rect(-16, 70, 0, 45), Rect(80, 96, 0, 45),
     Rect(32, 16, 0, 45)],
)  # fmt: skip
def test_a_rectangle_outside_the_array_is_refused(stage, codec, rect):
    """With a store of 34 rows and a plan of 35, the padding of a border chunk would be used as pixels."""
    array = create(stage, codec)
    before = noise(array.shape)
    array.write_window(whole(array), before)
    with pytest.raises(store.ChunkError, match="says 45×70 px"):
        array.read_window(rect)
    with pytest.raises(store.ChunkError, match="says 45×70 px"):
        array.write_window(rect, noise((rect.height, rect.width, 3), seed=1))
    with pytest.raises(store.ChunkError, match="says 45×70 px"):
        list(array.read_parts(rect, lambda: np.empty(array.chunk_shape, array.dtype)))
    assert np.array_equal(array.read_window(whole(array)), before)


@codecs
@pytest.mark.parametrize("shape", [(7, 16, 3), (6, 14, 3), (16, 15, 3), (17, 16, 3)])
def test_a_chunk_that_is_not_all_that_the_array_has_there_is_refused(stage, codec, shape):
    """A row more or less would be padding that is used as pixels."""
    array = create(stage, codec)
    with pytest.raises(store.ChunkError, match="do not fit"):
        array.write_chunk(4, 2, noise(shape))  # the last: 6 rows, 13 columns
    array.write_chunk(4, 2, noise((6, 13, 3)))
    array.write_chunk(4, 2, noise((16, 16, 3)))


@codecs
@pytest.mark.parametrize(("dtype", "channels"), [("float32", 3), ("float64", 3), ("uint8", 3), ("float32", 7)])
def test_a_whole_array_is_read_back_by_us_and_by_zarr(stage, codec, dtype, channels):
    """The state must not change by being written and read."""
    array = create(stage, codec, shape=(70, 45, channels), dtype=dtype)
    data = noise((70, 45, channels), dtype)
    array.write_window(whole(array), data)
    assert np.array_equal(array.read_window(whole(array)), data)
    assert np.array_equal(zarr.open_array(stage / "a", mode="r")[...], data)


@codecs
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "uint16"])
def test_chunk_files_are_those_that_zarr_writes(stage, codec, dtype):
    """A run that an earlier version began, through the Zarr API, is resumed and verified by this one."""
    array = create(stage, codec, dtype=dtype)
    zeros = {index: array.chunk_path(*index).read_bytes() for index in array.chunk_indices()}
    theirs = zarr.open_array(stage / "a", mode="r+").with_config({"write_empty_chunks": True})
    theirs[...] = 0
    assert {index: array.chunk_path(*index).read_bytes() for index in zeros} == zeros
    data = np.abs(noise(array.shape, dtype="float32")).clip(0, 255).astype(dtype)
    array.write_window(whole(array), data)
    ours = {index: array.chunk_path(*index).read_bytes() for index in zeros}
    theirs[...] = data
    assert {index: array.chunk_path(*index).read_bytes() for index in zeros} == ours


@codecs
def test_any_zarr_reader_sees_what_the_array_is(stage, codec):
    """Other programs can open the store of a run."""
    create(stage, codec, shape=(70, 45, 3), chunk_px=32, dtype="float64")
    group = zarr.open_group(stage.parent, mode="r")
    array = group["stage_0/a"]
    assert array.metadata.zarr_format == 3
    assert array.shape == (70, 45, 3) and array.chunks == (32, 32, 3) and array.dtype == np.float64
    assert array.metadata.dimension_names == ("y", "x", "c")
    assert (array[...] == 0).all()


@codecs
@settings(max_examples=25)
@given(data=st.data())
def test_random_windows_and_chunk_writes_are_those_of_an_array_in_memory(codec, data):
    """Tiles read windows across chunk borders while chunks are rewritten around them."""
    height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    chunk_px, channels = data.draw(st.sampled_from([16, 32])), data.draw(st.integers(1, 4))
    with tempfile.TemporaryDirectory() as folder:
        array = create(Path(folder), codec, (height, width, channels), chunk_px)
        expected = np.zeros((height, width, channels), np.float32)
        for step in range(data.draw(st.integers(1, 8))):
            if data.draw(st.booleans(), label="write"):
                cy, cx = data.draw(st.sampled_from(array.chunk_indices()))
                rows, columns = array.valid_part(cy, cx)
                values = noise((rows.stop, columns.stop, channels), seed=step)
                if data.draw(st.booleans(), label="full size"):
                    padded = noise(array.chunk_shape, seed=99)
                    padded[rows, columns] = values
                    array.write_chunk(cy, cx, padded)
                else:
                    array.write_chunk(cy, cx, values)
                expected[cy * chunk_px : (cy + 1) * chunk_px, cx * chunk_px : (cx + 1) * chunk_px] = values
            y0, x0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
            rect = Rect(y0, data.draw(st.integers(y0 + 1, height)), x0, data.draw(st.integers(x0 + 1, width)))
            result = array.read_window(rect)
            assert result.dtype == np.float32 and result.flags.owndata and result.flags.writeable
            assert np.array_equal(result, expected[rect.y0 : rect.y1, rect.x0 : rect.x1])
        assert np.array_equal(zarr.open_array(Path(folder) / "a", mode="r")[...], expected)


@codecs
def test_chunks_are_read_whole_with_the_same_pixels(stage, codec):
    """The update pass reads chunks, the other passes windows: both must see the same image."""
    array = create(stage, codec)
    data = noise(array.shape)
    array.write_window(whole(array), data)
    out = np.full(array.chunk_shape, np.nan, np.float32)
    for cy, cx in array.chunk_indices():
        array.read_chunk(cy, cx, out)
        rows, columns = array.valid_part(cy, cx)
        assert np.array_equal(out[rows, columns], data[cy * 16 : cy * 16 + 16, cx * 16 : cx * 16 + 16])
        assert np.isfinite(out).all()  # the padding too: it goes through the optimiser's arithmetic


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("channels", [3, 400])  # 400: a row of the strip is larger than a page
def test_a_halo_strip_is_read_alone(stage, channels):
    """Reading whole chunk rows for halos was a third of all bytes that a run read."""
    array = create(stage, shape=(64, 64, channels), chunk_px=32)
    data = noise(array.shape)
    array.write_window(whole(array), data)
    for strip in (Rect(3, 50, 27, 32), Rect(3, 50, 32, 40), Rect(0, 64, 20, 44)):
        before = bytes_read()
        result = array.read_window(strip)
        assert bytes_read() - before < result.nbytes + 1000  # those of /proc itself
        assert np.array_equal(result, data[strip.y0 : strip.y1, strip.x0 : strip.x1])


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar


def test_valid_parts_tile_the_array():
    """Border padding that is counted into mean|u| ends a stage too early or too late."""
    with tempfile.TemporaryDirectory() as folder:
        array = create(Path(folder), shape=(33, 48, 3))
        assert array.chunk_indices() == [(cy, cx) for cy in range(3) for cx in range(3)]
        assert array.valid_part(0, 0) == (slice(0, 16), slice(0, 16))
        assert array.valid_part(2, 2) == (slice(0, 1), slice(0, 16))


@codecs
def test_chunks_may_be_written_from_many_threads(stage, codec):
    """Every task owns its chunks and there is no lock; a shared buffer anywhere would mix them."""
    array = create(stage, codec, shape=(128, 128, 3))
    data = noise(array.shape)

    def copy(index: tuple[int, int]) -> np.ndarray:
        cy, cx = index
        part = data[cy * 16 : cy * 16 + 16, cx * 16 : cx * 16 + 16]
        array.write_chunk(cy, cx, part)
        return array.read_window(Rect(cy * 16, cy * 16 + 16, cx * 16, cx * 16 + 16))

    with ThreadPoolExecutor(6) as pool:
        for (cy, cx), result in zip(array.chunk_indices(), pool.map(copy, array.chunk_indices()), strict=True):
            assert np.array_equal(result, data[cy * 16 : cy * 16 + 16, cx * 16 : cx * 16 + 16])
    assert np.array_equal(array.read_window(whole(array)), data)


def test_another_dtype_is_never_cast_in_silence(stage):
    """float64 written into a float32 array would lose digits that exactness is claimed for."""
    array = create(stage)
    with pytest.raises(AssertionError):
        array.write_chunk(0, 0, np.zeros((16, 16, 3)))


# --- what is on the disk ---


@codecs
def test_all_zero_chunks_stay_on_the_disk(stage, codec):
    """If chunks of zeros were not stored, a lost chunk would be a black square instead of an error."""
    array = create(stage, codec)
    assert all(array.chunk_path(cy, cx).is_file() for cy, cx in array.chunk_indices())
    array.write_window(whole(array), noise(array.shape))
    array.write_window(whole(array), np.zeros(array.shape, np.float32))
    assert all(array.chunk_path(cy, cx).is_file() for cy, cx in array.chunk_indices())
    assert not array.read_window(whole(array)).any()


def test_uncompressed_arrays_take_their_room_when_they_are_made(stage):
    """A full disk must be reported before the run, not during an iteration."""
    array = create(stage, shape=(70, 45, 3), chunk_px=32)
    sizes = [array.chunk_path(cy, cx).stat() for cy, cx in array.chunk_indices()]
    assert [size.st_size for size in sizes] == [32 * 32 * 3 * 4] * 6
    assert all(size.st_blocks * 512 >= size.st_size for size in sizes)


def test_rewriting_a_chunk_keeps_its_file(stage):
    """Uncompressed chunks are overwritten in place: a rename per chunk was measured 2 to 6 times slower."""
    array = create(stage)
    before = array.chunk_path(1, 1).stat().st_ino
    array.write_chunk(1, 1, noise((16, 16, 3)))
    assert array.chunk_path(1, 1).stat().st_ino == before
    assert not [path for path in stage.rglob("*") if "partial" in path.name or "tmp" in path.name]


def test_arrays_are_seen_anew_when_they_are_made_anew(stage):
    """A stage that is prepared again after a kill must not be read with the old shape."""
    create(stage, shape=(20, 20, 3))
    store.create_stage(stage)
    again = create(stage, shape=(40, 24, 3))
    assert again.shape == (40, 24, 3)


# --- damage ---


def reads(array, cy: int, cx: int):
    """All methods that read a chunk."""
    yield lambda: array.read_window(Rect(cy * 16, cy * 16 + 1, cx * 16, cx * 16 + 1))
    yield lambda: array.read_window(whole(array))
    yield lambda: array.read_chunk(cy, cx, np.empty(array.chunk_shape, array.dtype))


@codecs
def test_a_missing_chunk_is_damage_and_is_named(stage, codec):
    """Zarr would read it as zeros: a black square in the finished image."""
    array = create(stage, codec)
    array.write_window(whole(array), noise(array.shape))
    path = array.chunk_path(1, 2)
    path.unlink()
    for read in reads(array, 1, 2):
        with pytest.raises(DamagedStateError, match=f"{path}: is missing.*verify.*--repair"):
            read()
    assert array.read_window(Rect(0, 16, 0, 16)).any()  # the others are still there
    assert not path.exists()


def test_a_missing_chunk_is_not_written_either(stage):
    """Preallocated chunks do not vanish: recreating one would hide that the disk lost data."""
    array = create(stage)
    array.chunk_path(0, 0).unlink()
    with pytest.raises(DamagedStateError, match="is missing"):
        array.write_chunk(0, 0, noise((16, 16, 3)))


@codecs
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_chunk_is_damage_and_is_named(stage, codec, share):
    """A short read would leave old bytes in the window; a decoder may give half a chunk."""
    array = create(stage, codec)
    array.write_window(whole(array), noise(array.shape))
    path = array.chunk_path(2, 1)
    os.truncate(path, int(share * path.stat().st_size))
    for read in reads(array, 2, 1):
        with pytest.raises(DamagedStateError, match=str(path)):
            read()


def test_a_chunk_that_grew_is_damage(stage):
    """A file of another size was changed by something else."""
    array = create(stage)
    path = array.chunk_path(0, 1)
    with path.open("ab") as file:
        file.write(b"x")
    for read in reads(array, 0, 1):
        with pytest.raises(DamagedStateError, match=str(path)):
            read()


@codecs
def test_whatever_is_written_is_checked_when_it_is_read(stage, codec):
    """A flipped bit on the disk must be found before it reaches the image."""
    array = create(stage, codec)
    sums = array.packed(array.write_window(whole(array), noise(array.shape)))
    checked = store.open_array(stage, "a", sums)
    for read in reads(checked, 1, 1):
        read()
    other = create(stage, codec, name="b")
    other.write_window(whole(other), noise(other.shape, seed=1))
    array.chunk_path(1, 1).write_bytes(other.chunk_path(1, 1).read_bytes())  # whole, and of the right size
    _, window, chunk = reads(checked, 1, 1)
    for read in (window, chunk):
        with pytest.raises(store.ChunkError, match="is not what was written there") as result:
            read()
        assert result.value.path == array.chunk_path(1, 1) and result.value.kind == "changed"


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_single_flipped_bit_is_seen(tmp_path_factory, data):
    """The checksum covers every bit of a chunk, including the padding."""
    stage = tmp_path_factory.mktemp("flip") / "stage_0"
    store.create_stage(stage)
    array = create(stage)
    sums = array.packed(array.write_window(whole(array), noise(array.shape)))
    cy, cx = data.draw(st.sampled_from(array.chunk_indices()))
    content = bytearray(array.chunk_path(cy, cx).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    array.chunk_path(cy, cx).write_bytes(content)
    with pytest.raises(store.ChunkError):
        store.open_array(stage, "a", sums).read_window(whole(array))


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_garbage_in_a_compressed_chunk_is_damage(stage, codec):
    """A decoder's error must become a ChunkError that names the file."""
    array = create(stage, codec)
    path = array.chunk_path(0, 0)
    path.write_bytes(b"\x00\xff" * 100)
    for read in reads(array, 0, 0):
        with pytest.raises(DamagedStateError, match=str(path)):
            read()


@pytest.mark.parametrize("text", [None, "", "{", "{}", '{"zarr_format": 3}', "[]", "\x00\x01"])
def test_a_missing_or_broken_description_is_damage(stage, text):
    """The array's own zarr.json is part of the state."""
    create(stage)
    path = stage / "a" / "zarr.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DamagedStateError, match=f"{path}.*--repair"):
        store.open_array(stage, "a")


# --- Grams, stages, arrays ---


def test_style_targets_are_kept_to_the_last_bit(stage):
    """The loss after a resume must be the loss before it."""
    gram = noise((5, 5), "float64") / 3
    for layer, target in (("conv1_1", gram), ("conv2_1", np.zeros((5, 5)))):
        sums = metadata.write_gram(stage, layer, target)
        assert np.array_equal(metadata.read_gram(stage, layer, sums), target)
        assert np.array_equal(zarr.open_array(stage / f"gram_{layer}", mode="r")[...], target)


def test_a_large_style_target_is_one_file(stage):
    """VGG-19's are 512 × 512; cut into chunks, a missing one would read as zeros."""
    gram = noise((512, 512), "float64")
    sums = metadata.write_gram(stage, "conv5_1", gram)
    assert np.array_equal(metadata.read_gram(stage, "conv5_1", sums), gram)
    (path,) = (path for path in (stage / "gram_conv5_1" / "c").rglob("*") if path.is_file())
    assert path.stat().st_size == 512 * 512 * 8


@pytest.mark.parametrize("damage", ["missing", "no chunk", "short", "flipped"])
def test_a_damaged_style_target_is_named(stage, damage):
    """A target of zeros would silently remove the style from the image."""
    sums = metadata.write_gram(stage, "conv1_1", noise((5, 5), "float64"))
    path = stage / "gram_conv1_1"
    chunk = path / "c" / "0" / "0"
    if damage == "missing":
        store.delete_array(stage, "gram_conv1_1")
    elif damage == "no chunk":
        chunk.unlink()
    elif damage == "short":
        os.truncate(chunk, 40)
    else:
        chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    with pytest.raises(DamagedStateError, match=str(path)):
        metadata.read_gram(stage, "conv1_1", sums)


def test_a_prepared_stage_takes_its_name_at_once(stage):
    """An incomplete stage under its final name would be used as a complete one."""
    partial = stage.with_name("stage_0.partial")
    store.create_stage(partial)
    create(partial, name="canvas_0")
    create(stage, name="old")
    store.commit_stage(partial, stage)
    assert not partial.exists()
    assert [path.name for path in stage.iterdir() if path.is_dir()] == ["canvas_0"]


def test_preparing_again_starts_from_nothing(stage):
    """Arrays of a killed preparation must not be mixed with those of the next."""
    create(stage, name="leftover")
    store.create_stage(stage)
    assert [path.name for path in stage.iterdir() if path.is_dir()] == []


def test_a_finished_stage_keeps_only_what_is_asked_for(stage):
    """Seven canvases of a 30,000-px image are 75 GB; the next stage needs one."""
    for name in ("canvas_0", "canvas_1", "m_0"):
        create(stage, name=name)
    store.delete_arrays(stage, {"canvas_1"})
    assert [path.name for path in stage.iterdir() if path.is_dir()] == ["canvas_1"]
    assert zarr.open_group(stage, mode="r")["canvas_1"].shape == (70, 45, 3)


# --- a full disk ---


LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from pipeline import store
from pipeline.core.errors import SpaceError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
stage, codec = Path(sys.argv[1]), sys.argv[2]
store.create_array(stage, "small", (16, 16, 3), 16, "float32", codec)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
tries = [lambda: store.create_array(stage, "large", (64, 64, 3), 64, "float32", "none")]
if codec != "none":
    data = np.random.default_rng(0).uniform(0, 255, (16, 16, 3)).astype(np.float32)
    tries.append(lambda: store.open_array(stage, "small").write_chunk(0, 0, data))
for attempt in tries:
    try:
        attempt()
        print("written")
    except SpaceError as error:
        print("refused", error)
"""


@codecs
def test_a_disk_that_refuses_is_a_space_error(stage, codec):
    """The system refuses to write, here with EFBIG."""
    out = subprocess.run(
        [sys.executable, "-c", LIMITED, str(stage), codec], capture_output=True, text=True, timeout=120, check=False
    )
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert lines and all(line.startswith("refused") for line in lines), lines


# --- OME-Zarr ---


def pyramid(path: Path, pixels: np.ndarray, chunk_px: int) -> list[np.ndarray]:
    """Export `pixels` and read every level back with zarr alone."""
    requested = []

    def read_rows(y0: int, y1: int) -> np.ndarray:
        requested.append((y0, y1))
        return pixels[y0:y1]

    height, width, _ = pixels.shape
    kind = PixelKind(pixels.dtype.itemsize * 8, pixels.shape[2] == 4)
    ome_zarr.write_ome_zarr(path, (height, width), kind, read_rows, chunk_px)
    assert requested == [(y, min(y + chunk_px, height)) for y in range(0, height, chunk_px)]  # one band at a time, once
    group = zarr.open_group(path, mode="r")
    datasets = group.attrs["ome"]["multiscales"][0]["datasets"]
    return [np.asarray(group[entry["path"]][...]) for entry in datasets]


def halved(level: np.ndarray) -> np.ndarray:
    """Means of 2×2 squares, rounded half up; a last odd row or column is dropped, a lone one is kept."""
    _, height, width = level.shape
    rows, columns = max(1, height // 2), max(1, width // 2)
    out = np.zeros((3, rows, columns), level.dtype)
    for y in range(rows):
        for x in range(columns):
            ys, xs = {2 * y, min(2 * y + 1, height - 1)}, {2 * x, min(2 * x + 1, width - 1)}
            square = [[level[:, yy, xx].astype(float) for yy in ys] for xx in xs]
            out[:, y, x] = np.floor(np.mean(square, axis=(0, 1)) + 0.5)
    return out


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("size", [(64, 64), (61, 47), (33, 100), (1, 70), (70, 1), (5, 7), (16, 16)])
def test_every_level_of_an_ome_zarr_is_the_mean_of_the_one_before(tmp_path, dtype, size):
    """Viewers show the small levels: a shifted or dark one would look like an error of the image."""
    pixels = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (*size, 3), dtype=dtype, endpoint=True)
    levels = pyramid(tmp_path / "p.zarr", pixels, 16)
    assert np.array_equal(levels[0], np.moveaxis(pixels, 2, 0))
    for fine, coarse in itertools.pairwise(levels):
        assert coarse.dtype == dtype
        assert np.array_equal(coarse, halved(fine))
    assert max(levels[-1].shape[1:]) <= 16
    assert all(max(level.shape[1:]) > 16 for level in levels[:-1])


def test_ome_metadata_is_that_of_version_0_5(tmp_path):
    """napari, Fiji and the rest open it by these attributes alone."""
    pyramid(tmp_path / "harbour.zarr", np.zeros((40, 70, 3), np.uint8), 16)
    document = json.loads((tmp_path / "harbour.zarr" / "zarr.json").read_text())
    assert document["zarr_format"] == 3 and document["node_type"] == "group"
    ome = document["attributes"]["ome"]
    assert ome["version"] == "0.5"
    (multiscale,) = ome["multiscales"]
    assert multiscale["name"] == "harbour"
    assert [axis["name"] for axis in multiscale["axes"]] == ["c", "y", "x"]
    assert [axis["type"] for axis in multiscale["axes"]] == ["channel", "space", "space"]
    assert [entry["path"] for entry in multiscale["datasets"]] == ["0", "1", "2", "3"]
    for index, entry in enumerate(multiscale["datasets"]):
        scale, *translation = entry["coordinateTransformations"]
        assert scale == {"type": "scale", "scale": [1.0, 2.0**index, 2.0**index]}
        between = (2.0**index - 1) / 2  # the centre of the pixels whose mean the first pixel is
        moved = [{"type": "translation", "translation": [0.0, between, between]}] if index else []
        assert translation == moved
        array = zarr.open_array(tmp_path / "harbour.zarr" / entry["path"], mode="r")
        assert array.metadata.dimension_names == ("c", "y", "x")
        assert array.shape == (3, max(1, 40 >> index), max(1, 70 >> index))


def test_ome_channels_have_the_colours_of_the_picture(tmp_path):
    """Without colours viewers show three grey images, and a 16-bit one nearly black."""
    pyramid(tmp_path / "p.zarr", np.zeros((8, 8, 4), np.uint16), 16)
    omero = json.loads((tmp_path / "p.zarr" / "zarr.json").read_text())["attributes"]["ome"]["omero"]
    assert [channel["color"] for channel in omero["channels"]] == ["FF0000", "00FF00", "0000FF", "FFFFFF"]
    assert [channel["active"] for channel in omero["channels"]] == [True, True, True, False]
    assert all(channel["window"] == {"min": 0, "max": 65535, "start": 0, "end": 65535} for channel in omero["channels"])


def test_levels_of_a_strip_of_one_row_lie_where_their_pixels_are(tmp_path):
    """A side of one pixel is not halved: a scale of 2 would stretch the strip."""
    pyramid(tmp_path / "p.zarr", np.zeros((1, 40, 3), np.uint8), 16)
    (multiscale,) = json.loads((tmp_path / "p.zarr" / "zarr.json").read_text())["attributes"]["ome"]["multiscales"]
    transforms = multiscale["datasets"][2]["coordinateTransformations"]
    assert [list(transform.values())[1] for transform in transforms] == [[1.0, 1.0, 4.0], [0.0, 0.0, 1.5]]


def test_an_ome_zarr_replaces_an_older_one_whole(tmp_path):
    """Levels of a previous export must not remain."""
    pyramid(tmp_path / "p.zarr", np.full((70, 70, 3), 9, np.uint8), 16)
    levels = pyramid(tmp_path / "p.zarr", np.full((10, 10, 3), 7, np.uint8), 16)
    assert len(levels) == 1 and (levels[0] == 7).all()
    assert sorted(path.name for path in (tmp_path / "p.zarr").iterdir()) == ["0", "zarr.json"]


def test_an_ome_zarr_that_fails_is_left_alone(tmp_path):
    """Otherwise zarr would continue writing chunks of the temporary folder while it is being deleted."""
    path, width = tmp_path / "p.zarr", 16 * 40

    def read_rows(y0: int, y1: int) -> np.ndarray:
        if y0 == 16:
            (path / "0" / "c" / "0" / "1" / "0" / "in the way").mkdir(parents=True)
        return np.full((y1 - y0, width, 3), 7, np.uint8)

    with pytest.raises(IsADirectoryError):
        ome_zarr.write_ome_zarr(path, (48, width), PixelKind(8, alpha=False), read_rows, 16)
    time.sleep(0.5)
    written = [file for file in (path / "0" / "c" / "0").rglob("*") if file.is_file()]
    assert {file.parent.name for file in written} == {"0"} and len(written) == 40
