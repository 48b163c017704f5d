"""Reads weights files (.safetensors and .pth), and refuses those that a stranger made to harm.

safetensors' own reader checks a .safetensors file: its header describes plain numbers, and must match the file's size.
A .pth file is a pickle, in a zip archive since torch 1.6. torch reads it with `weights_only`, which runs nothing in it.
"""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipeline.core.errors import InputError
from pipeline.core.text import bytes_text, shown
from pipeline.core.vgg_layers import CONV_NAMES, LAYER_BY_NAME

if TYPE_CHECKING:
    from torch import Tensor

# The pickle of a .pth file without its numbers, and the directory of a zip archive; VGG-19's pickle has 10 KB.
MAX_PICKLE_BYTES = 2**20
# What a state dict of plain tensors names in a pickle: storages and dtypes are in torch and torch.storage.
_PLAIN_TENSORS = re.compile(
    r"collections OrderedDict|torch(\.storage)? \w+|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor(_v2|_v3)?|parameter(_with_state)?)"
)
# An old .pth file is a sequence of pickles: magic number, protocol, system, the state dict, and the storages' names.
_OLD_FORMAT_PICKLES = 5


def check_file(path: Path, max_bytes: int) -> None:
    """Raise InputError if a weights file is missing, is no regular file, or is larger than `max_bytes`."""
    if not path.is_file():
        raise InputError(f"weights file {path}: not found, or not a file. Correct its path.")
    if (size := path.stat().st_size) > max_bytes:
        raise InputError(
            f"weights file {path}: has {size:,} bytes, more than limits.max_weights_bytes ({bytes_text(max_bytes)}). "
            "Use other weights, or raise that limit if you trust these."
        )


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a .safetensors file, from its header. Raises InputError if it is not one."""
    from safetensors import safe_open  # noqa: PLC0415 - most commands read no weights

    try:
        with safe_open(path, framework="np") as file:  # numpy's view of it loads no torch
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:
        raise InputError(f"weights file {path}: not a readable .safetensors file ({_reason(error)}).") from error


class _BoundedFile(io.FileIO):
    """A file that raises ValueError after MAX_PICKLE_BYTES were read from it."""

    _left = MAX_PICKLE_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """As FileIO.read, but never more than the bound, whatever size a file claims."""
        limit = self._left + 1
        data = super().read(limit if size is None or size < 0 else min(size, limit)) or b""
        self._left -= len(data)
        if self._left < 0:
            raise ValueError("it holds far more than weights")
        return data


def _check_pickles(path: Path, zipped: bool) -> None:
    """Raise ValueError for a .pth file from which torch would fill far more memory than the file has bytes.

    torch's reader runs nothing, but by itself (measured) it inflates a zip of 1 MiB to 2 GiB, makes 64 bytes of each
    "]" in a pickle, and fills a bytearray of any size that 31 bytes ask for. So archives must be stored uncompressed,
    as torch writes them, and pickles be short and name nothing but tensors.
    """
    with _BoundedFile(path) as file:
        if not zipped:
            for _ in range(_OLD_FORMAT_PICKLES):
                _check_pickle(file)
            return
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise ValueError("it is compressed, which torch never does")
                if entry.filename.lower().endswith("data.pkl"):  # torch ignores the case of names
                    with archive.open(entry) as pickle:
                        _check_pickle(pickle)


def _check_pickle(file: IO[bytes]) -> None:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL" and not _PLAIN_TENSORS.fullmatch(str(argument)):
            raise ValueError(f"it holds {argument}, which is no part of a tensor")


def conv_key(name: str, names: set[str]) -> str | None:
    """The key of convolution `name` in a state dict with the keys `names`, without .weight: ours or torchvision's."""
    for stem in (name, f"features.{LAYER_BY_NAME[name].torchvision_index}"):
        if f"{stem}.weight" in names and f"{stem}.bias" in names:
            return stem
    return None


