"""Weights files, and what one from a stranger may claim: looked at before anything of it is believed or loaded.

A .safetensors file is a JSON header and plain numbers. A .pth file is a pickle: torch reads it with `weights_only`, so
that nothing in it is run; but a pickle, or the zip file around it, can still be a bomb.
"""

from __future__ import annotations

import io
import json
import math
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import InputError, StorageError, storage
from pipeline.core.text import bytes_text, shown
from pipeline.core.vgg_layers import CONV_NAMES, LAYER_BY_NAME

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 2**20  # of JSON; VGG-19's has 5 KB
MAX_PICKLE_BYTES = 2**23  # without the numbers, which are not in it; VGG-19's has 10 KB
MAX_ZIP_ENTRIES = 10_000
# One read is one step of the pickle machine, and may make an object.
MAX_PICKLE_READS = 2**20
# Bytes per number, by the format's names.
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


def check_file(path: Path, max_bytes: int) -> None:
    """Raise InputError where a weights file is missing, no file, or larger than `max_bytes`."""
    if not path.is_file():
        raise InputError(f"weights file {path}: not found, or no file. Correct network.weights.")
    if (size := path.stat().st_size) > max_bytes:
        raise InputError(
            f"weights file {path}: has {size:,} bytes, beyond limits.max_weights_bytes ({bytes_text(max_bytes)}). Give "
            "other weights, or raise that limit if you trust these."
        )


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a .safetensors file, from its header. Raises InputError if it is none."""
    try:
        size = path.stat().st_size
        with storage(path), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"its header claims {length:,} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {key: _shape(entry, size - 8 - length) for key, entry in header.items()}
    except StorageError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        text = shown(f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error), 200)
        raise InputError(f"weights file {path}: not a readable .safetensors file ({text}).") from error


def _shape(entry: Mapping[str, Any], data_bytes: int) -> tuple[int, ...]:
    """The shape of one tensor of a header, whose numbers are as many, and where, as it says."""
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError("a shape or an offset is no whole number")
    if not start <= end <= data_bytes:
        raise ValueError(f"it has {data_bytes} of {end} bytes of weights")
    if math.prod(shape) * _ITEM_BYTES[entry["dtype"]] != end - start:
        raise ValueError(f"a tensor of shape {shape} has {end - start} bytes")
    return shape


def is_zip(path: Path) -> bool:
    """Whether torch takes a .pth file for a zip file; older ones are pickles one after another."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\3\4"


def check_zip(path: Path) -> None:
    """Raise ValueError where a .pth zip file is not as torch writes them: stored, nothing twice, a short pickle."""
    entries, directory_bytes = _zip_directory(path)
    if entries > MAX_ZIP_ENTRIES or directory_bytes > MAX_PICKLE_BYTES:
        raise ValueError(f"its directory claims {entries:,} entries in {directory_bytes:,} bytes")
    with zipfile.ZipFile(path) as file:
        infos = file.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in infos):
        raise ValueError("it is compressed, which torch never does")
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise ValueError("its parts are larger than the file")
    if any(info.file_size > MAX_PICKLE_BYTES for info in infos if "/data/" not in info.filename):
        raise ValueError("it holds far more than weights")


def _zip_directory(path: Path) -> tuple[int, int]:
    """(entries, bytes) of the directory at the end of a zip file, as it claims: read before any of it."""
    with path.open("rb") as file:
        end = file.seek(0, io.SEEK_END)
        file.seek(max(0, end - 2**16 - 22))
        tail = file.read()
        at = tail.rfind(b"PK\5\6")
        try:
            entries, size = struct.unpack_from("<HI", tail, at + 10 if at >= 0 else len(tail))
            if at >= 20 and tail[at - 20 : at - 16] == b"PK\6\7":  # a second, for large files, says more
                file.seek(struct.unpack_from("<Q", tail, at - 12)[0])
                entries, size = struct.unpack_from("<32xQQ", file.read(56))[:2]
        except (struct.error, OverflowError, OSError) as error:
            raise ValueError("its end is missing") from error
    return entries, size


class PickleFile(io.BufferedReader):
    """A .pth file of the old kind that ends where its pickles, without the numbers, are longer than any network's."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._reads = self._bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """As for any file. Raises ValueError where it has gone on for too long."""
        data = super().read(size)
        self._count(data)
        return data

    def readline(self, size: int | None = -1, /) -> bytes:
        """As for any file. Raises ValueError where it has gone on for too long."""
        data = super().readline(MAX_PICKLE_BYTES + 1 if size is None or size < 0 else size)
        self._count(data)
        return data

    def _count(self, data: bytes) -> None:
        self._reads += 1
        self._bytes += len(data)
        if self._reads > MAX_PICKLE_READS or self._bytes > MAX_PICKLE_BYTES:
            raise ValueError("it holds far more than weights")


def conv_key(name: str, names: set[str]) -> str | None:
    """The stem under which a state dict with the keys `names` holds convolution `name`: ours or torchvision's."""
    for stem in (name, f"features.{LAYER_BY_NAME[name].torchvision_index}"):
        if f"{stem}.weight" in names and f"{stem}.bias" in names:
            return stem
    return None


def check_shapes(shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, int]:
    """Check that tensors of these shapes chain up to a VGG-19 topology; gives each convolution's output channels."""
    widths: dict[str, int] = {}
    channels = 3
    for name in CONV_NAMES:
        key = conv_key(name, set(shapes))
        if key is None:
            if widths:
                break  # a network cut off after some layer still serves the layers it has
            raise InputError(
                f"weights file {path}: has no {name}.weight or features.0.weight, so it is not a VGG-19-shaped "
                f"network (first keys: {shown(', '.join(list(shapes)[:3])) or 'none'}). Give torchvision's VGG-19 or "
                "one with its layer names in network.weights."
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
    """The tensors of a .safetensors or .pth file.

    Raises InputError if it cannot be read, or is a pickle of anything but tensors.
    """
    from safetensors.torch import load_file  # noqa: PLC0415 - loads torch, which the shapes of a file do not need

    try:
        state = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except FileNotFoundError as error:
        raise InputError(f"weights file {path}: not found. Correct network.weights.") from error
    except Exception as error:  # of damaged bytes the unpickler raises nearly everything, AssertionError included
        reason = shown(next(iter(str(error).splitlines()), type(error).__name__), 200)
        raise InputError(f"weights file {path}: cannot be read as weights ({reason}).") from error
    if not isinstance(state, dict) or not all(_is_plain(key, value) for key, value in state.items()):
        raise InputError(
            f"weights file {path}: holds no state dict of tensors. Save model.state_dict(), not the model."
        )
    if sum(value.nbytes for value in state.values()) > path.stat().st_size:
        raise InputError(f"weights file {path}: claims more weights than it has bytes. Give an intact copy.")
    check_shapes({key: tuple(value.shape) for key, value in state.items()}, path)
    return state


def _unpickled(path: Path) -> Any:
    """What a .pth file holds, read so that nothing in it is run, whatever TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD says."""
    import torch  # noqa: PLC0415 - as above

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the pickle's age, which is its maker's business
        if not is_zip(path):  # torchvision's own file, of 2017, is not
            with PickleFile(path) as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        check_zip(path)
        # mapped: of a VGG-19 file the classifier, most of its 0.5 GB, is never touched
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _is_plain(key: object, value: object) -> bool:
    """Whether this is a tensor of numbers in memory under a name: a pickle can also make sparse or empty ones."""
    import torch  # noqa: PLC0415 - as above

    return (
        isinstance(key, str)
        and isinstance(value, torch.Tensor)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and not value.is_quantized
    )
