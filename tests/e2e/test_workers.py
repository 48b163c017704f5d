"""Worker processes: the same bytes as in one process, even when workers die, and no worker outlives its run."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import pipeline
from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError, SpaceError, Stopped
from pipeline.core.events import Event, IterationDone, Note, WorkDone
from pipeline.executors.graph import Node
from pipeline.executors.processes import ProcessExecutor
from pipeline.executors.worker import ALLOWED_DEATHS
from pipeline.images.writer import _libvips_files_in
from pipeline.plan import Device
from pipeline.rundir.process_settings import enter_process_settings
from pipeline.store.array import ChunkError
from tests.support.e2e import TIMEOUT_S, Child, Nursery, canvases, results, write_run

# --- tasks, which the workers import by name --------------------------------------------------------------------------


def double(value: float) -> float:
    return 2 * value


def sleep_and_return(spec: tuple[float, float]) -> float:
    time.sleep(spec[0])
    return spec[1]


def mark(path: Path) -> Path:
    path.touch()
    return path


def mark_slowly(path: Path) -> Path:
    time.sleep(0.02)
    path.touch()
    return path


def mark_late(path: Path, _value: float) -> None:
    time.sleep(0.3)
    path.touch()


def count_lead(total: tuple[int, int], path: Path) -> tuple[int, int]:
    """(how many are combined, by how many the tasks were ahead at most)."""
    combined, largest_lead = total
    return combined + 1, max(largest_lead, len(list(path.parent.iterdir())) - combined)


def give(value: object) -> object:
    return value


def all_of(*_values: object) -> None:
    pass


def location_of(index: int, shared: tuple[np.ndarray, str]) -> tuple[int, int, int, float]:
    """(process, where the shared array and text lie, something that was computed of both)."""
    array, text = shared
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
    """Settings during a task: zarr's threads per call, and the size of libvips' operation cache."""
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


def die_or_wait_for_company(spec: tuple[Path, int]) -> int:
    """Kill this process if its task is the first one; else wait until three processes had tasks."""
    folder, number = spec
    (folder / str(os.getpid())).touch()
    if number == 0 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for(lambda: len(list(folder.iterdir())) == 1 + 3)
    return os.getpid()


def add_or_die(path: Path, total: float, value: float) -> float:
    """Kill this process the first time that five results are combined."""
    if value == 10 and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return total + value


def die(_spec: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- the executor -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def executor() -> Iterator[ProcessExecutor]:
    """Two worker processes for all tests that leave them alive or restart them."""
    with ProcessExecutor(2, 3, initialize=enter_process_settings) as executor:
        yield executor


def workers_of(pid: int | None = None) -> list[psutil.Process]:
    """The living worker processes of a process, this one by default."""
    workers = []
    for process in psutil.Process(pid).children():
        try:
            if any("pipeline.executors.worker" in argument for argument in process.cmdline()):
                workers.append(process)
        except psutil.Error:  # it ended during the scan
            continue
    return [process for process in workers if process.status() != psutil.STATUS_ZOMBIE]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_results_come_in_the_order_of_the_specs(executor):
    """Results of tiles would be swapped, and sums in order of arrival would differ from run to run."""
    specs = [(0.05 if index % 5 == 0 else 0.0, 0.1 * index) for index in range(30)]
    expected = [value for _, value in specs]
    assert executor.map(sleep_and_return, specs, tile=True) == expected
    assert executor.fold(sleep_and_return, specs, lambda total, value: (total + value) / 3, 1.0) == folded(expected)
    assert executor.map(double, [], tile=True) == []
    assert executor.fold(double, [], lambda total, value: total + value, 5.0) == 5.0


def folded(values: list[float]) -> float:
    total = 1.0
    for value in values:
        total = (total + value) / 3
    return total


def test_every_task_reports_once(executor):
    """The progress bar would be wrong: it counts these calls."""
    count = []
    executor.map(double, list(range(17)), lambda: count.append(1), tile=True)
    executor.fold(double, list(range(5)), lambda total, _: total, 0, lambda: count.append(1))
    assert len(count) == 22


def test_a_fold_holds_few_results_in_memory(executor, tmp_path):
    """An image of 30,000 px has a thousand tiles with 5 MB of Gram matrices each: all at once, they fill the memory."""
    paths = [tmp_path / str(index) for index in range(60)]
    combined, largest_lead = executor.fold(mark_slowly, paths, count_lead, (0, 0))
    assert combined == 60
    assert largest_lead <= 2 * (3 + 1)


def test_what_nodes_share_is_sent_to_a_process_once(executor):
    """The checksums and Gram seeds of a pass have megabytes: with each of a thousand tiles they would be most of it."""
    array, text = np.arange(100_000.0), "x" * 100_000
    graph = {("shared", 0): Node(partial(give, (array, text)))}
    graph |= {("place", index): Node(partial(location_of, index), (("shared", 0),), tile=True) for index in range(40)}
    places = executor.run(graph, [("place", index) for index in range(40)])
    assert [value for *_, value in places] == [index + 199_999.0 for index in range(40)]
    assert len({place[:3] for place in places}) <= 2


def test_the_rest_is_discarded_where_it_is_not_wanted(executor, tmp_path):
    """A Gram pass for an iteration that does not follow would take half an hour, and write nothing anybody reads."""
    graph = {("first", 0): Node(partial(double, 1.0))}
    graph |= {("later", index): Node(partial(mark_late, tmp_path / str(index)), (("first", 0),)) for index in range(40)}
    graph["end", 0] = Node(all_of, tuple(("later", index) for index in range(40)))
    assert executor.run(graph, [("first", 0), ("end", 0)], proceed=lambda value: False) == [2.0, None]
    begun = len(list(tmp_path.iterdir()))
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) == begun < 40


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_what_a_task_raises_comes_out_as_it_is(executor, number):
    """A full disk must end in exit code 5 and its own sentence, not in an error of the scheduler."""
    expected = ERRORS[number]
    with pytest.raises(type(expected)) as caught:
        executor.map(fail, [number] * 3, tile=True)
    assert (type(caught.value), str(caught.value)) == (type(expected), str(expected))
    assert executor.map(double, [1.0], tile=True) == [2.0]


def test_a_stop_ends_the_work_and_the_processes():
    """Ctrl-C would take as long as the tasks, or leave processes that still write."""
    stop, others = threading.Event(), set(workers_of())
    with ProcessExecutor(1, 2, CancelToken(stop)) as executor:
        executor.map(double, [1.0], tile=True)
        working = set(workers_of()) - others
        assert len(working) == 1
        threading.Timer(0.3, stop.set).start()
        with pytest.raises(Stopped):
            executor.map(sleep_in, [TIMEOUT_S] * 5, tile=True)
        assert not working & set(workers_of())
        with pytest.raises(Stopped):
            executor.map(double, [1.0], tile=True)
    assert set(workers_of()) == others


def test_tasks_in_workers_find_the_settings_of_the_run(executor):
    """Memory is planned for them, and compressed chunks would be read by ten threads of zarr's own for each of ours."""
    assert set(executor.map(settings_of, [0] * 4, tile=True)) == {(1, 0)}


