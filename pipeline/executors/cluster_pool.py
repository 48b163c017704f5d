"""The workers of a cluster: a client of its scheduler, for runs in a folder that all machines share.

    run ── client ──► scheduler ──► workers on any machine, which come and go (`pipeline worker`)
     └──────────── the run directory, on a shared file system ─────────────┘

Tasks carry paths and numbers; all pixels are in the folder. Before every graph the run bars tasks of earlier graphs
from the folder (fence.py), and checks that workers which have joined see the folder as it does.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import dask.config
from distributed import Client, Future

from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ClusterError, ConfigError, PipelineError
from pipeline.core.text import count, shown
from pipeline.executors import fence, worker
from pipeline.executors.addresses import ClusterAddress

R = TypeVar("R")
_CONNECT_S = 10
# How often the workers are counted while the run waits for results, and the last reports of finished tasks awaited.
_COUNT_S, _SETTLE_S = 2.0, 10.0


class ClusterPool:
    """The workers that a scheduler has at the moment, with the interface of WorkerPool.

    `folder`: the run directory. `files`: as in Fence. `tile_resource`: what a tile needs of a worker.
    """

    def __init__(
        self,
        where: ClusterAddress,
        folder: Path,
        files: tuple[tuple[Path, str], ...],
        tile_resource: str,
        cancel: CancelToken,
        note: Callable[[str], None],
    ):
        self._where, self._folder, self._files = where, folder, files
        self.tile_resource, self._cancel, self._note = tile_resource, cancel, note
        self._opened: ExitStack | None = None
        self._workers: dict[str, str] = {}  # name by address
        self._checked: set[str] = set()
        self._counted_at = 0.0
        self._is_waiting = False
        self._state = threading.Condition()  # guards the attributes below
        self._pending: dict[str, Future[Any]] = {}
        self._on_done: Callable[[str], None] | None = None

    def start(self) -> None:
        """Connect, and let no task of an earlier graph, or start, write from now on.

        Raises ClusterError if there is no scheduler, ConfigError if a worker does not share the folder, LockedError,
        Stopped.
        """
        if self._opened is None:
            with ExitStack() as opened:
                self.client: Any = opened.enter_context(connected(self._where))
                self._opened = opened.pop_all()
        self._bar()
        with _reported(self._where):
            self._count_workers()
            self._check_workers()

    @property
    def name_prefix(self) -> str:
        """The scheduler may still know the names of another run, or of an earlier start."""
        return f"{self._fence.token}-"

    def task(self, function: Callable[..., R]) -> Callable[..., R]:
        """`function`, refused in a worker that does not see this run."""
        return _Fenced(self._fence, function)

    def submit(
        self, graph: Mapping[str, Any], keys: Sequence[str], resources: Callable[[str], Mapping[str, int]]
    ) -> list[Future[Any]]:
        """As in WorkerPool. A future of every node says when it is done, and is released then."""
        with _reported(self._where):
            every: list[Future[Any]] = self.client.get(graph, list(graph), sync=False, resources=resources)
        by_name: dict[str, Any] = dict(zip(graph, every, strict=True))
        with self._state:
            self._pending = dict(by_name)
        for future in by_name.values():
            future.add_done_callback(self._done)
        return [by_name[key] for key in keys]

    def _done(self, future: Future[Any]) -> None:
        name, is_finished = str(future.key), future.status == "finished"
        with self._state:
            on_done = self._on_done if name in self._pending else None
        try:
            if on_done is not None and is_finished:
                on_done(name)
        finally:
            with self._state:
                self._pending.pop(name, None)
                self._state.notify_all()

    @contextmanager
    def counting(self, on_done: Callable[[str], None]) -> Iterator[None]:
        """Inside, `on_done` is called once with every key that is done, on a thread of its own."""
        with self._state:
            self._on_done = on_done
        try:
            yield
            with self._state:  # what is done is reported a moment later than its value can be fetched
                self._state.wait_for(lambda: not self._pending, _SETTLE_S)
        finally:
            with self._state:
                self._on_done = None

    def call_everywhere(self, function: Callable[[], Any]) -> list[Any]:
        """As in WorkerPool."""
        if self._opened is None:
            return []
        with _reported(self._where):
            answers: dict[str, Any] = self.client.run(function, on_error="ignore")
        return list(answers.values())

    def drop(self, calls: Sequence[Future[Any]]) -> None:
        """Cancel the graph, and wait for the end of the tasks that have begun."""
        with self._state:
            pending = list(self._pending.values())
            self._pending = {}
        if self._opened is None:
            return
        if self.client.status == "running":
            with suppress(Exception):  # the connection may end at any moment; the fence holds without it
                self.client.cancel([*calls, *pending], force=True)
        self._bar(CancelToken())  # after Ctrl-C too: what was begun may write until it ends

    def raise_if_broken(self) -> None:
        """Raise ClusterError when the scheduler is lost. Reports workers that have come or gone."""
        if self.client.status != "running":
            raise lost(self._where)
        if time.monotonic() - self._counted_at > _COUNT_S:
            with _reported(self._where):
                self._count_workers()

    def lost_error(self) -> Exception:
        """The error of tasks that the scheduler has lost."""
        return lost(self._where)

    def killer_error(self) -> ConfigError:
        """As in WorkerPool."""
        return ConfigError(
            "Several workers of the cluster were lost over the same task. Most likely their machines have too little "
            "memory for it. Nothing that was committed is lost: run the same command again with a smaller "
            "compute.tile_px or memory.limit, or on other machines."
        )

    def close(self) -> None:
        """Close the connection."""
        if self._opened is not None:
            with suppress(Exception):  # a scheduler that is gone cannot be told
                self._opened.close()

    def _bar(self, cancel: CancelToken | None = None) -> None:
        token = uuid.uuid4().hex
        self._fence = fence.Fence(self._folder, token, fence.versions(), self._files)
        fence.bar_earlier_tasks(self._folder, token, cancel or self._cancel, self._note)

    def _count_workers(self) -> None:
        """Note the workers that have come or gone."""
        info = self.client.scheduler_info(n_workers=-1)["workers"]
        self._counted_at = time.monotonic()
        now = {address: str(about["name"]) for address, about in info.items()}
        is_first = not self._checked and not self._workers
        gone = [name for address, name in self._workers.items() if address not in now]
        new = [name for address, name in now.items() if address not in self._workers]
        self._workers = now
        if gone:
            self._note(f"{_named('worker', gone)} left the cluster; others repeat its tasks")
        if new and not is_first:
            self._note(f"{_named('worker', new)} joined the cluster")
        able = [about for about in info.values() if {self.tile_resource, worker.OTHER} & set(about["resources"])]
        there = {name for about in able for name in about["resources"]}
        lacking = [name for name in (self.tile_resource, worker.OTHER) if name not in there]
        if lacking and not self._is_waiting:
            self._note(f"waiting for a worker with {' and '.join(lacking)}: start one with `pipeline worker`")
        self._is_waiting = bool(lacking)

    def _check_workers(self) -> None:
        """Raise ConfigError if a worker that has not been checked does not see the folder as this process does."""
        new = [address for address in self._workers if address not in self._checked]
        for _ in range(2 if new else 0):  # the second time the file is changed, after all have read it
            question = uuid.uuid4().hex
            fence.write_in_place(self._folder / fence.PROBE_NAME, question)
            asked = {address: (f"{fence.PROBE_NAME}.{number}", uuid.uuid4().hex) for number, address in enumerate(new)}
            with fence.all_locked(self._folder):
                said = self._ask(question, asked)
            for address, what in said.items():
                name, answer = asked[address]
                is_seen = bool(what) or fence.read_small(self._folder / name) == answer
                if fault := what if is_seen else "does not write there so that other machines see it":
                    raise ConfigError(
                        f"work_dir {self._folder}: worker {self._workers[address]} {fault}. All machines of the "
                        "cluster have to share it under the same path, with file locks (NFS version 4 with its "
                        "default options will do). Nothing is lost: correct it, or end that worker."
                    )
        for path in self._folder.glob(f"{fence.PROBE_NAME}*"):
            path.unlink(missing_ok=True)
        self._checked |= set(new)

    def _ask(self, question: str, asked: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        """What each worker says of the folder; of one that left meanwhile, nothing."""
        said = {}
        for address, (name, answer) in asked.items():
            result = self.client.run(
                fence.probe, self._folder, question, name, answer, workers=[address], on_error="return"
            ).get(address)
            if isinstance(result, str):
                said[address] = result
        return said


class _Fenced:
    """A task that first looks whether its run still holds the folder."""

    def __init__(self, of: fence.Fence, function: Callable[..., Any]):
        self._fence, self._function = of, function

    def __call__(self, *values: Any) -> Any:
        return fence.run_fenced(self._fence, self._function, *values)


@contextmanager
def connected(where: ClusterAddress) -> Iterator[Client]:
    """A client of the scheduler. Raises ClusterError if it cannot be reached."""
    with dask.config.set(worker.SETTINGS), _silent():
        try:
            client = Client(  # type: ignore[no-untyped-call]
                where.address, security=where.security, set_as_default=False, timeout=_CONNECT_S
            )
        except (TimeoutError, OSError, ValueError) as error:
            raise ClusterError(
                f"compute.scheduler: no scheduler can be reached at {where.address} "
                f"({shown(str(error) or type(error).__name__, 200)}). Start one with `pipeline scheduler`, and run the "
                "same command again."
            ) from error
        try:
            yield client
        finally:
            with suppress(Exception):
                client.close(timeout=2)  # type: ignore[no-untyped-call]


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, distributed does not log that a connection ended: the error says it in a sentence."""
    names = ("distributed", "distributed.client", "tornado.application", "asyncio")
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def survey(
    where: ClusterAddress, function: Callable[[], R], cancel: CancelToken, waiting: Callable[[], None]
) -> list[R]:
    """What `function` gives in every worker, as soon as there is one. `waiting`: called once if there is none.

    Raises ClusterError, ConfigError for a worker without this package, Stopped.
    """
    with connected(where) as client:
        is_told = False
        while True:
            with _reported(where):
                answers = client.run(function, on_error="return")
            failed = {address: answer for address, answer in answers.items() if isinstance(answer, Exception)}
            if failed and len(failed) == len(answers):
                address, error = next(iter(failed.items()))
                raise ConfigError(
                    f"compute.scheduler: the worker at {address} cannot be used ({shown(str(error), 200)})."
                )
            if answers:
                return [answer for address, answer in answers.items() if address not in failed]
            if not is_told:
                waiting()
                is_told = True
            cancel.raise_if_set()
            time.sleep(0.2)


@contextmanager
def _reported(where: ClusterAddress) -> Iterator[None]:
    """Raise ClusterError where the connection ends inside the block."""
    try:
        yield
    except PipelineError:
        raise
    except (TimeoutError, OSError, futures.CancelledError, RuntimeError) as error:
        raise lost(where) from error


def lost(where: ClusterAddress) -> ClusterError:
    """The error of a run whose scheduler is gone."""
    return ClusterError(
        f"the scheduler at {where.address} was lost. Nothing that was committed is lost: start it again "
        "(`pipeline scheduler`; its workers return by themselves), and run the same command again."
    )


def _named(what: str, names: Sequence[str]) -> str:
    few = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    return f"{what} {few}" if len(names) == 1 else f"{count(len(names), what)} ({few})"
