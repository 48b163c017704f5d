"""The engine: results in order whatever the order of arrival, little in memory, and a way to stop."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.cancel import CancelToken
from pipeline.core.errors import Stopped
from pipeline.executors.threads import Engine


def sleep_and_give(spec: tuple[float, object]) -> object:
    seconds, value = spec
    time.sleep(seconds)
    return value


def test_results_come_in_the_order_of_the_specs():
    """Tile 3's number in tile 5's place is a wrong picture."""
    specs = [(0.03 if index % 3 == 0 else 0.0, index) for index in range(30)]
    with Engine(3) as engine:
        assert engine.map(sleep_and_give, specs) == list(range(30))


@pytest.mark.parametrize("how", ["map", "fold"])
def test_tasks_begin_in_the_order_of_the_specs(how):
    """Neighbouring tiles share the rows of their halos: in a random order a cold disk reads them twice."""
    begun = []
    with Engine(1) as engine:
        if how == "map":
            engine.map(begun.append, list(range(1200)))
        else:
            engine.fold(begun.append, list(range(300)), lambda total, _: total, 0)
    assert begun == sorted(begun)


@given(st.lists(st.tuples(st.floats(0, 0.01), st.floats(-1e8, 1e8)), min_size=1, max_size=12), st.integers(1, 4))
@settings(max_examples=30)
def test_a_fold_adds_in_the_order_of_the_specs_whatever_finishes_first(specs, workers):
    """Sums in order of arrival differ in the last bit from run to run, and a resumed picture from an unbroken one."""
    wanted = 0.0
    for _, value in specs:
        wanted = wanted + value
    with Engine(workers) as engine:
        assert engine.fold(sleep_and_give, specs, lambda total, value: total + value, 0.0) == wanted


def test_a_fold_of_nothing_is_its_start():
    """A stage without tiles of a kind must not crash."""
    with Engine(2) as engine:
        assert engine.fold(sleep_and_give, [], lambda total, value: total + value, 5) == 5
        assert engine.map(sleep_and_give, []) == []


def test_containers_are_data_not_tasks():
    """Dask looks for tasks in tuples and dicts; a spec or result of ours must come through as it is."""
    specs = [(0.0, {"a": (sum, [1, 2])}), (0.0, [(len, "abc")])]
    with Engine(2) as engine:
        assert engine.map(sleep_and_give, specs) == [value for _, value in specs]
        total = engine.fold(sleep_and_give, specs, lambda total, value: [*total, value], [(max, 1)])
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

    with Engine(3) as engine:
        engine.map(task, list(range(20)))
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

    with Engine(3) as engine:
        total = engine.fold(task, list(range(150)), combine, np.zeros(1000))
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

    with Engine(3) as engine:
        engine.map(sleep_and_give, [(0.0, index) for index in range(17)], on_done)
        engine.fold(sleep_and_give, [(0.0, 1)] * 5, lambda total, value: total + value, 0, on_done)
    assert count == 22


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

    with pytest.raises(Stopped, match="run the same command again"), Engine(2, CancelToken(stop)) as engine:
        if how == "map":
            engine.map(task, list(range(200)))
        else:
            engine.fold(task, list(range(200)), lambda total, value: total + value, 0)
    assert begun == ended < 50


def test_a_stopped_engine_starts_nothing():
    """Stopped before the first task: not even that."""
    ran = []
    with Engine(2) as engine:
        engine.cancel.set()
        with pytest.raises(Stopped):
            engine.map(ran.append, [1, 2, 3])
        with pytest.raises(Stopped):
            list(engine.checked([1]))
        with pytest.raises(Stopped):
            engine.cancel.raise_if_set()
    assert ran == []


def test_checked_items_stop_between_two():
    """Reading a large image is stopped between two bands."""
    seen = []
    with Engine(1) as engine, pytest.raises(Stopped):
        for item in engine.checked(range(10)):
            seen.append(item)
            if item == 3:
                engine.cancel.set()
    assert seen == [0, 1, 2, 3]


class BrokenError(RuntimeError):
    pass


@pytest.mark.parametrize("how", ["map", "fold"])
def test_what_a_task_raises_comes_out_as_it_is(how):
    """A full disk must end in exit code 5 and its own sentence, not in an error of the scheduler."""

    def task(index: int) -> int:
        if index == 7:
            raise BrokenError("disk 7 is full")
        return index

    with Engine(3) as engine:
        with pytest.raises(BrokenError, match="disk 7 is full"):
            if how == "map":
                engine.map(task, list(range(50)))
            else:
                engine.fold(task, list(range(50)), lambda total, value: total + value, 0)
        assert engine.map(sleep_and_give, [(0.0, 1)]) == [1]  # and the engine still works


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

    with Engine(3) as engine:
        with pytest.raises(BrokenError):
            if how == "map":
                engine.map(task, [0, 1, 2, 3, 4])
            else:
                engine.fold(task, [0, 1, 2, 3, 4], lambda total, _: total, None)
        assert running == 0
        assert engine.map(sleep_and_give, [(0.0, 1)]) == [1]


@pytest.mark.parametrize("how", ["map", "fold"])
@pytest.mark.parametrize("where", ["task", "after"])
def test_an_error_releases_the_tasks_that_wait(how, where):
    """A full disk would be told only when the pass that they wait for has come so far: minutes, or never."""
    waiting, released, told = threading.Barrier(3), threading.Event(), []

    class ReleasedError(Exception):
        """Follows from the error."""

    def before(index: int) -> int:
        waiting.wait(60)
        if index:
            assert released.wait(60)
            raise ReleasedError
        return index

    def task(index: int) -> int:
        if where == "task":
            raise BrokenError("disk full")
        return index

    def fail(*_: object) -> int:
        raise BrokenError("disk full")

    def on_error() -> None:
        told.append(1)
        released.set()
        time.sleep(0.2)  # meanwhile dask hears of the others

    with Engine(3) as engine, pytest.raises(BrokenError, match="disk full"):
        if how == "map":
            engine.map(task, [0, 1, 2], before=before, after=fail, on_error=on_error)
        else:
            engine.fold(task, [0, 1, 2], fail, 0, before=before, on_error=on_error)
    assert told == [1]


def test_leaving_the_engine_waits_for_running_tasks():
    """A task that still writes after the run has ended would write into the next run's state."""
    started, finished = threading.Event(), threading.Event()

    def task(index: int) -> None:
        if index == 0:
            assert started.wait(30)
            raise BrokenError
        started.set()
        time.sleep(0.2)
        finished.set()

    with pytest.raises(BrokenError), Engine(2) as engine:
        engine.map(task, [1, 0])
    assert finished.is_set()
