"""Mapping tasks over specs in worker processes, by the interface of engine.py. Loaded only if asked for."""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable, Generator, Sequence
from concurrent import futures
from contextlib import closing, suppress
from functools import partial
from typing import Any, TypeVar

from distributed import Future, KilledWorker

from pipeline.core import profiler
from pipeline.core.cancel import NEVER, CancelToken
from pipeline.executors import worker
from pipeline.executors.threads import Engine
from pipeline.executors.worker_pool import WorkerPool

S = TypeVar("S")
R = TypeVar("R")
A = TypeVar("A")

# How long a stop, or workers that do not start, may go unseen.
_POLL_S = 0.2


class ProcessEngine(Engine):
    """Worker processes with a few tasks in flight each. They start with the first task.

    An error or a stop cuts off what is in flight: of a pass without its end nothing is kept. `lock`: descriptor of the
    run's lock. `note` is told of every worker that died, on any thread.
    """

    def __init__(
        self,
        processes: int,
        tasks: int,
        cancel: CancelToken = NEVER,
        lock: int | None = None,
        note: Callable[[str], None] = lambda _message: None,
    ):
        super().__init__(tasks, cancel)
        self._in_flight = processes * (tasks + 1)  # one waits at every worker, so that no worker has to
        self._slot = worker.SLOTS[0]
        self._processes = WorkerPool(processes, tasks, lock, note)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._processes.close()

    def map(
        self,
        task: Callable[[S], R],
        specs: Sequence[S],
        on_done: Callable[[], None] = lambda: None,
        before: Callable[[S], S] = lambda spec: spec,
        after: Callable[[R], None] = lambda result: None,
        on_error: Callable[[], None] = lambda: None,
    ) -> list[R]:
        """As in Engine; `on_done`, `before` and `after` are called on this thread."""
        with closing(self._results(task, specs, on_done, before, after, on_error)) as results:
            return list(results)

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
        """As in Engine; `combine`, `on_done` and `before` are called on this thread."""
        total = initial
        with closing(self._results(task, specs, on_done, before, lambda _result: None, on_error)) as results:
            for result in results:
                total = combine(total, result)
        return total

    def _run_beside(self, work: Callable[[Engine], R]) -> R:
        """In the same processes, which have as many slots for it again."""
        beside = copy.copy(self)
        beside._slot = worker.SLOTS[1]
        return work(beside)

    def _results(
        self,
        task: Callable[[S], R],
        specs: Sequence[S],
        on_done: Callable[[], None],
        before: Callable[[S], S],
        after: Callable[[R], None],
        on_error: Callable[[], None],
    ) -> Generator[R]:
        """The results in the order of `specs`; at most `_in_flight` are on their way, or wait for one before them."""
        self.cancel.raise_if_set()
        finished = queue.SimpleQueue[int]()
        failed: list[Future[Any]] = []

        def fail(call: Future[Any]) -> None:  # on another thread: this one may wait in `before`
            failed.append(call)
            on_error()

        calls: dict[int, Future[Any]] = {}
        shared: dict[int, Future[Any]] = {}
        arrived: dict[int, R] = {}
        sent = 0
        try:
            for wanted in range(len(specs)):
                while sent < min(wanted + self._in_flight, len(specs)):
                    calls[sent] = self._processes.submit(task, before(specs[sent]), shared, self._slot)
                    self._processes.when_done(calls[sent], partial(finished.put, sent), fail)
                    sent += 1
                while wanted not in arrived:
                    numbers = self._finished(finished)
                    results = self._fetch([calls[number] for number in numbers])
                    for number, result in zip(numbers, results, strict=True):
                        arrived[number] = result
                        del calls[number]
                        after(result)
                        on_done()
                yield arrived.pop(wanted)
        except BaseException as error:
            on_error()
            first = _first_error(error, failed)
            self._processes.drop(calls.values())
            if isinstance(first, KilledWorker):
                raise self._processes.killer_error() from first
            if first is not error:
                raise first from None
            raise

    def _finished(self, finished: queue.SimpleQueue[int]) -> list[int]:
        """Await the numbers of tasks that are done; there is at least one."""
        numbers: list[int] = []
        while not numbers:
            self._check()
            with suppress(queue.Empty):
                numbers.append(finished.get(timeout=_POLL_S))
                while True:
                    numbers.append(finished.get_nowait())
        return numbers

    def _fetch(self, calls: list[Future[Any]]) -> list[Any]:
        """The results of tasks that are done, or what one raised. Those of a worker that died since are done again."""
        fetching = self._processes.fetch(calls)
        while not fetching.done():
            self._check()
            futures.wait([fetching], _POLL_S)
        results = []
        for result, seconds in fetching.result():
            profiler.add(seconds)
            results.append(result)
        return results

    def _check(self) -> None:
        self.cancel.raise_if_set()
        self._processes.raise_if_broken()


def _first_error(error: BaseException, failed: Sequence[Future[Any]]) -> BaseException:
    """What came first: `error`, which this thread has met, may only follow from a task that has failed before."""
    if failed and isinstance(error, Exception):
        return failed[0].exception() or error  # type: ignore[no-untyped-call]
    return error