def test_the_workers_of_a_run_have_the_settings_of_the_run(tmp_path):
    """The executor of the test above is made by the test; that of a run must pass them on too."""

    from pipeline.render.context import executor_for

    config = pipeline.load_config(write_two_stages(tmp_path, workers=1))
    device = Device("cpu", "CPU", 0)
    with executor_for(config, device, (), None, lambda _event: None, CancelToken()) as executor:
        assert set(executor.map(settings_of, [0] * 2, tile=True)) == {(1, 0)}


def test_signals_of_the_terminal_are_for_the_parent(executor):
    """Ctrl-C reaches every process of the terminal: workers that die of it would turn a clean stop into deaths."""
    executor.map(double, [1.0], tile=True)
    before = {process.pid for process in workers_of()}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for pid in before:
            os.kill(pid, number)
    ran_in = set(executor.map(sleep_in, [0.1] * 12, tile=True))
    assert ran_in <= before == {process.pid for process in workers_of()}


def test_the_tasks_of_a_dead_worker_are_repeated(tmp_path):
    """The kernel kills a process when memory runs out: the run must continue, and report it once."""
    notes: list[str] = []
    with ProcessExecutor(1, 3, note=notes.append) as executor:
        specs = [(tmp_path / "died", number) for number in range(12)]
        assert executor.map(die_once, specs, tile=True) == list(range(12))
    assert len(notes) == 1
    assert "SIGKILL" in notes[0]


def test_a_replacement_takes_over_waiting_tiles(tmp_path):
    """Of a pass of hours, all tiles would be left to the surviving workers, while the new one has nothing to do."""
    with ProcessExecutor(2, 1) as executor:
        pids = executor.map(die_or_wait_for_company, [(tmp_path, number) for number in range(20)], tile=True)
    assert len(set(pids)) == 2


