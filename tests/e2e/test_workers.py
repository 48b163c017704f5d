"""Worker processes: the same bytes as in one process, also when they die, and none left when the run ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import pipeline
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError, SpaceError, Stopped
from pipeline.core.events import Event, IterationDone, Note, WorkDone
from pipeline.executors.processes import ProcessEngine
from pipeline.executors.worker import ALLOWED_DEATHS
from pipeline.images.writer import _libvips_files_in
from pipeline.store.array import ChunkError
from tests.support.e2e import TIMEOUT_S, Child, Nursery, canvases, results, write_run

# --- tasks: found by name in the workers ------------------------------------------------------------------------------


def double(value: float) -> float:
    return 2 * value


def sleep_and_give(spec: tuple[float, float]) -> float:
    time.sleep(spec[0])
    return spec[1]


def mark(path: Path) -> Path:
    path.touch()
    return path


def place_of(spec: tuple[int, np.ndarray, str]) -> tuple[int, int, int, float]:
    """(process, where its array and text lie, something that was computed of both)."""
    index, array, text = spec
    return os.getpid(), id(array), id(text), index + float(array[-1]) + len(text)


def sleep_in(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


ERRORS = [
    ConfigError("wrong key"),
    SpaceError("disk full"),
    ChunkError(Path("/a/b"), "changed", "is not what was written there"),
    TimeoutError("of the task itself"),
]


def variable(name: str) -> str | None:
    return os.environ.get(name)


def settings_of(_spec: int) -> tuple[int, int]:
    """What a task computes under: zarr's threads for one call, and what libvips keeps of operations."""
    import pyvips
    import zarr

    return zarr.config.get("async.concurrency"), pyvips.cache_get_max()


def fail(number: int) -> None:
    raise ERRORS[number]


def fail_or_mark(path: Path | None) -> None:
    if path is None:
        raise ConfigError("wrong key")
    time.sleep(1)
    path.touch()


