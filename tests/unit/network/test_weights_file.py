"""Weights files from strangers: they run nothing, and take no more memory than the size limit allows."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.core.errors import InputError
from pipeline.network.weights import find_weights, widths_for_plan
from pipeline.network.weights_file import MAX_PICKLE_BYTES, load_state, safetensors_shapes
from tests.support.e2e import write_config, write_run
from tests.support.reference import narrow_state

ROOT = Path(__file__).parents[3]


# --- no code is run ---


def loads_of(path: Path) -> list[ast.Call]:
    """Every call of torch.load, under whatever name it was imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization")
        for alias in node.names
        if alias.name == "load"
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        call
        for call in calls
        if ast.unparse(call.func) in {"torch.load", "torch.serialization.load", "torch.jit.load", *bare}
        or ast.unparse(call.func).endswith("load_state_dict_from_url")
    ]


def test_every_load_says_weights_only():
    """Without this argument, or with an environment variable of torch's, a weights file can run code."""
    files = [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("tests/**/*.py")]
    loads = [(path, load) for path in files for load in loads_of(path)]
    assert any(path.name == "weights_file.py" for path, _ in loads)
    for path, load in loads:
        values = [keyword.value for keyword in load.keywords if keyword.arg == "weights_only"]
        assert [isinstance(value, ast.Constant) and value.value for value in values] == [True], f"{path}:{load.lineno}"


class Harmful:
    """Unpickling it makes a folder, if code in a pickle is run."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def as_pickle(state: dict[str, Any], path: Path) -> None:
    path.write_bytes(pickle.dumps(state, protocol=2))


def as_old_file(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def as_new_file(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path)


def as_safetensors_by_name(state: dict[str, Any], path: Path) -> None:
    as_new_file(state, path.with_suffix(".pt"))
    path.with_suffix(".pt").replace(path.with_suffix(".safetensors"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("forced", ["", "1"])
@pytest.mark.parametrize("save", [as_pickle, as_old_file, as_new_file, as_safetensors_by_name])
@pytest.mark.parametrize("command", ["run", "plan"])
def test_code_in_weights_is_not_run(tmp_path, call, monkeypatch, save, forced, command):
    """Whatever the file is called, however it was saved, and whatever an environment variable of torch's allows."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    write_run(tmp_path)
    save({**narrow_state(), "conv1_1.weight": Harmful(tmp_path / "proof")}, tmp_path / "w.pth")
    name = "w.pth" if (tmp_path / "w.pth").exists() else "w.safetensors"
    outcome = call(command, "-c", write_config(tmp_path, network={"name": "vgg19", "weights": name}))
    assert outcome.code == 3, outcome
    assert outcome.err.startswith("pipeline: error: ") and outcome.err.count("\n") == 1, outcome.err
    assert not (tmp_path / "proof").exists()


# --- sizes and headers ---


