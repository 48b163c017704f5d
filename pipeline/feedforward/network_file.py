"""Reads and writes the files of image transformation networks: .safetensors of ours, and .pth of pytorch/examples.

Ours holds the module's state dict; its metadata hold the spec as JSON under SPEC_KEY, and notes of whoever trained it.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipeline.core.errors import InputError, storage
from pipeline.core.files import write_whole
from pipeline.core.text import shown
from pipeline.feedforward.spec import TransformSpec
from pipeline.network.weights_file import check_file, load_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.feedforward.network import TransformNetwork

SPEC_KEY = "pipeline.feedforward"
# A network of eight times the paper's width has 430 MB.
MAX_FILE_BYTES = 2**30
_REMEDY = "Name a network of `pipeline train`, or a state dict of pytorch/examples' fast_neural_style"


@dataclass(frozen=True)
class TransformFile:
    """A network's spec, its weights under the names of TransformNetwork, and the notes in its metadata."""

    spec: TransformSpec
    state: Mapping[str, Tensor]
    notes: Mapping[str, str] = field(default_factory=dict)

    def network(self) -> TransformNetwork:
        """The torch module with these weights, in evaluation mode, float32."""
        from pipeline.feedforward.network import TransformNetwork  # noqa: PLC0415 - loads torch

        network = TransformNetwork(self.spec)
        network.load_state_dict(dict(self.state))
        return network.eval()


@dataclass(frozen=True)
class NetworkHeader:
    """What is known of a network's file without its weights."""

    path: Path
    spec: TransformSpec
    size_bytes: int


def read_network_header(path: Path, max_bytes: int = MAX_FILE_BYTES) -> NetworkHeader:
    """The spec of a network's file; of ours without loading torch. Raises as load_network."""
    check_file(path, max_bytes)
    notes = _metadata(path)
    spec = _own_spec(path, notes) if SPEC_KEY in notes else load_network(path).spec
    return NetworkHeader(path, spec, path.stat().st_size)


def save_network(path: Path, network: TransformNetwork, notes: Mapping[str, str]) -> None:
    """Write a network's file, atomically; safetensors writes the notes in any order. Raises StorageError."""
    from safetensors.torch import save  # noqa: PLC0415 - loads torch

    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    metadata = {**notes, SPEC_KEY: network.spec.model_dump_json()}
    with storage(path):
        write_whole(path, _in_order(save(state, metadata)))


def _in_order(data: bytes) -> bytes:
    """The same file with its metadata in the order of their keys: safetensors writes them in a random one."""
    (length,) = struct.unpack_from("<Q", data)
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def load_network(path: Path) -> TransformFile:
    """A network's file. Raises InputError if it is missing, damaged, or another kind of network's."""
    check_file(path, MAX_FILE_BYTES)
    notes = _metadata(path)
    if path.suffix == ".safetensors" and SPEC_KEY not in notes:
        raise InputError(f"network file {path}: its metadata describe no image transformation network. {_REMEDY}.")
    state = load_tensors(path)
    if SPEC_KEY not in notes:
        return TransformFile(*_of_examples(path, state))
    spec = _own_spec(path, notes)
    _check_shapes(path, spec, state)
    return TransformFile(spec, state, {key: value for key, value in notes.items() if key != SPEC_KEY})


def _own_spec(path: Path, notes: Mapping[str, str]) -> TransformSpec:
    try:
        return TransformSpec.model_validate_json(notes[SPEC_KEY])
    except ValidationError as error:
        cause = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(
            f"network file {path}: its description is not of this version of pipeline ({shown(cause, 300)}). Use an "
            "intact copy, or the version that wrote it."
        ) from error


def _metadata(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open  # noqa: PLC0415 - most commands read no weights

    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # whatever damaged bytes raise
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"network file {path}: not a readable .safetensors file ({shown(cause, 200)}).") from error


def _check_shapes(path: Path, spec: TransformSpec, state: Mapping[str, Tensor]) -> None:
    """Raise InputError unless these are all weights of `spec`, finite."""
    import torch  # noqa: PLC0415 - most commands read no weights

    from pipeline.feedforward.network import TransformNetwork  # noqa: PLC0415 - loads torch

    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in TransformNetwork(spec).state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    for key in [*expected, *found]:
        if expected.get(key) != found.get(key):
            raise InputError(
                f"network file {path}: {shown(key)} is {found.get(key, 'missing')}, where its description says "
                f"{expected.get(key, 'nothing')}. Use an intact copy."
            )
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise InputError(f"network file {path}: {shown(key)} is not finite: training diverged, or it is damaged.")


