"""Running graphs with Dask's distributed scheduler, in worker processes or on a cluster. Loaded only if asked for."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import Any

from distributed import Future, KilledWorker

from pipeline.core import profiler
from pipeline.core.cancel import CancelToken
from pipeline.executors.addresses import ClusterAddress
from pipeline.executors.cluster_pool import ClusterPool
from pipeline.executors.graph import Executor, Graph, Key, Node, OnDone, Proceed, dask_names
from pipeline.executors.threads import ThreadExecutor
from pipeline.executors.worker import CPU_TILE, GPU_TILE, OTHER, SUM, Role
from pipeline.executors.worker_pool import WorkerPool

# How long a stop, or workers that do not start, may go unnoticed.
_POLL_S = 0.2


def _nothing() -> None:
    """Initializes no worker; it can be pickled."""


class PoolExecutor(Executor):
    """Nodes run in the workers of a pool; `map` without tiles, which only moves chunks, on threads of this process.

    After an error or a stop nothing that was begun still writes.
    """

    def __init__(self, workers: WorkerPool | ClusterPool, tiles: int, most_ahead: int, cancel: CancelToken):
        """`tiles`: threads for `map`."""
        super().__init__(cancel)
        self.most_ahead = most_ahead
        # tasks that only move chunks are limited by the disk: sending them to workers would gain nothing
        self._threads = ThreadExecutor(tiles, self.cancel)
        self._workers = workers
        self._runs = itertools.count()

    def __exit__(self, *error: object) -> None:
        self._threads.__exit__(*error)
        self._workers.close()

    def map(
        self,
        task: Callable[[Any], Any],
        specs: Sequence[Any],
        on_done: Callable[[], None] = lambda: None,
        tile: bool = False,
    ) -> list[Any]:
        """As in Executor."""
        return super().map(task, specs, on_done, tile) if tile else self._threads.map(task, specs, on_done)

    def _run(self, graph: Graph, keys: Sequence[Key], on_done: OnDone, proceed: Proceed | None) -> list[Any]:
        """As in Executor; `proceed` is called on this thread, `on_done` on one of distributed's."""
        calls: list[Future[Any]] = []
        try:
            self._workers.start()
            names = self._names(graph)
            keys_of = {name: key for key, name in names.items()}
            # a partial without arguments: dask would otherwise look for keys and tasks inside specs
            tasks = {
                names[key]: (partial(self._workers.task(node.function)), *(names[need] for need in node.needs))
                for key, node in graph.items()
            }
            with self._workers.counting(lambda name: on_done(keys_of[name])):
                calls += self._workers.submit(tasks, [names[key] for key in keys], _resources)
                values = [self._value(calls[0])]
                if proceed is not None and not proceed(values[0]):
                    if len(keys) > 1:  # tasks that are running cannot be cancelled otherwise
                        self._workers.drop(calls)
                    return values + [None] * (len(keys) - 1)
                return values + [self._value(call) for call in calls[1:]]
        except BaseException as error:
            self._workers.drop(calls)  # nothing that was begun may write during what comes next
            if isinstance(error, KilledWorker):
                raise self._workers.killer_error() from error
            if isinstance(error, futures.CancelledError):  # the scheduler is gone, and with it what it was to compute
                raise self._workers.lost_error() from error
            raise

    def _names(self, graph: Graph) -> dict[Key, str]:
        """New names, because the scheduler may still know those of the run before, and what each node needs."""
        prefix = f"{self._workers.name_prefix}{next(self._runs)}-"
        return {key: f"{name}-{self._resource(graph[key])}" for key, name in dask_names(graph, prefix).items()}

    def _resource(self, node: Node) -> str:
        if node.tile:
            return self._workers.tile_resource
        return SUM if node.near_tiles else OTHER

    def collect_profile(self) -> None:
        """As in Executor."""
        for seconds in self._workers.call_everywhere(profiler.take):
            profiler.add(seconds)

    def _value(self, call: Future[Any]) -> Any:
        """The value of a node, or what was raised. One that is lost with its worker is computed again."""
        client = self._workers.client
        fetching = asyncio.run_coroutine_threadsafe(client.gather(call, asynchronous=True), client.loop.asyncio_loop)
        while not fetching.done():
            self.cancel.raise_if_set()
            self._workers.raise_if_broken()
            futures.wait([fetching], _POLL_S)
        return fetching.result()


def _resources(name: str) -> dict[str, int]:
    """A node takes one of its worker's places for tiles, or for others."""
    return {name.rpartition("-")[2]: 1}


class ProcessExecutor(PoolExecutor):
    """Worker processes on this machine. They start with the first graph.

    An error or a stop kills the workers, so that nothing that was begun still writes; new ones start with the next
    graph.
    """

    def __init__(
        self,
        processes: int | Sequence[Role],
        tiles: int,
        cancel: CancelToken | None = None,
        lock: int | None = None,
        note: Callable[[str], None] = lambda _message: None,
        initialize: Callable[[], None] = _nothing,
    ):
        """`processes`: how many, each with `tiles` in flight and as many threads for other nodes; or what each does.

        `lock`: descriptor of the run directory's lock, which workers inherit. `note`: called with a message for every
        worker that died, on any thread. `initialize`: called once in every worker; to be pickled.
        """
        roles = [Role(tiles, tiles)] * processes if isinstance(processes, int) else processes
        computing = [role.tiles + 1 for role in roles if role.tiles]  # one waits at every worker, so that none has to
        super().__init__(WorkerPool(roles, lock, note, initialize), tiles, sum(computing), cancel or CancelToken())


class ClusterExecutor(PoolExecutor):
    """The workers of a cluster, which share the run directory `folder` with this process.

    `files`: (path, SHA-256) of what tasks read elsewhere. `on_gpu`: where tiles are computed.
    """

    def __init__(
        self,
        where: ClusterAddress,
        folder: Path,
        files: tuple[tuple[Path, str], ...],
        tiles: int,
        most_ahead: int,
        on_gpu: bool,
        cancel: CancelToken,
        note: Callable[[str], None] = lambda _message: None,
    ):
        """`tiles`: threads for `map`. `most_ahead`: as in Executor."""
        pool = ClusterPool(where, folder, files, GPU_TILE if on_gpu else CPU_TILE, cancel, note)
        super().__init__(pool, tiles, most_ahead, cancel)
