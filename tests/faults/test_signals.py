"""Ctrl-C, TERM and HUP, once and twice, in every phase of a run. The signals are sent at exact system calls."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.support.e2e import PIPELINE, TIMEOUT_S, Child, Nursery, leftovers, write_picture
from tests.support.syscalls import Answer, Call, Verdict, Watch, supported
from tests.support.torture import Ending, damage, places, start, write_variant

pytestmark = pytest.mark.skipif(not supported(), reason="needs Linux on x86-64 with seccomp's user notification")

# The first call of each phase: its name, and how its path begins.
PHASES = {
    "hashing the inputs": ("read", "content.png"),
    "beginning the run": ("write", "run/manifest.json.partial"),
    "making the arrays": ("fallocate", "run/store.zarr/stage_0.partial/"),
    "reading the content": ("pwrite64", "run/store.zarr/stage_0.partial/content/"),
    "reading a style": ("pwrite64", "run/store.zarr/stage_0.partial/style/"),
    "style statistics": ("preadv2", "run/store.zarr/stage_0.partial/style/"),
    "content features": ("pwrite64", "run/store.zarr/stage_0.partial/features_"),
    "deleting arrays": ("unlinkat", "run/store.zarr/stage_0/"),
    "enlarging the canvas": ("pwrite64", "run/store.zarr/stage_1.partial/canvas_0/"),
    "checking": ("preadv2", "run/store.zarr/stage_0/canvas_0/"),
    "Gram pass": ("preadv2", "run/store.zarr/stage_1/canvas_0/"),
    "gradient pass": ("pwrite64", "run/store.zarr/stage_1/gradient/"),
    "update pass": ("pwrite64", "run/store.zarr/stage_1/canvas_1/"),
    "exporting": ("write", ".out.partial"),
}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # as the nursery's runs: with more of them, sums round otherwise
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SOON_S = 5  # until a run stops after a signal; a tile takes 0.05 s here


@pytest.fixture(scope="module")
def whole_run(nursery, tmp_path_factory) -> tuple[Ending, float]:
    """The result of an uninterrupted run, and its duration in seconds."""
    config, started = write_variant(tmp_path_factory.mktemp("unbroken") / "run", "tiff"), time.monotonic()
    assert start(nursery, config).wait() == 0
    return Ending.of(config), time.monotonic() - started


@pytest.fixture(scope="module")
def unbroken(whole_run) -> Ending:
    return whole_run[0]


class Moment:
    """Calls `do` at a run's first system call of a phase, and counts the calls of that kind from then on.

    That call waits meanwhile; with `hangs`, it and those of its kind do not return at all. `seconds`: from that moment
    to the run's end.
    """

    def __init__(self, phase: tuple[str, str], do: Callable[[Child], None], hangs: bool = False):
        self.reached = False
        self.calls_since = 0
        self.seconds = 0.0
        self._name, self._path = phase
        self._do = do
        self._hangs = hangs
        self._child: Child | None = None
        self._started = threading.Event()
        self._at = 0.0

    def start(self, nursery: Nursery, config: Path) -> Child:
        watch = Watch(config.parent, self._judge, reads=True)
        self._child = start(nursery, config, watch=watch)
        self._started.set()
        self._child.wait()
        self.seconds = time.monotonic() - self._at
        watch.wait()
        return self._child

    def _judge(self, call: Call) -> Answer:
        if call.name != self._name or not call.path.startswith(self._path):
            return Verdict.GO
        self.calls_since += 1
        if self.reached:
            return Verdict.HOLD if self._hangs else Verdict.GO
        self.reached, done = True, threading.Event()
        threading.Thread(target=self._act, args=(done,), daemon=True).start()
        return Verdict.HOLD if self._hangs else done

    def _act(self, done: threading.Event) -> None:
        assert self._started.wait(TIMEOUT_S) and self._child is not None
        self._at = time.monotonic()
        self._do(self._child)
        done.set()


def deliver(child: Child, number: int) -> None:
    """Send a signal, and wait until the run has heard it: a second one would be lost in the first, and on a busy
    machine the run would be over before its listener has its turn.
    """
    child.signal(number)
    wait_until(lambda: "interrupt again to abort" in child.err or not status_of(child))


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.001)


def status_of(child: Child) -> dict[str, str]:
    """The fields of /proc/PID/status; empty once the process has ended."""
    try:
        lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
    except OSError:
        return {}
    status = dict(line.split(":\t", 1) for line in lines)
    return {} if status["State"].startswith("Z") else {key: value.strip() for key, value in status.items()}


@pytest.mark.parametrize("phase", PHASES)
def test_one_signal_stops_in_every_phase(nursery, whole_run, tmp_path, phase):
    """A run stops soon after a signal, with its exit code, and can be resumed."""
    unbroken, whole_run_s = whole_run
    number = SIGNALS[list(PHASES).index(phase) % len(SIGNALS)]
    config = write_variant(tmp_path / "run", "tiff")
    moment = Moment(PHASES[phase], lambda child: deliver(child, number))
    child = moment.start(nursery, config)
    assert moment.reached
    assert child.wait() == 75, child.err
    assert moment.seconds < max(SOON_S, whole_run_s)  # a machine that is busy is given the time that it takes for all
    assert "Run the same command again" in child.err and "Traceback" not in child.err
    work_dir, output = places(config)
    assert not output.exists() and leftovers(output) == []
    assert damage(work_dir) == []
    assert start(nursery, config).wait() == 0
    assert unbroken.differences(Ending.of(config)) == []


@pytest.mark.parametrize("phase", PHASES)
def test_a_second_signal_ends_at_once_in_every_phase(nursery, whole_run, tmp_path, phase):
    """An abort does not wait for a slow disk or for a tile, which may take minutes."""
    number = SIGNALS[list(PHASES).index(phase) % len(SIGNALS)]
    config = write_variant(tmp_path / "run", "tiff")

    def twice(child: Child) -> None:
        deliver(child, number)
        deliver(child, number)

    moment = Moment(PHASES[phase], twice, hangs=True)
    child = moment.start(nursery, config)
    assert child.wait() == 128 + number, child.err
    assert moment.seconds < max(SOON_S, whole_run[1])
    assert damage(places(config)[0]) == []


@pytest.mark.parametrize("variant", ["tiff", "deepzoom", "ome-zarr", "power"])
def test_a_stop_while_exporting_leaves_nothing_in_any_format(nursery, tmp_path, variant):
    """A stop during the export ends soon and leaves no temporary files."""
    config = write_variant(tmp_path / "run", variant)
    name = "openat" if variant in ("deepzoom", "ome-zarr") else "write"
    moment = Moment((name, ".out.partial"), lambda child: deliver(child, signal.SIGTERM))
    assert moment.start(nursery, config).wait() == 75
    _, output = places(config)
    assert not output.exists() and leftovers(output) == []


def test_a_stop_ends_the_reading_of_a_large_picture(nursery, tmp_path):
    """Decoding ten gigapixels for a stage of 160 px takes minutes before the first row; a stop must not wait for it."""
    config = write_variant(tmp_path / "run", "tiff")
    write_picture(config.parent / "content.png", 3000, 3000)
    decoding = threading.Event()

    class Reading(Moment):
        """Counts the reads of the decoder, after those of the header and of the hash."""

        def _judge(self, call: Call) -> Answer:
            if call.name == "fallocate":
                decoding.set()
            if self.reached:
                time.sleep(0.001)  # a slow disk
            return super()._judge(call) if decoding.is_set() else Verdict.GO

    reading = Reading(("pread64", "content.png"), lambda child: deliver(child, signal.SIGINT))
    assert reading.start(nursery, config).wait() == 75
    blocks = (config.parent / "content.png").stat().st_size // 4096
    assert blocks > 4000
    assert reading.calls_since < blocks / 2


def test_a_stop_ends_the_hashing_of_a_large_file(nursery, tmp_path):
    """Hashing 100 GB on a slow disk takes an hour."""
    config = write_variant(tmp_path / "run", "tiff")
    os.truncate(config.parent / "content.png", 2**30)  # what follows a picture's end is no part of it
    hashing = Moment(PHASES["hashing the inputs"], lambda child: deliver(child, signal.SIGHUP))
    assert hashing.start(nursery, config).wait() == 75
    assert hashing.calls_since < 20  # of 256
    assert not (config.parent / "run" / "manifest.json").exists()


def test_a_signal_that_is_ignored_stays_so(nursery, unbroken, tmp_path):
    """Under nohup a run continues when the terminal is closed."""
    config = write_variant(tmp_path / "run", "tiff")
    process = subprocess.Popen(
        ["nohup", PIPELINE, "run", "-c", config, "--log-format", "json"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ONE_THREAD},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "WorkDone" in line:
            process.send_signal(signal.SIGHUP)
            break
    process.stderr.read()
    assert process.wait(TIMEOUT_S) == 0
    assert unbroken.differences(Ending.of(config)) == []


def test_a_terminal_that_is_closed_stops_the_run_in_order(tmp_path):
    """Write errors of the live display must not end the run as a bug."""
    config = write_variant(tmp_path / "run", "tiff", optimizer={"max_iterations": 10_000})
    ours, theirs = pty.openpty()
    command = ["env", "--default-signal=HUP", "setsid", "--ctty", PIPELINE, "run", "-c", config]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while b"iteration" not in shown and b"mean|u|" not in shown:
        shown += os.read(ours, 4096)
    os.close(ours)  # the kernel sends HUP, and every write fails from now on
    assert process.wait(TIMEOUT_S) == 75
    assert damage(places(config)[0]) == []


def test_a_second_signal_ends_at_once_where_the_terminal_takes_nothing():
    """A suspended terminal (Ctrl-S) or a hanging connection must not block the abort."""
    code = """
