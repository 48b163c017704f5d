"""Finds the weights of a network, with their hash and widths.

Most of this works without torch, which takes seconds to import: `plan` and `status` do without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.config import MAX_BYTES
from pipeline.core.cancel import NEVER, CancelToken
from pipeline.core.errors import StorageError, storage
from pipeline.core.events import Note, Sink, WorkDone, ignore
from pipeline.core.vgg_layers import CONV_NAMES, VGG19_WIDTHS
from pipeline.network.download import DownloadError, download
from pipeline.network.weights_file import check_file, check_shapes, load_state, safetensors_shapes

VGG19_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
VGG19_SHA256_PREFIX = "dcbb9e9d"
VGG19_FILE_BYTES = 574_673_361
MIB = 2**20
_HASH_BLOCK_BYTES = 4 * MIB
# Networks whose weights are part of the package; docs/networks.md describes how each was made.
PACKAGED: Mapping[str, Path] = {"vgg19-lite": Path(__file__).parents[1] / "assets" / "vgg19-lite.safetensors"}
# A quarter of VGG-19's widths, a sixteenth of its arithmetic: random features are for tests, which must be fast.
RANDOM_WIDTHS: Mapping[str, int] = {name: VGG19_WIDTHS[name] // 4 for name in CONV_NAMES}


@dataclass(frozen=True)
class WeightsSource:
    """The source of a network's weights: a file, or a seed if `path` is None.

    `widths`: output channels of every convolution. `sha256`: of the file, for the manifest; "random" without a file.
    """

    path: Path | None
    seed: int
    widths: Mapping[str, int]
    sha256: str

    @property
    def files(self) -> tuple[tuple[Path, str], ...]:
        """(path, SHA-256) of the file, if there is one."""
        return () if self.path is None else ((self.path, self.sha256),)


def bounded_gpu_bytes(planned_bytes: int) -> int:
    """GPU memory that one process may use for the passes over tiles: what is planned, and a quarter or 2 GiB more.

    Without a limit cuDNN tries kernels whose workspace is as large as the device (132 GiB for a tile of 1,024 px in
    float32). They are slow, and whether one is available, and with it the last bits, would change from run to run.
    """
    return max(planned_bytes * 5 // 4, planned_bytes + 2 * 2**30)


@dataclass(frozen=True)
class NetworkSpec:
    """Everything that is needed to build a network in any process; picklable.

    `threads`: CPU threads per tile, which decide the last bits of the result; 0 keeps torch's setting.
    `gpu_bytes`: GPU memory that is planned for one process; 0 sets no limit. `pooling_scale`: see Network.
    """

    source: WeightsSource
    padding: str
    pooling: str
    dtype: str
    device: str
    threads: int = 0
    gpu_bytes: int = 0
    pooling_scale: float = 1.0

    @property
    def on_gpu(self) -> bool:
        """Whether the device has its own memory and streams."""
        return self.device != "cpu"


def find_weights(
    name: str, path: Path | None, seed: int, sink: Sink = ignore, cancel: CancelToken = NEVER
) -> WeightsSource:
    """Find the weights of network `name`: in `path` if given, else packaged, seeded, or (VGG-19's) downloaded.

    Raises Stopped within a moment after `cancel` is set, InputError if the file is missing, is not a weights file, or
    cannot be downloaded, StorageError if the disk fails.
    """
    if path is None and name == "random":
        return WeightsSource(None, seed, RANDOM_WIDTHS, "random")
    path = path or PACKAGED.get(name) or download_vgg19(sink, cancel)
    return WeightsSource(path, seed, read_widths(path), sha256_of(path, cancel))


def weights_path(name: str, path: Path | None) -> Path | None:
    """The file that `find_weights` would read, whether it exists or not; None for random weights."""
    path = path or PACKAGED.get(name)
    return path if path is not None or name == "random" else _vgg19_path()


def widths_for_plan(name: str, path: Path | None, max_bytes: int = MAX_BYTES) -> Mapping[str, int]:
    """Output channels per convolution of the network that `find_weights` would find, without a download.

    Raises InputError for a file that cannot be used, or is larger than `max_bytes`.
    """
    path = path or PACKAGED.get(name)
    if path is not None:
        check_file(path, max_bytes)
        return read_widths(path)
    return RANDOM_WIDTHS if name == "random" else VGG19_WIDTHS


def weights_bytes(name: str, path: Path | None) -> int:
    """Size of the weights file that `find_weights` would find, without a download."""
    path = path or PACKAGED.get(name)
    if path is not None:
        return path.stat().st_size
    return 0 if name == "random" else VGG19_FILE_BYTES


def read_widths(path: Path) -> Mapping[str, int]:
    """Output channels of every convolution in a weights file.

    Raises InputError if it is not a weights file, or not of a VGG-19-shaped network.
    """
    check_file(path, MAX_BYTES)
    return _read_widths(path, path.stat().st_mtime_ns)


@cache
def _read_widths(path: Path, _modified_ns: int) -> Mapping[str, int]:
    if path.suffix == ".safetensors":
        return check_shapes(safetensors_shapes(path), path)
    return check_shapes({key: tuple(value.shape) for key, value in load_state(path).items()}, path)


def download_vgg19(sink: Sink, cancel: CancelToken) -> Path:
    """The VGG-19 file of torchvision in torch's hub folder, downloaded and verified the first time.

    Raises InputError if it cannot be downloaded or has another hash, StorageError if the disk fails.
    """
    path = _vgg19_path()
    if path.is_file():
        return path
    total = VGG19_FILE_BYTES // MIB
    sink(Note(f"downloading VGG-19's weights, {total} MiB, to {path}"))
    try:
        download(
            VGG19_URL,
            path,
            VGG19_SHA256_PREFIX,
            cancel,
            lambda size_bytes: sink(WorkDone(0, "download", size_bytes // MIB, total)),
        )
    except (DownloadError, StorageError) as error:
        raise type(error)(
            f"VGG-19's weights could not be downloaded from {VGG19_URL} ({error}). Download that file elsewhere and "
            f"copy it to {path}, or name a weights file in network.weights."
        ) from error
    return path


def _vgg19_path() -> Path:
    import torch  # noqa: PLC0415 - only for the path of the hub folder

    return Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG19_URL).name


def sha256_of(path: Path, cancel: CancelToken = NEVER) -> str:
    """SHA-256 of a file, in hex. Raises Stopped within a moment after `cancel` is set, StorageError."""
    digest = hashlib.sha256()
    with storage(path), path.open("rb", buffering=0) as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            cancel.raise_if_set()
    return digest.hexdigest()