def die_once(spec: tuple[Path, int]) -> int:
    """Kill this process the first time that task 3 runs."""
    path, number = spec
    if number == 3 and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(_spec: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Iterator[ProcessEngine]:
    """Two processes for all tests that leave them alive, or have them made anew."""
    with ProcessEngine(2, 3) as engine:
        yield engine


def workers_of(pid: int | None = None) -> list[psutil.Process]:
    """The living worker processes of a process, this one by default."""
    found = []
    for process in psutil.Process(pid).children():
        try:
            if any("pipeline.executors.worker" in argument for argument in process.cmdline()):
                found.append(process)
        except psutil.Error:  # it ended while we looked
            continue
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_results_come_in_the_order_of_the_specs(engine):
    """Tile 3's number in tile 5's place is a wrong picture; sums in order of arrival differ from run to run."""
    specs = [(0.05 if index % 5 == 0 else 0.0, 0.1 * index) for index in range(30)]
    wanted = [value for _, value in specs]
    assert engine.map(sleep_and_give, specs) == wanted
    assert engine.fold(sleep_and_give, specs, lambda total, value: (total + value) / 3, 1.0) == folded(wanted)
    assert engine.map(double, []) == []
    assert engine.fold(double, [], lambda total, value: total + value, 5.0) == 5.0


def folded(values: list[float]) -> float:
    total = 1.0
    for value in values:
        total = (total + value) / 3
    return total


def test_every_task_reports_once(engine):
    """The progress bar counts these."""
    count = []
    engine.map(double, list(range(17)), lambda: count.append(1))
    engine.fold(double, list(range(5)), lambda total, _: total, 0, lambda: count.append(1))
    assert len(count) == 22


def test_a_pass_may_wait_for_another_beside_it(engine):
    """The next Gram pass follows the update through the picture; a tile that is read too early has old rows."""
    written: set[float] = set()
    condition = threading.Condition()

    def add(value: float) -> None:
        with condition:
            written.add(value)
            condition.notify_all()

    def wait_for_spec(spec: tuple[float, float]) -> tuple[float, float]:
        with condition:
            assert condition.wait_for(lambda: 2 * spec[1] in written, TIMEOUT_S)
        return spec[0], -spec[1]

    values = [float(index) for index in range(30)]
    update = engine.beside(lambda beside: beside.map(double, values, after=add))
    gram = engine.fold(
        sleep_and_give, [(0.01, value) for value in values], lambda a, b: a + b, 0.0, before=wait_for_spec
    )
    assert gram == -sum(values)
    assert update.result(TIMEOUT_S) == [2 * value for value in values]


@pytest.mark.parametrize("how", ["map", "fold"])
def test_an_error_releases_the_tasks_that_wait(how):
    """A full disk would be told only when the pass that they wait for has come so far: minutes, or never."""
    released = threading.Event()

    def before(number: int) -> int:
        if number:
            assert released.wait(TIMEOUT_S)
            raise RuntimeError("follows from the error")
        return number

    with ProcessEngine(1, 2) as engine, pytest.raises(ConfigError, match="wrong key"):
        if how == "map":
            engine.map(fail, [0, 1], before=before, on_error=released.set)
        else:
            engine.fold(fail, [0, 1], lambda total, _: total, 0, before=before, on_error=released.set)


def test_an_error_leaves_the_pass_beside_it_alone(tmp_path):
    """A Gram pass that fails, or is not needed, must not cost the update that is being committed."""
    notes: list[str] = []
    with ProcessEngine(1, 2, note=notes.append) as engine:
        values = [float(index) for index in range(20)]
        update = engine.beside(lambda beside: beside.map(sleep_and_give, [(0.05, value) for value in values]))
        with pytest.raises(ConfigError, match="wrong key"):
            engine.map(fail_or_mark, [None, *(tmp_path / str(index) for index in range(5))])
        begun = len(list(tmp_path.iterdir()))
        assert update.result(TIMEOUT_S) == values
        assert len(list(tmp_path.iterdir())) == begun  # what was cut off is not done again
    assert notes == []


def test_a_fold_keeps_few_results_waiting(engine, tmp_path):
    """A picture of 30,000 px has a thousand tiles with 5 MB of Gram matrices each: kept all, they fill the memory."""
    begun = []

    def combine(total: int, _path: Path) -> int:
        if total == 0:
            time.sleep(1)  # meanwhile the workers could do all the others
            begun.append(len(list(tmp_path.iterdir())))
        return total + 1

    assert engine.fold(mark, [tmp_path / str(index) for index in range(60)], combine, 0) == 60
    assert begun[0] <= 2 * (3 + 1)


def test_what_specs_share_is_sent_to_a_process_once(engine):
    """The Gram seeds of a pass are 5 MB: with each of a thousand tiles they would be most of the work."""
    array, text = np.arange(100_000.0), "x" * 100_000
    found = engine.map(place_of, [(index, array, text) for index in range(40)])
    assert [value for *_, value in found] == [index + 199_999.0 for index in range(40)]
    assert len({place[:3] for place in found}) <= 2


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_what_a_task_raises_comes_out_as_it_is(engine, number):
    """A full disk must end in exit code 5 and its own sentence, not in an error of the scheduler."""
    wanted = ERRORS[number]
    with pytest.raises(type(wanted)) as caught:
        engine.map(fail, [number] * 3)
    assert (type(caught.value), str(caught.value)) == (type(wanted), str(wanted))
    assert engine.map(double, [1.0]) == [2.0]


def test_a_stop_ends_the_work_and_the_processes():
    """Ctrl-C must end a run of days within a moment, and leave no process that still writes."""
    stop, others = threading.Event(), set(workers_of())
    with ProcessEngine(1, 2, CancelToken(stop)) as engine:
        engine.map(double, [1.0])
        working = set(workers_of()) - others
        assert len(working) == 1
        threading.Timer(0.3, stop.set).start()
        with pytest.raises(Stopped):
            engine.map(sleep_in, [TIMEOUT_S] * 5)
        assert not working & set(workers_of())
        with pytest.raises(Stopped):
            engine.map(double, [1.0])
    assert set(workers_of()) == others


def test_tasks_in_workers_find_the_settings_of_the_run(engine):
    """Memory is planned for them, and compressed chunks would be read by ten threads of zarr's own for each of ours."""
    assert set(engine.map(settings_of, [0] * 4)) == {(1, 0)}


def test_signals_of_the_terminal_are_for_the_parent(engine):
    """Ctrl-C reaches every process of the terminal: workers that die of it would turn a clean stop into deaths."""
    engine.map(double, [1.0])
    before = {process.pid for process in workers_of()}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for pid in before:
            os.kill(pid, number)
    ran_in = set(engine.map(sleep_in, [0.1] * 12))
    assert ran_in <= before == {process.pid for process in workers_of()}


def test_a_dead_workers_tasks_are_done_again(tmp_path):
    """The system kills a process when memory runs out; the run goes on, and says so once."""
    notes: list[str] = []
    with ProcessEngine(1, 3, note=notes.append) as engine:
        specs = [(tmp_path / "died", number) for number in range(12)]
        assert engine.map(die_once, specs) == list(range(12))
    assert len(notes) == 1
    assert "SIGKILL" in notes[0]


def test_an_export_changes_no_workers_environment(tmp_path):
    """A worker that is started during an export would have its files in a folder that is removed with the export."""
    wanted = [os.environ.get("TMPDIR")]
    with ProcessEngine(1, 1) as engine, _libvips_files_in(tmp_path / "levels"):
        assert engine.map(variable, ["TMPDIR"]) == wanted  # as of one that is started anew
        with ProcessEngine(1, 1) as other:
            assert other.map(variable, ["TMPDIR"]) == wanted
        told = subprocess.run(["sh", "-c", "echo $TMPDIR"], env=dict(os.environ), capture_output=True, check=True)
        assert told.stdout.decode().strip() == (wanted[0] or "")


def test_a_worker_that_is_started_later_has_the_same_environment(monkeypatch):
    """With OMP_NUM_THREADS changed meanwhile, a worker that takes a dead one's place would round otherwise."""
    with ProcessEngine(1, 1) as engine:
        monkeypatch.setenv("OMP_NUM_THREADS", "17")
        assert engine.map(variable, ["OMP_NUM_THREADS"]) != ["17"]


def test_results_that_died_with_their_worker_are_made_again(tmp_path):
    """A worker keeps what it has computed until it is fetched, and the seeds of the pass; both may be lost."""
    array = np.arange(100_000.0)
    notes: list[str] = []
    with ProcessEngine(1, 1, note=notes.append) as engine:
        killed = []

        def combine(total: float, place: tuple[int, int, int, float]) -> float:
            if not killed:
                killed.append(place[0])
                time.sleep(0.5)  # the next results are there, and not fetched
                os.kill(place[0], signal.SIGKILL)
            return total + place[3]

        specs = [(index, array, "") for index in range(10)]
        assert engine.fold(place_of, specs, combine, 0.0) == sum(range(10)) + 10 * 99_999.0
    assert len(notes) == 1


def test_a_task_that_kills_its_worker_each_time_ends_the_run():
    """A tile too large for the machine would otherwise go round for ever."""
    notes: list[str] = []
    with ProcessEngine(1, 3, note=notes.append) as engine:
        with pytest.raises(ConfigError, match=r"died over the same task.*SIGKILL.*compute\.workers"):
            engine.map(die, [0])
        assert ALLOWED_DEATHS <= len(notes) <= ALLOWED_DEATHS + 1  # the last may be told by the error alone
        assert engine.map(double, [1.0]) == [2.0]


def test_workers_that_cannot_start_end_the_run_with_their_last_words(tmp_path, monkeypatch):
    """A broken installation or a limit on processes must not be a run that waits for ever."""
    broken = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(broken))
    with ProcessEngine(2, 3) as engine, pytest.raises(ConfigError, match=r"could not be started.*No such file"):
        engine.map(double, [1.0])
    broken.write_text("#!/bin/sh\necho no module of that name >&2\nexit 7\n")
    broken.chmod(0o755)
    with ProcessEngine(2, 3) as engine, pytest.raises(ConfigError, match=r"code 7.*words: no module of that name"):
        engine.map(double, [1.0])


