"""Mapping tasks over specs, in this process, on Dask's threaded scheduler; engine_processes.py does it in others.

Tasks are pure functions of one picklable spec and may run twice. Results are combined in the order of the specs,
whatever the order of arrival, so that every sum has the same bits on every run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from dask import threaded  # as an object: its name would make dask import distributed, and that torch
from dask.base import compute
from dask.delayed import delayed

from pipeline.core.cancel import NEVER, CancelToken

S = TypeVar("S")
R = TypeVar("R")
A = TypeVar("A")

# Tasks of one graph: dask takes time that grows with their square, and hears no stop while it builds one.
_BATCH = 256


class Engine:
    """A pool of worker threads, and the flag that stops it between two tasks."""

    def __init__(self, workers: int, cancel: CancelToken = NEVER, beside: int | None = None):
        """`beside`: worker threads of what runs beside; as many if not given."""
        self.cancel = cancel
        self._workers = workers
        self._workers_beside = beside or workers
        self._pool = self._new_pool()
        self._side = ThreadPoolExecutor(1, thread_name_prefix="beside")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._side.shutdown(wait=True)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def map(
        self,
        task: Callable[[S], R],
        specs: Sequence[S],
        on_done: Callable[[], None] = lambda: None,
        before: Callable[[S], S] = lambda spec: spec,
        after: Callable[[R], None] = lambda result: None,
        on_error: Callable[[], None] = lambda: None,
    ) -> list[R]:
        """`task` of every spec, results in the order of `specs`.

        `before` is called with each spec, may wait, and gives the spec to run. `after` is called with each result, then
        `on_done`; all on any thread. Raises Stopped when the stop flag is set, else what a task or one of these raised
        first; then nothing runs any more. `on_error` is called at once when that is raised, on any thread, while other
        tasks may still run or wait: it has to release those that wait.
        """
        results: list[R] = []
        for batch in self._batches(specs):
            one_pass = _Pass(task, on_done, before, after, on_error, self.cancel)
            # dask takes independent tasks by name, last first; its own names are random, and so would be the way over
            # the canvas, where neighbouring tiles share the rows of their halos
            names = (f"task-{number:09}" for number in range(len(batch), 0, -1))
            nodes = [one_pass.node(spec, name) for spec, name in zip(batch, names, strict=True)]
            results += self._compute(one_pass, nodes)
        return results

    def _batches(self, specs: Sequence[S]) -> Iterator[Sequence[S]]:
        for first in range(0, len(specs), _BATCH):
            self.cancel.raise_if_set()
            yield specs[first : first + _BATCH]

    def fold(
        self,
        task: Callable[[S], R],
        specs: Sequence[S],
        combine: Callable[[A, R], A],
        initial: A,
        on_done: Callable[[], None] = lambda: None,
        before: Callable[[S], S] = lambda spec: spec,
        on_error: Callable[[], None] = lambda: None,
    ) -> A:
        """Combine the results of `task` one by one, in the order of `specs`, keeping only a few in memory.

        `on_done`, `before` and `on_error` as for `map`. Raises like `map`.
        """
        result = initial
        for batch in self._batches(specs):
            one_pass = _Pass(task, on_done, before, lambda _result: None, on_error, self.cancel)
            total: Any = delayed(result, traverse=False)
            for spec in batch:
                total = delayed(partial(one_pass.guarded, combine), pure=False)(total, one_pass.node(spec))
            (result,) = self._compute(one_pass, [total])
        return result

    def beside(self, work: Callable[[Engine], R]) -> Future[R]:
        """Start `work` with an engine of its own, on a thread of its own, beside what this one does."""
        return self._side.submit(self._run_beside, work)

    def _run_beside(self, work: Callable[[Engine], R]) -> R:
        with Engine(self._workers_beside, self.cancel) as engine:
            return work(engine)

    def checked(self, items: Iterable[S]) -> Iterable[S]:
        """`items`, ending in Stopped once the run is asked to stop."""
        for item in items:
            self.cancel.raise_if_set()
            yield item

    def _compute(self, one_pass: _Pass[Any, Any], nodes: list[Any]) -> tuple[Any, ...]:
        try:
            return tuple(
                compute(  # type: ignore[no-untyped-call]
                    *nodes, scheduler=threaded.get, pool=self._pool, num_workers=self._workers, optimize_graph=False
                )
            )
        except BaseException as error:
            # dask does not wait: what still runs would write beside whatever comes next
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = self._new_pool()
            if isinstance(error, Exception) and one_pass.error not in (None, error):
                raise one_pass.error from None  # dask has heard first of one that only followed from it
            raise

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._workers, thread_name_prefix="task")


@dataclass
class _Pass(Generic[S, R]):
    """A task with what is called around it, as the nodes of one graph. `error`: the first that was raised in it."""

    task: Callable[[S], R]
    on_done: Callable[[], None]
    before: Callable[[S], S]
    after: Callable[[R], None]
    on_error: Callable[[], None]
    cancel: CancelToken
    error: BaseException | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def node(self, spec: S, name: str | None = None) -> Any:
        # a partial without arguments: dask would otherwise look for tasks inside the spec
        return delayed(partial(self.guarded, self._run, spec), pure=False)(dask_key_name=name)

    def guarded(self, function: Callable[..., A], *args: Any) -> A:
        """Call the function; if it raises the first error of the pass, `on_error` is called at once."""
        try:
            return function(*args)
        except BaseException as error:
            with self._lock:
                if is_first := self.error is None:
                    self.error = error
            if is_first:
                self.on_error()
            raise

    def _run(self, spec: S) -> R:
        self.cancel.raise_if_set()
        result = self.task(self.before(spec))
        self.after(result)
        self.on_done()
        return result
