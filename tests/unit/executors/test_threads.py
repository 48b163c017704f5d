"""The thread executor: results in order whatever finishes first, few of them in memory, and a way to stop."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.cancel import CancelToken
from pipeline.core.errors import Stopped
from pipeline.executors.graph import Node
from pipeline.executors.threads import ThreadExecutor


def sleep_and_give(spec: tuple[float, object]) -> object:
    seconds, value = spec
    time.sleep(seconds)
    return value


def test_results_come_in_the_order_of_the_specs():
    """Tile 3's number in tile 5's place is a wrong picture."""
    specs = [(0.03 if index % 3 == 0 else 0.0, index) for index in range(30)]
    with ThreadExecutor(3) as executor:
        assert executor.map(sleep_and_give, specs) == list(range(30))


@pytest.mark.parametrize("how", ["map", "fold"])
def test_tasks_begin_in_the_order_of_the_specs(how):
    """Neighbouring tiles share the rows of their halos: in a random order a cold disk reads them twice."""
    begun = []
    with ThreadExecutor(1) as executor:
        if how == "map":
            executor.map(begun.append, list(range(1200)))
        else:
            executor.fold(begun.append, list(range(300)), lambda total, _: total, 0)
    assert begun == sorted(begun)


@given(st.lists(st.tuples(st.floats(0, 0.01), st.floats(-1e8, 1e8)), min_size=1, max_size=12), st.integers(1, 4))
@settings(max_examples=30)
def test_a_fold_adds_in_the_order_of_the_specs_whatever_finishes_first(specs, workers):
    """Sums in order of arrival differ in the last bit from run to run, and a resumed picture from an unbroken one."""
    wanted = 0.0
    for _, value in specs:
        wanted = wanted + value
    with ThreadExecutor(workers) as executor:
        assert executor.fold(sleep_and_give, specs, lambda total, value: total + value, 0.0) == wanted


def test_a_fold_of_nothing_is_its_start():
    """A stage without tiles of a kind must not crash."""
    with ThreadExecutor(2) as executor:
        assert executor.fold(sleep_and_give, [], lambda total, value: total + value, 5) == 5
        assert executor.map(sleep_and_give, []) == []


def test_containers_are_data_not_tasks():
    """Dask looks for tasks in tuples and dicts; a spec or result of ours must come through as it is."""
    specs = [(0.0, {"a": (sum, [1, 2])}), (0.0, [(len, "abc")])]
    with ThreadExecutor(2) as executor:
        assert executor.map(sleep_and_give, specs) == [value for _, value in specs]
        total = executor.fold(sleep_and_give, specs, lambda total, value: [*total, value], [(max, 1)])
    assert total == [(max, 1), *(value for _, value in specs)]


def test_tasks_run_beside_each_other_but_no_more_than_workers():
    """One reads while one computes and one writes; more would take more memory than is planned."""
    lock, running, most = threading.Lock(), 0, 0

    def task(_spec: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    with ThreadExecutor(3) as executor:
        executor.map(task, list(range(20)))
    assert most == 3


class Result(np.ndarray):
    """An array that can be counted."""


def test_a_fold_keeps_few_results_alive():
    """A 30,000-px picture has a thousand tiles with 5 MB of Gram matrices each: kept all, they fill the memory."""
    alive: set[int] = set()
    lock, most = threading.Lock(), 0

    def task(index: int) -> Result:
        nonlocal most
        time.sleep(0.002)
        result = np.full(1000, float(index)).view(Result)
        with lock:
            alive.add(index)
            most = max(most, len(alive))
        weakref.finalize(result, alive.discard, index)
        return result

    def combine(total: np.ndarray, result: np.ndarray) -> np.ndarray:
        return total + np.asarray(result)

    with ThreadExecutor(3) as executor:
        total = executor.fold(task, list(range(150)), combine, np.zeros(1000))
    assert total[0] == sum(range(150))
    gc.collect()
    assert most <= 12, f"{most} of 150 results were alive at once"


def test_every_task_reports_once():
    """The progress bar counts these."""
    lock, count = threading.Lock(), 0

    def on_done() -> None:
        nonlocal count
        with lock:
            count += 1

    with ThreadExecutor(3) as executor:
        executor.map(sleep_and_give, [(0.0, index) for index in range(17)], on_done)
        executor.fold(sleep_and_give, [(0.0, 1)] * 5, lambda total, value: total + value, 0, on_done)
    assert count == 22


# --- graphs ---


def test_a_node_gets_the_values_of_the_nodes_it_needs():
    """A gradient computed before the sum of all Grams would belong to no image."""
    graph = {
        ("part", 0): Node(lambda: 2),
        ("part", 1): Node(lambda: 3),
        ("product", 0): Node(lambda a, b: a * b, (("part", 0), ("part", 1))),
        ("power", 0): Node(pow, (("product", 0), ("part", 1))),
    }
    with ThreadExecutor(2) as executor:
        assert executor.run(graph, [("power", 0), ("part", 1)]) == [216, 3]


def test_tiles_and_other_nodes_have_threads_of_their_own():
    """Tiles that wait for the device would keep the update from running; more tiles than planned fill the memory."""
    lock, running, most = threading.Lock(), Counter(), Counter()

    def task(kind: str) -> None:
        with lock:
            running[kind] += 1
            most[kind] = max(most[kind], running[kind])
        time.sleep(0.01)
        with lock:
            running[kind] -= 1

    graph = {("tile", index): Node(partial(task, "tile"), tile=True) for index in range(20)}
    graph |= {("other", index): Node(partial(task, "other")) for index in range(20)}
    with ThreadExecutor(2, others=3) as executor:
        executor.run(graph, list(graph))
    assert most == {"tile": 2, "other": 3}


def test_what_stands_last_in_the_graph_waits_for_the_others():
    """The next iteration's Gram pass must not hold up the gradients that its own iteration still waits for."""
    begun = []
    graph = {("gradient", index): Node(partial(begun.append, "gradient"), tile=True) for index in range(20)}
    graph["next", 0] = Node(lambda _gradient: begun.append("next"), (("gradient", 3),), tile=True)
    with ThreadExecutor(1) as executor:
        executor.run(graph, list(graph))
    assert begun == [*["gradient"] * 20, "next"]


