"""Task graphs, and the interface of what runs them: threads.py in this process, processes.py in worker processes.

A graph is plain data. Every node is a pure function of the values of the nodes it needs; it may run twice and gives the
same result. Sums are chains of nodes in the order of the tiles: they have the same bits whatever finishes first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pipeline.core.cancel import CancelToken

S = TypeVar("S")
R = TypeVar("R")
A = TypeVar("A")

# The kind of a node, and its number.
Key = tuple[str, int]
# Dask's scheduler takes about half a millisecond per node before it starts the first.
_BATCH = 1024


@dataclass(frozen=True)
class Node:
    """Calls `function` with the values of the nodes `needs`, in that order.

    `tile`: it holds a tile in memory, and counts among the tiles in flight. `near_tiles`: it takes no time, and
    megabytes from a tile: it runs in a process that computes tiles.
    """

    function: Callable[..., Any]
    needs: tuple[Key, ...] = ()
    tile: bool = False
    near_tiles: bool = False


Graph = Mapping[Key, Node]
OnDone = Callable[[Key], None]
Proceed = Callable[[Any], bool]


def dask_names(graph: Graph, prefix: str = "") -> dict[Key, str]:
    """Names of the nodes for Dask, which begins nodes of equal standing by name, last first."""
    count = len(graph)
    return {key: f"{prefix}{count - rank:09}" for rank, key in enumerate(graph)}


def ignore(_key: Key) -> None:
    """Does nothing when a node is done."""


class Executor(ABC):
    """Runs graphs; `cancel` ends a run between two nodes. To be closed by leaving its `with` block.

    `most_ahead`: how many tiles may be computed before the one that a sum waits for; None: any number.
    """

    most_ahead: int | None = None

    def __init__(self, cancel: CancelToken | None = None):
        self.cancel = cancel or CancelToken()

    def __enter__(self) -> Executor:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    def run(
        self, graph: Graph, keys: Sequence[Key], on_done: OnDone = ignore, proceed: Proceed | None = None
    ) -> list[Any]:
        """The values of `keys`. Nodes of equal standing begin in the order of the graph.

        `on_done` is called with the key of every node that is done, on any thread. `proceed` is called once with the
        value of the first key, on any thread, while other nodes run; where it returns False, the nodes that have not
        begun are discarded, and the other values are None.

        Raises Stopped where `cancel` is set, else the first error that a node raised, as it was raised; in both cases
        no node runs any more.
        """
        self.cancel.raise_if_set()
        return self._run(graph, keys, on_done, proceed) if keys else []

    @abstractmethod
    def _run(self, graph: Graph, keys: Sequence[Key], on_done: OnDone, proceed: Proceed | None) -> list[Any]: ...

    @abstractmethod
    def collect_profile(self) -> None:
        """Add what other processes have measured since the last call to this process's profiler."""

    def map(
        self, task: Callable[[S], R], specs: Sequence[S], on_done: Callable[[], None] = lambda: None, tile: bool = False
    ) -> list[R]:
        """`task` of every spec, in the order of `specs`. `tile`: every task holds a tile. Raises like `run`."""
        results: list[R] = []
        for first in range(0, len(specs), _BATCH):
            batch = specs[first : first + _BATCH]
            graph = {("task", number): Node(partial(task, spec), (), tile) for number, spec in enumerate(batch)}
            results += self.run(graph, list(graph), lambda _key: on_done())
        return results

    def fold(
        self,
        task: Callable[[S], R],
        specs: Sequence[S],
        combine: Callable[[A, R], A],
        initial: A,
        on_done: Callable[[], None] = lambda: None,
    ) -> A:
        """Combine the results of `task`, which holds a tile, in the order of `specs`. Raises like `run`.

        Only a few results are in memory at once.
        """
        total = initial
        for first in range(0, len(specs), _BATCH):
            batch = specs[first : first + _BATCH]
            graph = {("task", number): Node(partial(task, spec), (), tile=True) for number, spec in enumerate(batch)}
            last = add_sum(graph, ("sum", "task"), len(batch), combine, total, self.most_ahead)
            (total,) = self.run(graph, [last], lambda key: on_done() if key[0] == "task" else None)
        return total


def add_sum(
    graph: dict[Key, Node],
    kinds: tuple[str, str],
    count: int,
    combine: Callable[[Any, Any], Any],
    initial: Any,
    most_ahead: int | None,
) -> Key:
    """Add nodes of kind `kinds[0]` that combine the `count` nodes of kind `kinds[1]` one by one; gives the last key.

    `most_ahead`: as in Executor; of a thousand tiles, the Gram matrices that wait for an earlier one would fill memory.
    """
    kind, parts = kinds
    for number in range(count):
        if number:
            graph[kind, number] = Node(combine, ((kind, number - 1), (parts, number)), near_tiles=True)
        else:
            graph[kind, number] = Node(partial(combine, initial), ((parts, number),), near_tiles=True)
        # an edge back from the sum to a later tile, which then waits for it
        if most_ahead is not None and number + most_ahead < count:
            gate, later = (f"{kind} done", number), (parts, number + most_ahead)
            graph[gate] = Node(
                _no_value, ((kind, number),), near_tiles=True
            )  # the sum itself would be sent to every worker
            node = graph[later]
            graph[later] = Node(partial(_gated, node.function), (*node.needs, gate), node.tile)
    return kind, count - 1


def _no_value(_sum: object) -> None:
    pass


def _gated(function: Callable[..., R], *values: object) -> R:
    *values_of_function, _gate = values
    return function(*values_of_function)
