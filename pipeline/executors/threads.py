"""Running graphs on threads of this process, with Dask's threaded scheduler."""

from __future__ import annotations

import heapq
import itertools
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from functools import partial
from typing import Any

from dask import threaded  # the module: its own name `get` would make dask import distributed, and that torch

from pipeline.core.cancel import CancelToken
from pipeline.executors.graph import Executor, Graph, Key, OnDone, Proceed, dask_names

_PROCEED = "proceed"


class ThreadExecutor(Executor):
    """Two thread pools: one for nodes that hold a tile, as many as may be in flight, and one for all others.

    The threads live as long as the executor: each has an OpenMP team and buffers of its own, and where memory is short
    libgomp ends the process if it cannot start a new team.
    """

    def __init__(self, tiles: int, cancel: CancelToken | None = None, others: int | None = None):
        """`others`: threads for nodes that hold no tile; as many as `tiles` if not given."""
        super().__init__(cancel)
        self.most_ahead = 2 * tiles
        self._tiles, self._others = _RankedPool(tiles, "tile"), _RankedPool(others or tiles, "task")

    def __exit__(self, *_: object) -> None:
        self._tiles.shutdown()
        self._others.shutdown()

    def _run(self, graph: Graph, keys: Sequence[Key], on_done: OnDone, proceed: Proceed | None) -> list[Any]:
        """As in Executor; `proceed` is called on a thread of the pool."""
        run = _Run(self.cancel, on_done)
        # Dask takes a plain graph of tuples; through `delayed` and `compute` the same graph takes ten times as long
        names = dask_names(graph)
        tasks: dict[str, Any] = {
            names[key]: (partial(run.node, key, node.function), *(names[need] for need in node.needs))
            for key, node in graph.items()
        }
        wanted = [names[key] for key in keys]
        if proceed is not None:
            tasks[_PROCEED] = (partial(run.proceed, proceed), names[keys[0]])
            wanted.append(_PROCEED)
        pools = {names[key]: self._tiles if node.tile else self._others for key, node in graph.items()}
        submitter = _Submitter(pools, self._others)
        try:
            # not as the user's dask configuration may have it
            values = threaded.get(tasks, wanted, pool=submitter, chunksize=1, rerun_exceptions_locally=False)
        except BaseException:
            run.over = True
            submitter.wait()  # dask does not: what still runs would write beside whatever comes next
            if run.error is not None:
                raise run.error from None  # dask may have seen first one that was raised later
            raise
        return list(values[: len(keys)])

    def collect_profile(self) -> None:
        """As in Executor: all is measured in this process."""


class _Run:
    """The nodes of one run. `over`: nodes that have not begun are left out. `error`: the first that was raised."""

    def __init__(self, cancel: CancelToken, on_done: OnDone):
        self._cancel, self._on_done = cancel, on_done
        self._lock = threading.Lock()
        self.over = False
        self.error: BaseException | None = None

    def node(self, key: Key, function: Callable[..., Any], *values: object) -> Any:
        """Run one node, and report it."""
        return self._guarded(lambda: self._run_node(key, function, values))

    def proceed(self, proceed: Proceed, value: object) -> None:
        """Ask whether the rest is wanted."""
        if not self.over and not self._guarded(lambda: proceed(value)):
            self.over = True

    def _run_node(self, key: Key, function: Callable[..., Any], values: Sequence[object]) -> Any:
        self._cancel.raise_if_set()
        value = function(*values)
        self._on_done(key)
        return value

    def _guarded(self, call: Callable[[], Any]) -> Any:
        if self.over:
            return None
        try:
            return call()
        except BaseException as error:
            with self._lock:
                self.error = self.error or error
            self.over = True
            raise


class _Submitter(futures.Executor):
    """Hands the tasks of one graph to the two pools, with their places in the graph as their ranks.

    Dask's own order would mix the tiles: neighbours share the rows of their halos, which are read once from the disk
    while they are in the page cache.
    """

    # Dask submits as many tasks as there are workers: all that are ready, so that the pools choose among them.
    _max_workers = sys.maxsize

    def __init__(self, pools: Mapping[str, _RankedPool], others: _RankedPool):
        """`pools`: of every node, in the order of the graph; a name that is not there is a task for `others`."""
        self._pools, self._others = pools, others
        self._ranks = {name: rank for rank, name in enumerate(pools)}
        self._running: set[futures.Future[Any]] = set()

    def submit(self, function: Callable[..., Any], /, *args: Any, **_: object) -> futures.Future[Any]:
        """Called by Dask with a batch of one task: its key, and what belongs to it."""
        ((name, *_rest),) = args[0]
        future = self._pools.get(name, self._others).submit(self._ranks.get(name, -1), partial(function, *args))
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    def wait(self) -> None:
        """Return when nothing that was submitted runs any more."""
        futures.wait(list(self._running))


class _RankedPool:
    """A thread pool that begins the task of the lowest rank first."""

    def __init__(self, threads: int, name: str):
        self._threads = futures.ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._ready: list[tuple[int, int, Callable[[], Any], futures.Future[Any]]] = []
        self._numbers = itertools.count()  # of equal ranks the earlier one, and never a comparison of functions

    def submit(self, rank: int, call: Callable[[], Any]) -> futures.Future[Any]:
        """The result of `call`, once a thread had it."""
        future = futures.Future[Any]()
        with self._lock:
            heapq.heappush(self._ready, (rank, next(self._numbers), call, future))
        self._threads.submit(self._run_next)
        return future

    def _run_next(self) -> None:
        with self._lock:
            _, _, call, future = heapq.heappop(self._ready)
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    def shutdown(self) -> None:
        """Wait for the threads, and end them."""
        self._threads.shutdown(wait=True)