def test_an_export_does_not_change_the_environment_of_workers(tmp_path):
    """A worker started during an export would write into the temporary directory that the export deletes."""
    expected = [os.environ.get("TMPDIR")]
    with ProcessExecutor(1, 1) as executor, _libvips_files_in(tmp_path / "levels"):
        assert executor.map(variable, ["TMPDIR"], tile=True) == expected  # as of one that is started anew
        with ProcessExecutor(1, 1) as other:
            assert other.map(variable, ["TMPDIR"], tile=True) == expected
        shell = subprocess.run(["sh", "-c", "echo $TMPDIR"], env=dict(os.environ), capture_output=True, check=True)
        assert shell.stdout.decode().strip() == (expected[0] or "")


def test_a_worker_started_later_has_the_same_environment(monkeypatch):
    """If OMP_NUM_THREADS has changed meanwhile, a replacement worker would round differently."""
    with ProcessExecutor(1, 1) as executor:
        monkeypatch.setenv("OMP_NUM_THREADS", "17")
        assert executor.map(variable, ["OMP_NUM_THREADS"], tile=True) != ["17"]


def test_results_that_died_with_their_worker_are_made_again(tmp_path):
    """A worker holds sums and results that others have computed from tiles; they may be lost at any moment."""
    notes: list[str] = []
    with ProcessExecutor(1, 1, note=notes.append) as executor:
        combine = partial(add_or_die, tmp_path / "died")
        assert executor.fold(double, [float(number) for number in range(10)], combine, 0.0) == 2 * sum(range(10))
    assert len(notes) == 1


def test_a_task_that_kills_its_worker_each_time_ends_the_run():
    """A tile too large for the machine would be repeated for ever."""
    notes: list[str] = []
    with ProcessExecutor(1, 3, note=notes.append) as executor:
        with pytest.raises(ConfigError, match=r"died over the same task.*SIGKILL.*compute\.workers"):
            executor.map(die, [0], tile=True)
        assert ALLOWED_DEATHS <= len(notes) <= ALLOWED_DEATHS + 1  # the last death may be reported by the error alone
        assert executor.map(double, [1.0], tile=True) == [2.0]


def test_workers_that_cannot_start_end_the_run_with_their_output(tmp_path, monkeypatch):
    """With a broken installation, or a limit on processes, the run would wait for ever."""
    broken = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(broken))
    with ProcessExecutor(2, 3) as executor, pytest.raises(ConfigError, match=r"could not be started.*No such file"):
        executor.map(double, [1.0], tile=True)
    broken.write_text("#!/bin/sh\necho no module of that name >&2\nexit 7\n")
    broken.chmod(0o755)
    with ProcessExecutor(2, 3) as executor, pytest.raises(ConfigError, match=r"code 7.*words: no module of that name"):
        executor.map(double, [1.0], tile=True)


