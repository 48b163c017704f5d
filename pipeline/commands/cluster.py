"""The `scheduler` and `worker` commands: a cluster of machines that share a folder (docs/scaling.md)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.config import ComputeConfig
from pipeline.core.errors import ConfigError, storage
from pipeline.core.events import Note, Sink, ignore
from pipeline.core.files import unwritable
from pipeline.plan import WORKERS, resolve_device, run_device, update_threads
from pipeline.rundir.process_settings import enter_process_settings, process_settings


@process_settings()
def serve_scheduler(
    folder: Path,
    *,
    host: str | None = None,
    port: int = 0,
    on_ready: Callable[[str, Path], None] = lambda _address, _file: None,
    stop: threading.Event | None = None,
) -> None:
    """Serve a cluster until `stop` is set; its key and its scheduler file are in `folder`, which only its owner reads.

    `host`: address to listen at, None: all of this machine. `port`: 0: any free one. `on_ready`: called with the
    address and the scheduler file. Raises ConfigError, StorageError.
    """
    from pipeline.executors import cluster  # noqa: PLC0415 - brings distributed

    with storage(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (refusal := unwritable(folder)) is not None:
        raise ConfigError(f"{folder}: cannot be written to ({refusal.strerror}). Choose another folder.")
    cluster.serve_scheduler(folder, host, port, stop or threading.Event(), on_ready)


@process_settings()
def serve_workers(
    scheduler: str | Path,
    *,
    key: Path | None = None,
    devices: Sequence[str] = (),
    processes: int | None = None,
    sink: Sink = ignore,
    stop: threading.Event | None = None,
) -> None:
    """Compute for a scheduler until `stop` is set: a process for each device, and beside GPUs some that only update.

    `scheduler`, `key`: as compute.scheduler and compute.cluster_key. `devices`: by torch's names; none: all GPUs, or
    the CPU. `processes`: that update; None: as many as GPUs. Raises ConfigError.
    """
    from pipeline.executors import cluster  # noqa: PLC0415 - brings distributed
    from pipeline.executors.worker import Role  # noqa: PLC0415

    names = tuple(devices) or _own_devices()
    for name in names:
        resolve_device(name)
    on_gpu = [name for name in names if name != "cpu"]
    updating = (len(on_gpu) if processes is None else processes) if on_gpu or processes else 0
    update = Role(0, update_threads(on_gpu[0] if on_gpu else "cpu", max(1, updating)), "cpu")
    # a process on a CPU also updates: there is no other
    roles = [Role(WORKERS, 0 if name in on_gpu else WORKERS, name) for name in names] + [update] * updating
    text = f"{len(names)} × {', '.join(dict.fromkeys(names))}" + (f", {updating} to update" if updating else "")
    sink(Note(f"working for {scheduler} with processes for {text}; Ctrl-C ends them"))
    cluster.serve_workers(
        scheduler, key, roles, enter_process_settings, stop or threading.Event(), lambda message: sink(Note(message))
    )


def _own_devices() -> tuple[str, ...]:
    device = run_device(ComputeConfig())
    return device.processes or (device.name,)
