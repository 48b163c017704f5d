"""Running graphs in worker processes on this machine, with Dask's distributed scheduler. Loaded only if asked for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent import futures
from functools import partial
from typing import Any

from distributed import Future, KilledWorker

from pipeline.core import profiler
from pipeline.core.cancel import CancelToken
from pipeline.executors.graph import Executor, Graph, Key, dask_names, ignore
from pipeline.executors.threads import ThreadExecutor
from pipeline.executors.worker_pool import WorkerPool

# How long a stop, or workers that do not start, may go unnoticed.
_POLL_S = 0.2


def _nothing() -> None:
    """Initializes no worker; it can be pickled."""


class ProcessExecutor(Executor):
    """Worker processes with a few tiles in flight each. They start with the first graph.

    Nodes run in the workers; `map` without tiles, which only moves chunks, runs on threads of this process. An error or
    a stop kills the workers, so that nothing that was begun still writes; new ones start with the next graph.
    """

    def __init__(
        self,
        processes: int,
        tiles: int,
        cancel: CancelToken | None = None,
        lock: int | None = None,
        note: Callable[[str], None] = lambda _message: None,
        initialize: Callable[[], None] = _nothing,
    ):
        """`tiles`: in flight in each process, which has as many threads for other nodes. `lock`: descriptor of the run
        directory's lock, which workers inherit. `note`: called with a message for every worker that died, on any
        thread. `initialize`: called once in every worker; to be pickled.
        """
        super().__init__(cancel)
        self.most_ahead = processes * (tiles + 1)  # one waits at every worker, so that no worker has to
        # tasks that only move chunks are limited by the disk: sending them to workers would gain nothing
        self._threads = ThreadExecutor(tiles, self.cancel)
        self._workers = WorkerPool(processes, tiles, lock, note, initialize)
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

    def run(
        self,
        graph: Graph,
        keys: Sequence[Key],
        on_done: Callable[[Key], None] = ignore,
        proceed: Callable[[Any], bool] | None = None,
    ) -> list[Any]:
        """As in Executor; `proceed` is called on this thread, `on_done` on the scheduler's."""
        self.cancel.raise_if_set()
        if not keys:
            return []
        # names have to be new: the scheduler may still know those of the run before
        run = next(self._runs)
        names = {
            key: f"{name}-{'tile' if graph[key].tile else 'other'}"
            for key, name in dask_names(graph, f"{run}-").items()
        }
        keys_of = {name: key for key, name in names.items()}
        # a partial without arguments: dask would otherwise look for keys and tasks inside specs
        tasks = {
            names[key]: (partial(node.function), *(names[need] for need in node.needs)) for key, node in graph.items()
        }
        calls: list[Future[Any]] = []
        try:
            self._workers.start()
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
            raise

    def collect_profile(self) -> None:
        """As in Executor."""
        for seconds in self._workers.call_everywhere(profiler.take):
            profiler.add(seconds)

    def _value(self, call: Future[Any]) -> Any:
        """The value of a node, or what was raised."""
        fetching = self._workers.fetch(call)
        while not fetching.done():
            self.cancel.raise_if_set()
            self._workers.raise_if_broken()
            futures.wait([fetching], _POLL_S)
        return fetching.result()


def _resources(name: str) -> dict[str, int]:
    """A node takes one of its worker's places for tiles, or for others."""
    return {name.split("-")[2]: 1}
