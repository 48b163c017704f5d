"""Keeps the networks that this process computes with, and the settings of torch that they need.

Networks and torch's settings belong to the whole process; `release` drops the former and restores the latter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from pipeline.core import callers
from pipeline.core.errors import ConfigError
from pipeline.network.vgg import Network, random_state
from pipeline.network.weights import NetworkSpec, bounded_gpu_bytes
from pipeline.network.weights_file import load_state

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

N = TypeVar("N")


def wider(dtype: str) -> str:
    """The words that recommend the next number format, which overflows later, if there is one."""
    return {"float64": "", "float32": "float64, or "}.get(dtype, "float32, or ")


class ComputeSpec(Protocol):
    """What identifies a network in memory, and how it computes; see NetworkSpec."""

    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def threads(self) -> int: ...  # noqa: D102
    @property
    def gpu_bytes(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class _TorchSettings:
    """The settings of torch that `get_network` changes."""

    threads: int
    cudnn_tf32: bool
    matmul_tf32: bool
    deterministic: bool

    @classmethod
    def current(cls) -> _TorchSettings:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        return cls(torch.get_num_threads(), cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic)

    def apply(self) -> None:
        torch.set_num_threads(self.threads)
        torch.backends.cudnn.allow_tf32 = self.cudnn_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.matmul_tf32
        torch.backends.cudnn.deterministic = self.deterministic


@dataclass
class _Cache:
    """Networks, the least recently used first; torch's settings before the first; GPUs whose memory is bounded.

    `held_bytes`: GPU memory that is used beside the tiles, by a stage that stays in memory.
    """

    networks: list[tuple[ComputeSpec, Any]] = field(default_factory=list)
    original_settings: _TorchSettings | None = None
    bounded_devices: set[str] = field(default_factory=set)
    held_bytes: int = 0


_cache = _Cache()
_lock = threading.Lock()


def get_network(spec: NetworkSpec) -> Network:
    """The network of `spec`; otherwise as `cached`."""
    return cached(spec, partial(_build, spec))


def cached(spec: ComputeSpec, build: Callable[[], N]) -> N:
    """What `build` gives for `spec`, cached from the first call until another is requested or `release` is called.

    The cache holds one network, as the memory plan counts; with several calls of the library on several threads, one
    for each. Raises InputError for unusable weights, ConfigError for a dtype that the device does not support.
    """
    with _lock:
        _cache.original_settings = _cache.original_settings or _TorchSettings.current()
        _bound_memory(spec)
        network: N | None = next((network for key, network in _cache.networks if key == spec), None)
        if network is None:
            # The old network is dropped before the new one is built: both together would exceed the plan.
            del _cache.networks[: max(0, len(_cache.networks) + 1 - max(1, callers.number()))]
            network = build()
        else:
            _cache.networks.remove((spec, network))  # and appended again, as the most recently used
        _cache.networks.append((spec, network))
    if spec.threads:
        torch.set_num_threads(spec.threads)  # holds for the calling thread and new ones only, so on every call
    _set_precision(spec)  # of the process: a network of another dtype may have been used since the last call
    return network


def _build(spec: NetworkSpec) -> Network:
    state = random_state(spec.source) if spec.source.path is None else load_state(spec.source.path)
    return Network(
        state,
        padding=spec.padding,
        pooling=spec.pooling,
        dtype=DTYPES[spec.dtype],
        device=spec.device,
        pooling_scale=spec.pooling_scale,
    )


def hold(spec: NetworkSpec, size_bytes: int) -> None:
    """Let this process use so much memory of the GPU of `spec` beside its tiles."""
    with _lock:
        _cache.held_bytes = size_bytes
        _bound_memory(spec)


def release() -> None:
    """Drop all networks and restore torch's settings. Call it when no thread computes any more."""
    with _lock:
        _cache.networks.clear()
        for device in _cache.bounded_devices:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        _cache.bounded_devices.clear()
        if _cache.original_settings is not None:
            _cache.original_settings.apply()
            _cache.original_settings = None


def _bound_memory(spec: ComputeSpec) -> None:
    """Limit this process to the GPU memory that its tiles need, and what a stage in memory holds."""
    if not (spec.device != "cpu" and spec.gpu_bytes):
        return
    total = torch.cuda.get_device_properties(spec.device).total_memory
    allowed = bounded_gpu_bytes(spec.gpu_bytes) + _cache.held_bytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), spec.device)
    _cache.bounded_devices.add(spec.device)


def _set_precision(spec: ComputeSpec) -> None:
    """Make CUDA compute in the requested precision, by the same algorithm every time: exact resume needs both."""
    on_cuda = torch.device(spec.device).type == "cuda"
    if spec.dtype == "tf32" and not (on_cuda and torch.cuda.get_device_capability(spec.device) >= (8, 0)):
        raise ConfigError(
            f"compute.dtype: tf32 needs a CUDA device of the Ampere generation or later, not {spec.device}."
        )
    torch.backends.cudnn.allow_tf32 = spec.dtype == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False  # Gram sums are matrix products, and tf32 keeps 10 bits of a feature
    torch.backends.cudnn.deterministic = True