def refused(path: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        find_weights("vgg19", path, 0)
        load_state(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, narrow_weights, value):
    """The style image would be blamed, or the learning rate of a training."""
    state = load_file(narrow_weights)
    state["conv2_1.bias"][3] = value
    for name in ("w.safetensors", "w.pth"):
        (save_file if name.endswith("s") else torch.save)(state, tmp_path / name)
        refused(tmp_path / name, "conv2_1.bias is not finite")


def test_large_files_are_refused_by_their_size(tmp_path, narrow_weights, call):
    """A sparse file of a terabyte costs its sender nothing, and the user a day of hashing."""
    size = narrow_weights.stat().st_size
    assert widths_for_plan("vgg19", narrow_weights, size)
    with pytest.raises(InputError, match=r"limits\.max_weights_bytes"):
        widths_for_plan("vgg19", narrow_weights, size - 1)
    write_run(tmp_path)
    (tmp_path / "w.pth").touch()
    os.truncate(tmp_path / "w.pth", 2**31 + 1)
    outcome = call("run", "-c", write_config(tmp_path, network={"name": "vgg19", "weights": "w.pth"}))
    assert (outcome.code, "limits.max_weights_bytes (2GiB)" in outcome.err) == (3, True), outcome


def test_a_pipe_is_not_a_weights_file(tmp_path, call):
    """Opening a pipe would wait for ever for a writer."""
    write_run(tmp_path)
    for name in ("w.pth", "w.safetensors"):
        os.mkfifo(tmp_path / name)
        for command in ("plan", "run"):
            outcome = call(command, "-c", write_config(tmp_path, network={"name": "vgg19", "weights": name}))
            assert (outcome.code, "not a file" in outcome.err) == (3, True), outcome


Header = dict[str, Any]


def first(header: Header) -> Header:
    return header["conv1_1.weight"]  # type: ignore[no-any-return]


HEADERS: dict[str, Callable[[Header], object]] = {
    "shape of another size": lambda header: first(header).update(shape=[4, 3, 3, 30]),
    "shape of a giant": lambda header: first(header).update(shape=[10**9, 3, 3, 3]),
    "shape with a fraction": lambda header: first(header).update(shape=[4.0, 3, 3, 3]),
    "shape with a word": lambda header: first(header).update(shape=["4", 3, 3, 3]),
    "shape with a truth": lambda header: first(header).update(shape=[True, 3, 3, 3]),
    "shape with not a number": lambda header: first(header).update(shape=[math.nan, 3, 3, 3]),
    "negative shape": lambda header: first(header).update(shape=[-4, 3, -3, 3]),
    "shape is a number": lambda header: first(header).update(shape=4),
    "no shape": lambda header: first(header).pop("shape"),
    "unknown dtype": lambda header: first(header).update(dtype="F4096"),
    "dtype is a list": lambda header: first(header).update(dtype=["F32"]),
    "offsets beyond the end": lambda header: first(header).update(data_offsets=[10**15, 10**15 + 432]),
    "offsets backwards": lambda header: first(header).update(data_offsets=[432, 0]),
    "offsets before the start": lambda header: first(header).update(data_offsets=[-432, 0]),
    "one offset": lambda header: first(header).update(data_offsets=[432]),
    "offsets are words": lambda header: first(header).update(data_offsets="ab"),
    "tensor is a list": lambda header: header.update({"conv1_1.weight": [1, 2]}),
    "tensor is nothing": lambda header: header.update({"conv1_1.weight": None}),
}


def write_safetensors(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_contradict_their_file(tmp_path, narrow_weights, case):
    """The plan computes with these numbers: a huge shape would count, a word would end in a traceback."""
    raw = narrow_weights.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    write_safetensors(tmp_path / "same.safetensors", json.dumps(header).encode(), raw[8 + length :])
    assert safetensors_shapes(tmp_path / "same.safetensors") == safetensors_shapes(narrow_weights)
    HEADERS[case](header)
    path = tmp_path / "w.safetensors"
    write_safetensors(path, json.dumps(header).encode(), raw[8 + length :])
    refused(path, "not a readable .safetensors file")


def test_headers_that_are_bombs(tmp_path):
    """Deep nesting, numbers with thousands of digits, and headers that claim more bytes than there are."""
    path = tmp_path / "w.safetensors"
    for header in (b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"9" * 10_000 + b"}", b"[]", b"3", b"", b"\xff"):
        write_safetensors(path, header)
        refused(path, "not a readable .safetensors file")
    for length in (2**20 + 1, 2**40, 2**64 - 1):
        write_safetensors(path, b"{}" * 2**10, length=length)
        refused(path, "not a readable .safetensors file")
    keys = {
        f"{'k' * 10_000}\x1b[2J\n{index}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(9)
    }
    write_safetensors(path, json.dumps(keys).encode())
    refused(path, "not a VGG-19-shaped")


def zip_of(path: Path, change: Callable[[zipfile.ZipInfo, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    buffer = io.BytesIO()
    torch.save(narrow_state(), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", method) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info, old.read(info)))


def test_zip_files_that_are_bombs(tmp_path):
    """A few KB that inflate to gigabytes, which torch's reader alone does (measured: 1 MiB to 2 GiB)."""
    path = tmp_path / "w.pth"
    zip_of(path, lambda _info, data: data)
    find_weights("vgg19", path, 0)  # repacking alone is allowed
    zip_of(path, lambda _info, data: data, zipfile.ZIP_DEFLATED)
    refused(path, "compressed")
    for name in ("data.pkl", "DATA.PKL"):  # torch ignores the case of names
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(f"w/{name}", b"\x80\2" + b"]" * MAX_PICKLE_BYTES + b".")
        refused(path, "more than weights")
    with zipfile.ZipFile(path, "w") as file:
        for index in range(MAX_PICKLE_BYTES // 50):
            file.writestr(f"a/data/{index}", b"")
    refused(path, "more than weights")


def test_zip_directories_that_claim_too_much(tmp_path):
    """A directory of a terabyte would be read into memory before any of it is looked at."""
    path = tmp_path / "w.pth"
    path.write_bytes(b"PK\3\4" + b"\0" * 1000)
    refused(path, "cannot be read as weights")
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, 2**31, 0, 0)
    path.write_bytes(b"PK\3\4" + b"\0" * 1000 + end)
    refused(path, "cannot be read as weights")
    large = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2**40, 2**40, 2**40, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 4, 1)
    path.write_bytes(b"PK\3\4" + large + locator + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, 9, 0, 0))
    refused(path, "cannot be read as weights")


@pytest.mark.e2e
def test_pickles_that_are_bombs(tmp_path):
    """A list for every byte of the file: 64 times its size in memory, and hours of unpickling in Python."""
    path = tmp_path / "w.pth"
    for opcodes in (b"]" * 2**21, b"]q\0" * 2**20, b"(" * 2**21, b"X\0\0\0\x01" + b"a" * 2**24, b"c" + b"a" * 2**24):
        path.write_bytes(b"\x80\2" + opcodes + b".")
        refused(path, "more than weights")


FILLED = b"\x80\2cbuiltins\nbytearray\n\x8a\x04\x00\x00\x00\x20\x85R."  # bytearray(2**29)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_few_bytes_that_ask_for_memory_are_refused(tmp_path, zipped):
    """torch's safe unpickler fills a bytearray of any size: 31 bytes took a GiB."""
    path = tmp_path / "w.pth"
    path.write_bytes(FILLED)
    if zipped:
        path.unlink()
        zip_of(path, lambda info, data: FILLED if info.filename.endswith("data.pkl") else data)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, "bytearray")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 2**18


STATES: dict[str, Callable[[torch.Tensor], Any]] = {
    "numbers without memory": lambda weight: weight.to("meta"),
    "one number as many": lambda weight: torch.zeros(1).expand(4_000_000, 3, 3, 3),
    "sparse": lambda weight: weight.to_sparse(),
    "a number": lambda weight: 3,
    "a list": lambda weight: [weight],
    "quantised": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("save", [as_old_file, as_new_file])
@pytest.mark.parametrize("case", STATES)
def test_tensors_without_plain_numbers(tmp_path, case, save):
    """torch reads these too; used as weights they would end in a traceback, or take all memory."""
    path = tmp_path / "w.pth"
    state = narrow_state()
    state["conv1_1.weight"] = STATES[case](state["conv1_1.weight"])
    save(state, path)
    refused(path)


def test_keys_that_are_not_text(tmp_path):
    """The keys of a dictionary may have any type."""
    torch.save({**narrow_state(), 3: torch.zeros(1)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "not a state dict")


def test_files_of_every_age_are_read(tmp_path):
    """torchvision's own file, of 2017, is in the old format: the checks must accept it."""
    state = OrderedDict(narrow_state())
    for save in (as_old_file, as_new_file):
        save(state, tmp_path / "w.pth")
        loaded = load_state(tmp_path / "w.pth")
        assert all(torch.equal(loaded[key], state[key]) for key in state)
    save_file(dict(state), tmp_path / "w.safetensors")
    assert load_state(tmp_path / "w.safetensors").keys() == state.keys()