def check_shapes(shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, int]:
    """Check that tensors of these shapes make up a VGG-19 topology; returns each convolution's output channels.

    Raises InputError if they do not.
    """
    widths: dict[str, int] = {}
    channels = 3
    for name in CONV_NAMES:
        key = conv_key(name, set(shapes))
        if key is None:
            if widths:
                break  # a network that was cut off after some layer still serves the layers it has
            raise InputError(
                f"weights file {path}: has no {name}.weight or features.0.weight, so it is not a VGG-19-shaped "
                f"network (first keys: {shown(', '.join(list(shapes)[:3])) or 'none'}). Name torchvision's VGG-19, or "
                "one with its layer names, in network.weights."
            )
        weight, bias = shapes[f"{key}.weight"], shapes[f"{key}.bias"]
        if len(weight) != 4 or weight[1:] != (channels, 3, 3) or bias != weight[:1]:
            raise InputError(
                f"weights file {path}: {key}.weight is {weight} with bias {bias}, but {name} needs "
                f"(channels, {channels}, 3, 3) with as many biases: these are another network's weights."
            )
        widths[name] = channels = weight[0]
    first = shapes.get("input.weight"), shapes.get("input.bias")
    if first not in ((None, None), ((3, 3, 1, 1), (3,))):
        raise InputError(
            f"weights file {path}: input.weight is {first[0]} with bias {first[1]}, but an input convolution is "
            "(3, 3, 1, 1) with 3 biases: these are another network's weights."
        )
    return widths


def load_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, by name.

    Raises InputError if the file cannot be read, holds anything but tensors, is not of a VGG-19-shaped network, or has
    weights that are not finite.
    """
    state = load_tensors(path)
    for name in check_shapes({key: tuple(value.shape) for key, value in state.items()}, path):
        key = conv_key(name, set(state))
        for part in ("weight", "bias"):
            if not state[f"{key}.{part}"].isfinite().all():
                raise InputError(f"weights file {path}: {key}.{part} is not finite: it is damaged. Use an intact copy.")
    return state


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file of any network.

    Raises InputError if the file cannot be read, or holds anything but tensors.
    """
    from safetensors.torch import load_file  # noqa: PLC0415 - loads torch, which the shapes of a file do not need

    try:
        state = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except FileNotFoundError as error:
        raise InputError(f"weights file {path}: not found. Correct its path.") from error
    except Exception as error:  # damaged bytes make the unpickler raise nearly everything, AssertionError included
        raise InputError(f"weights file {path}: cannot be read as weights ({_reason(error)}).") from error
    if not isinstance(state, dict) or not all(_is_plain(key, value) for key, value in state.items()):
        raise InputError(
            f"weights file {path}: not a state dict of tensors. Save model.state_dict(), not the model or a checkpoint."
        )
    # A pickle can describe a tensor whose stride is 0: a few bytes that claim to be terabytes.
    if sum(value.nbytes for value in state.values()) > path.stat().st_size:
        raise InputError(f"weights file {path}: describes more weights than it has bytes. Use an intact copy.")
    return state


def _load_pickle(path: Path) -> Any:
    """The content of a .pth file. Nothing in it is run, whatever TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD says."""
    import torch  # noqa: PLC0415 - as above

    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\3\4"  # torch decides by these bytes too
    _check_pickles(path, zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of other pickle protocols, which the user cannot change
        # Only an archive can be memory-mapped: VGG-19's classifier, most of its 0.5 GB, is then never read. But
        # torchvision's own file, of 2017, is in the old format.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _is_plain(key: object, value: object) -> bool:
    """Whether this is a name and a dense tensor in host memory: a pickle can also hold sparse or meta tensors."""
    import torch  # noqa: PLC0415 - as above

    return (
        isinstance(key, str)
        and isinstance(value, torch.Tensor)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and not value.is_quantized
    )


def _reason(error: Exception) -> str:
    return shown(next(iter(str(error).splitlines()), type(error).__name__), 200)