import os, threading
from pipeline.cli.signals import stop_on_signals
with stop_on_signals(lambda event: threading.Event().wait(), lambda: b"farewell"):
    print("listening", flush=True)
    threading.Event().wait()
"""
    hearing, full = os.pipe()
    os.set_blocking(full, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(full, bytes(4096))
    os.set_blocking(full, True)
    # a shell starts what it runs in the background with Ctrl-C ignored, these tests too
    command = ["env", "--default-signal=INT", sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=full)
    assert process.stdout is not None and process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)  # another signal: two of a kind may be merged into one
    assert process.wait(TIMEOUT_S) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    os.close(hearing)
    os.close(full)


@pytest.mark.parametrize("log_format", ["plain", "json", "live"])
def test_a_log_that_cannot_be_written_ends_no_run(unbroken, tmp_path, log_format):
    """A full disk under the log must not end a run."""
    config = write_variant(tmp_path / "run", "tiff")
    command = [PIPELINE, "run", "-c", config, "--log-format", log_format]

    def code() -> int:
        environment = {**os.environ, **ONE_THREAD}
        with Path("/dev/full").open("w") as full:
            return subprocess.run(command, stderr=full, check=False, timeout=TIMEOUT_S, env=environment).returncode

    assert code() == 0
    assert unbroken.differences(Ending.of(config)) == []
    keys = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**keys, "content": "missing.png"}))
    assert code() == 3