# --- the port ---------------------------------------------------------------------------------------------------------

CONNECT = """
import os, socket, sys
user, port = map(int, sys.argv[1:])
os.setuid(user)
connection = socket.socket()
connection.settimeout(30)
connection.connect(("127.0.0.1", port))
try:
    print(len(connection.recv(1)))
except ConnectionResetError:
    print(0)
"""


def listening_ports() -> list[int]:
    """The ports on which this process and its workers understand distributed."""
    connections = [
        connection for process in (psutil.Process(), *workers_of()) for connection in process.net_connections()
    ]
    listening = [connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    return [address.port for address in listening if greets(address.port)]


def greets(port: int) -> bool:
    """Whether the first word is the server's: a web server waits for ours."""
    with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        try:
            return connection.recv(1) != b""
        except TimeoutError:
            return False


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
def test_other_users_of_the_machine_are_not_served(engine):
    """A scheduler runs what it is sent: any account on a shared machine could run code as us."""
    engine.map(double, [1.0])
    ports = listening_ports()
    assert len(ports) == 3  # the scheduler's and two workers'
    for port in ports:
        told = [
            subprocess.run(
                [sys.executable, "-c", CONNECT, str(user), str(port)], capture_output=True, text=True, check=True
            ).stdout
            for user in (0, 65534)
        ]
        assert told == ["1\n", "0\n"]


# --- whole runs -------------------------------------------------------------------------------------------------------

# Two stages, the second of several tiles and chunks; one thread, so that workers and cores make no difference.
TWO_STAGES: dict[str, Any] = {"initial_size": 55, "optimizer": {"max_iterations": 2}, "output": "out.tif"}


def write_two_stages(folder: Path, **compute: Any) -> Path:
    keys = {"compute": {"threads": 1, **compute}}
    return write_run(folder, (110, 80), (60, 70), **TWO_STAGES, **keys)


@dataclass(frozen=True)
class Unbroken:
    """A run in one process."""

    picture: bytes
    canvases: dict[str, bytes]
    results: list[dict[str, Any]]

    def assert_same(self, folder: Path) -> None:
        assert results(folder / "run") == self.results
        assert (folder / "out.tif").read_bytes() == self.picture
        assert canvases(folder / "run") == self.canvases


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Unbroken:
    folder = tmp_path_factory.mktemp("unbroken")
    pipeline.run(pipeline.load_config(write_two_stages(folder)))
    return Unbroken((folder / "out.tif").read_bytes(), canvases(folder / "run"), results(folder / "run"))


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_make_the_same_bytes(tmp_path, unbroken, workers):
    """Choosing the number of processes must not choose the picture."""
    others = set(workers_of())
    pipeline.run(pipeline.load_config(write_two_stages(tmp_path, workers=workers)))
    unbroken.assert_same(tmp_path)
    assert set(workers_of()) == others


def test_a_worker_may_die_in_every_pass(tmp_path, unbroken):
    """Days of work must not hang on one process; nor may its death be seen in the picture."""
    killed: list[str] = []
    notes: list[str] = []
    others = workers_of()

    def sink(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.message)
        elif isinstance(event, WorkDone) and event.stage == 1 and event.what not in (*killed, "check", "export"):
            ours = [process for process in workers_of() if process not in others]
            for oldest in sorted(ours, key=lambda process: process.create_time())[:1]:
                killed.append(event.what)
                oldest.kill()

    pipeline.run(pipeline.load_config(write_two_stages(tmp_path, workers=2)), sink=sink)
    unbroken.assert_same(tmp_path)
    assert {"style Gram", "canvas", "content features", "Gram pass", "gradient pass", "update pass"} <= set(killed)
    assert len([note for note in notes if "died" in note or "killed" in note]) == len(killed)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_chunk_that_is_lost_is_told_as_such(tmp_path, workers):
    """The update that fails over it stops the gradients beside it: told of them, nobody would know what to mend."""

    def sink(event: Event) -> None:
        if isinstance(event, IterationDone) and (event.stage, event.iteration) == (1, 0):
            for chunk in (tmp_path / "run" / "store.zarr" / "stage_1" / "m_1").rglob("0"):
                if chunk.is_file():
                    chunk.unlink()

    with pytest.raises(ChunkError, match=r"m_1.*is missing"):
        pipeline.run(pipeline.load_config(write_two_stages(tmp_path, workers=workers)), sink=sink)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


def start_until(nursery: Nursery, config: Path, what: str) -> tuple[Child, list[psutil.Process]]:
    """A run with worker processes that has begun `what` in the second stage, and its workers."""
    child = nursery.start("run", "-c", config, "--log-format", "json")
    assert child.wait_until(
        lambda events: any(event.get("what") == what and event.get("stage") == 1 for event in events)
    ), child.err
    found = workers_of(child.pid)
    assert len(found) == 2
    return child, found


@pytest.mark.parametrize("what", ["canvas", "gradient pass", "update pass"])
def test_workers_die_with_a_killed_run_and_it_goes_on_at_once(tmp_path, unbroken, nursery, what):
    """A worker that outlives its run would write an old iteration's chunks into the run that goes on."""
    config = write_two_stages(tmp_path, workers=2)
    child, found = start_until(nursery, config, what)
    child.kill()
    again = nursery.run("run", "-c", config, "--log-format", "json")  # no wait for the workers: the lock does that
    assert again.wait() == 0, again.err
    for process in found:
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    unbroken.assert_same(tmp_path)


def test_ctrl_c_stops_a_run_with_workers_cleanly(tmp_path, unbroken, nursery):
    """It reaches the workers too; the run must stop with its own code, leave none of them, and go on as ever."""
    config = write_two_stages(tmp_path, workers=2)
    child, found = start_until(nursery, config, "gradient pass")
    for pid in (*(process.pid for process in found), child.pid):
        os.kill(pid, signal.SIGINT)
    assert child.wait() == 75, child.err
    assert "died" not in child.err
    assert all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in found)
    assert nursery.run("run", "-c", config).wait() == 0
    unbroken.assert_same(tmp_path)


def test_a_run_keeps_the_threads_that_it_began_with(tmp_path, monkeypatch):
    """Kernels round otherwise with another number of threads: resumed on another machine, the bytes would differ."""
    begun, other = tmp_path / "begun", tmp_path / "other"
    keys = {**TWO_STAGES, "network": {"name": "vgg19-lite"}}
    stop = threading.Event()

    def stop_in_second_stage(event: Event) -> None:
        if isinstance(event, WorkDone) and event.stage == 1 and event.what == "update pass":
            stop.set()

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    wanted = write_run(tmp_path / "unbroken", (110, 80), (60, 70), **keys)
    pipeline.run(pipeline.load_config(wanted))
    config = write_run(begun, (110, 80), (60, 70), **keys)
    with pytest.raises(Stopped):
        pipeline.run(pipeline.load_config(config), sink=stop_in_second_stage, stop=stop)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    pipeline.run(pipeline.load_config(config))
    pipeline.run(pipeline.load_config(write_run(other, (110, 80), (60, 70), **keys)))
    assert canvases(begun / "run") == canvases(tmp_path / "unbroken" / "run")
    assert canvases(other / "run") != canvases(begun / "run")  # or this test would show nothing