# --- pytorch/examples ------------------------------------------------------------------------------------------------

_EXAMPLES_NAMES = {"conv1": "first", "conv2": "down1", "conv3": "down2", "deconv3": "last"}
_EXAMPLES_NAMES |= {"deconv1": "up1", "deconv2": "up2"}
_EXAMPLES_NORMS = {"1": "first", "2": "down1", "3": "down2", "4": "up1", "5": "up2"}
_CONV = re.compile(r"(?:res(?P<block>\d+)\.)?(?P<name>(?:de)?conv\d)(?:\.conv2d)?\.(?P<what>weight|bias)")
_NORM = re.compile(
    r"(?:res(?P<block>\d+)\.)?(?P<kind>in|bn)(?P<name>\d)"
    r"\.(?P<what>weight|bias|running_mean|running_var|num_batches_tracked)"
)


def _of_examples(path: Path, state: Mapping[str, Tensor]) -> tuple[TransformSpec, dict[str, Tensor]]:
    """Spec and weights of a state dict with the names of pytorch/examples' fast_neural_style."""
    import torch  # noqa: PLC0415 - loaded already

    ours: dict[str, Tensor] = {}
    kinds: set[str] = set()
    fractional = False
    for key, value in state.items():
        name = key.removeprefix("module.")  # of DataParallel
        if match := _CONV.fullmatch(name):
            block, conv, what = match["block"], match["name"], match["what"]
            module = f"block{block}.{conv}" if block else _EXAMPLES_NAMES.get(conv, conv)
            if module.startswith("up") and ".conv2d." not in name and what == "weight" and value.ndim == 4:
                # a transposed convolution is one with flipped kernel over positions that zeros follow
                value, fractional = value.flip(2, 3).transpose(0, 1).contiguous(), True  # noqa: PLW2901
            ours[f"layers.{module}.conv.{what}"] = value.float()
        elif match := _NORM.fullmatch(name):
            kinds.add(match["kind"])
            block, number, what = match["block"], match["name"], match["what"]
            module = f"block{block}.conv{number}" if block else _EXAMPLES_NORMS.get(number, number)
            if match["kind"] == "in" and what not in ("weight", "bias"):
                continue  # files of torch 0.3 hold statistics, which an instance norm does not use
            is_table = match["kind"] == "in"
            ours[f"layers.{module}.norm.{what}"] = value.float()[None] if is_table else value
        else:
            raise InputError(
                f"network file {path}: {shown(key)} is no part of an image transformation network. {_REMEDY}."
            )
    spec = _spec_of(path, ours, kinds, fractional)
    for conv in spec.convs() if spec.norm == "batch" else ():
        if conv.has_norm:  # files of torch before 0.4.1 do not count batches
            ours.setdefault(f"layers.{conv.name}.norm.num_batches_tracked", torch.tensor(0))
    _check_shapes(path, spec, ours)
    return spec, ours


def _spec_of(path: Path, state: Mapping[str, Tensor], kinds: set[str], fractional: bool) -> TransformSpec:
    first = state.get("layers.first.conv.weight")
    if first is None or first.ndim != 4 or len(kinds) > 1:
        what = "norms of two kinds" if len(kinds) > 1 else "no 9×9 first convolution"
        raise InputError(f"network file {path}: has {what}. {_REMEDY}.")
    blocks = {key.split(".")[1] for key in state if key.startswith("layers.block")}
    try:
        return TransformSpec(
            width=first.shape[0] / 32,
            blocks=len(blocks),
            norm={"in": "instance", "bn": "batch"}[next(iter(kinds))] if kinds else "none",
            upsampling="fractional" if fractional else "nearest",
            output="linear",
            pixels="bytes",
            styles=(shown(path.stem, 100),),
        )
    except ValidationError as error:
        raise InputError(
            f"network file {path}: {first.shape[0]} first channels and {len(blocks)} blocks: too many. {_REMEDY}."
        ) from error