def test_the_rest_is_discarded_where_it_is_not_wanted():
    """A Gram pass for an iteration that does not follow would take half an hour."""
    begun, decided = [], threading.Event()

    def task(index: int, _first: int) -> None:
        begun.append(index)
        assert decided.wait(60)
        time.sleep(0.2)  # meanwhile the executor learns of the decision

    graph = {("first", 0): Node(lambda: 7)}
    graph |= {("later", index): Node(partial(task, index), (("first", 0),), tile=True) for index in range(20)}
    keys = [("first", 0), *(("later", index) for index in range(20))]
    with ThreadExecutor(2) as executor:
        assert executor.run(graph, keys, proceed=lambda value: decided.set())[0] == 7
    assert len(begun) <= 2


# --- stopping and failing ---


@pytest.mark.parametrize("how", ["map", "fold"])
def test_the_stop_flag_ends_the_work_between_two_tasks(how):
    """Ctrl-C must end a run of days within a tile, with no task cut in two."""
    stop, lock = threading.Event(), threading.Lock()
    begun = ended = 0

    def task(index: int) -> int:
        nonlocal begun, ended
        with lock:
            begun += 1
        if index == 5:
            stop.set()
        time.sleep(0.005)
        with lock:
            ended += 1
        return index

    with pytest.raises(Stopped, match="Run the same command again"), ThreadExecutor(2, CancelToken(stop)) as executor:
        if how == "map":
            executor.map(task, list(range(200)))
        else:
            executor.fold(task, list(range(200)), lambda total, value: total + value, 0)
    assert begun == ended < 50


def test_a_stopped_executor_starts_nothing():
    """Stopped before the first task: not even that."""
    ran = []
    with ThreadExecutor(2) as executor:
        executor.cancel.set()
        with pytest.raises(Stopped):
            executor.map(ran.append, [1, 2, 3])
        with pytest.raises(Stopped):
            executor.cancel.raise_if_set()
    assert ran == []


class BrokenError(RuntimeError):
    pass


@pytest.mark.parametrize("how", ["map", "fold"])
def test_what_a_task_raises_comes_out_as_it_is(how):
    """A full disk must end in exit code 5 and its own sentence, not in an error of the scheduler."""

    def task(index: int) -> int:
        if index == 7:
            raise BrokenError("disk 7 is full")
        return index

    with ThreadExecutor(3) as executor:
        with pytest.raises(BrokenError, match="disk 7 is full"):
            if how == "map":
                executor.map(task, list(range(50)))
            else:
                executor.fold(task, list(range(50)), lambda total, value: total + value, 0)
        assert executor.map(sleep_and_give, [(0.0, 1)]) == [1]  # and the executor still works


@pytest.mark.parametrize("how", ["map", "fold"])
def test_an_error_comes_when_nothing_runs_any_more(how):
    """A pass that is tried again, with smaller tiles, must not find the old one's tasks still writing."""
    began, lock, running = threading.Event(), threading.Lock(), 0

    def task(index: int) -> None:
        nonlocal running
        if index == 0:
            assert began.wait(30)
            raise BrokenError
        with lock:
            running += 1
        began.set()
        time.sleep(0.2)
        with lock:
            running -= 1

    with ThreadExecutor(3) as executor:
        with pytest.raises(BrokenError):
            if how == "map":
                executor.map(task, [0, 1, 2, 3, 4])
            else:
                executor.fold(task, [0, 1, 2, 3, 4], lambda total, _: total, None)
        assert running == 0
        assert executor.map(sleep_and_give, [(0.0, 1)]) == [1]


def test_leaving_the_executor_waits_for_running_tasks():
    """A task that still writes after the run has ended would write into the next run's state."""
    started, finished = threading.Event(), threading.Event()

    def task(index: int) -> None:
        if index == 0:
            assert started.wait(30)
            raise BrokenError
        started.set()
        time.sleep(0.2)
        finished.set()

    with pytest.raises(BrokenError), ThreadExecutor(2) as executor:
        executor.map(task, [1, 0])
    assert finished.is_set()