def test_without_a_loopback_device_the_run_says_so():
    """In a container without network it waited for 30 s, and called itself a bug."""
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs a network namespace: run as root")
    code = (
        "from pipeline.executors.processes import ProcessExecutor\n"
        "with ProcessExecutor(1, 1) as executor: executor.map(abs, [1], tile=True)"
    )
    command = ["unshare", "-n", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert "ConfigError" in done.stderr and "compute.workers: 0" in done.stderr


# --- the port ---------------------------------------------------------------------------------------------------------


def ports_of(executor: ProcessExecutor) -> list[int]:
    """The ports on which the scheduler and the workers take tasks."""
    info = executor._workers.client.scheduler_info(n_workers=-1)
    addresses = [info["address"], *info["workers"]]
    assert all(address.startswith("tls://127.0.0.1:") for address in addresses)
    return [int(address.rpartition(":")[2]) for address in addresses]


def test_other_programs_are_not_served(executor):
    """The scheduler runs any code it receives: other accounts of a shared machine could run code as this user."""
    executor.map(double, [1.0], tile=True)
    ports = ports_of(executor)
    assert len(ports) == 3  # the scheduler's and two workers'
    stranger = ssl.create_default_context()
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE  # it trusts everybody, and has no key itself
    for port in ports:
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as plain:
            plain.sendall(b"\0" * 64)
            with suppress(ConnectionResetError):
                assert plain.recv(1) in (b"", b"\x15")  # nothing, or TLS' alert
        with (
            socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as plain,
            pytest.raises((ssl.SSLError, ConnectionResetError)),
            stranger.wrap_socket(plain) as connection,
        ):
            assert connection.recv(1) == b"", "greets a stranger"
            raise ConnectionResetError


# --- whole runs -------------------------------------------------------------------------------------------------------

# Two stages, the second of several tiles and chunks. One thread, because kernels round differently with more.
TWO_STAGES: dict[str, Any] = {"initial_size": 55, "optimizer": {"max_iterations": 2}, "output": "out.tif"}


def write_two_stages(folder: Path, **compute: Any) -> Path:
    keys = {"compute": {"threads": 1, **compute}}
    return write_run(folder, (110, 80), (60, 70), **TWO_STAGES, **keys)


@dataclass(frozen=True)
class Unbroken:
    """The result of a run in one process."""

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


# two workers: the next test
@pytest.mark.parametrize("compute", [{"workers": 1}, {"devices": ["cpu"] * 3, "workers": 1}], ids=str)
def test_worker_processes_make_the_same_bytes(tmp_path, unbroken, compute):
    """The output image would depend on the number of processes, or of devices."""
    others = set(workers_of())
    pipeline.run(pipeline.load_config(write_two_stages(tmp_path, **compute)))
    unbroken.assert_same(tmp_path)
    assert set(workers_of()) == others


def test_a_worker_may_die_in_every_pass(tmp_path, unbroken):
    """The death of one process would end days of work, or change the output image."""
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
def test_a_lost_chunk_is_reported_as_such(tmp_path, workers):
    """The failing update stops the concurrent gradient pass: an error about that would not say what to repair."""

    def sink(event: Event) -> None:
        if isinstance(event, IterationDone) and (event.stage, event.iteration) == (1, 0):
            for chunk in (tmp_path / "run" / "store.zarr" / "stage_1" / "m_1").rglob("0"):
                if chunk.is_file():
                    chunk.unlink()

    with pytest.raises(ChunkError, match=r"m_1.*is missing"):
        pipeline.run(pipeline.load_config(write_two_stages(tmp_path, workers=workers)), sink=sink)


def start_until(nursery: Nursery, config: Path, what: str) -> tuple[Child, list[psutil.Process]]:
    """Start a run with worker processes; returns it and its workers once it does `what` in the second stage."""
    child = nursery.start("run", "-c", config, "--log-format", "json")
    assert child.wait_until(
        lambda events: any(event.get("what") == what and event.get("stage") == 1 for event in events)
    ), child.err
    workers = workers_of(child.pid)
    assert len(workers) == 2
    return child, workers


@pytest.mark.parametrize("what", ["canvas", "gradient pass", "update pass"])
def test_workers_die_with_a_killed_run_and_it_resumes_at_once(tmp_path, unbroken, nursery, what):
    """A worker that outlives its run would write chunks of an old iteration into the resumed run."""
    config = write_two_stages(tmp_path, workers=2)
    child, workers = start_until(nursery, config, what)
    child.kill()
    # without waiting for the workers, which the lock does; in one process, which reaches the state sooner than others
    again = nursery.run("run", "-c", config, "--set", "compute.workers=0", "--log-format", "json")
    assert again.wait() == 0, again.err
    for process in workers:
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    unbroken.assert_same(tmp_path)


def test_ctrl_c_stops_a_run_with_workers_cleanly(tmp_path, unbroken, nursery):
    """The signal reaches the workers too: the run would report deaths, leave workers behind, or not resume."""
    config = write_two_stages(tmp_path, workers=2)
    child, workers = start_until(nursery, config, "gradient pass")
    for pid in (*(process.pid for process in workers), child.pid):
        os.kill(pid, signal.SIGINT)
    assert child.wait() == 75, child.err
    assert "died" not in child.err
    assert all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in workers)
    assert nursery.run("run", "-c", config, "--set", "compute.workers=0").wait() == 0
    unbroken.assert_same(tmp_path)


def test_a_resume_uses_the_number_of_threads_of_the_first_start(tmp_path, monkeypatch):
    """Kernels round differently with another number of threads: resumed on another machine, the bytes would differ."""
    stopped, other = tmp_path / "stopped", tmp_path / "other"
    keys = {**TWO_STAGES, "network": {"name": "vgg19-lite"}}
    stop = threading.Event()

    def stop_in_second_stage(event: Event) -> None:
        if isinstance(event, WorkDone) and event.stage == 1 and event.what == "update pass":
            stop.set()

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    unbroken = write_run(tmp_path / "unbroken", (110, 80), (60, 70), **keys)
    pipeline.run(pipeline.load_config(unbroken))
    config = write_run(stopped, (110, 80), (60, 70), **keys)
    with pytest.raises(Stopped):
        pipeline.run(pipeline.load_config(config), sink=stop_in_second_stage, stop=stop)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    pipeline.run(pipeline.load_config(config))
    pipeline.run(pipeline.load_config(write_run(other, (110, 80), (60, 70), **keys)))
    assert canvases(stopped / "run") == canvases(tmp_path / "unbroken" / "run")
    assert canvases(other / "run") != canvases(stopped / "run")  # otherwise this test would prove nothing
