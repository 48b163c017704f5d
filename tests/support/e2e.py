"""Runs the program as its users do: small inputs, the command line in this process or in others, and its files.

`Nursery` starts `pipeline` commands as separate processes without importing Python and torch each time: they are forked
from a server that has imported both and computed nothing.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.core.image_formats import RGB8, PixelKind
from pipeline.store import is_aid
from pipeline.store.checksums import checksum
from tests.support.syscalls import Watch, be_watched

PIPELINE = Path(sys.executable).with_name("pipeline")
# A command takes half a second; the limit allows for a busy machine, and the long torture runs raise it.
TIMEOUT_S = int(os.environ.get("TEST_TIMEOUT_S", "120"))


def write_picture(path: Path, width: int, height: int, seed: int = 0, kind: PixelKind = RGB8, **options: Any) -> Path:
    """Write an image of waves and noise in the format of the suffix; its alpha channel is a disc with soft edges."""
    import pyvips

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(x / (5 + c) + seed) * np.cos(y / (7 + c)) for c in range(3)]
    values = np.stack(waves, -1) + rng.normal(0, 20, (height, width, 3))
    if kind.alpha:
        distance = np.hypot(x / width - 0.5, y / height - 0.5)
        values = np.dstack([values, 255 * (0.4 - distance) / 0.1])
    scale, dtype, space = (1, np.uint8, "srgb") if kind.bits == 8 else (257, np.uint16, "rgb16")
    pixels = (np.clip(values, 0, 255) * scale).astype(dtype)
    pyvips.Image.new_from_array(pixels, interpretation=space).write_to_file(str(path), **options)
    return path


def read_picture(path: Path) -> np.ndarray:
    """The first page of an image file, (H, W, C)."""
    import pyvips

    return np.asarray(pyvips.Image.new_from_file(str(path)).numpy())


# Defaults of a small run: a few hundred milliseconds on the CPU, with a network that needs no weights file.
SMALL: dict[str, Any] = {
    "content": "content.png",
    "styles": [{"image": "style.png"}],
    "output": "out.png",
    "work_dir": "run",
    "initial_size": 48,
    # The paper's stages, at sizes that are easy to foresee, and a start and an objective that leave a content in its
    # own style as it is. Loss, colours and pooling are the defaults.
    "stage_ratio": 2.0,
    "style_stages": True,
    "dequantize": False,
    "init_noise": 0.0,
    "network": {"name": "random", "padding": "replicate"},
    "loss": {"tv_weight": 0.0},
    "optimizer": {"max_iterations": 2, "coarse_iterations": 1.0},
    "compute": {"device": "cpu", "tile_px": 64},
    # a kill costs one iteration; stages in memory have tests of their own
    "store": {"chunk_px": 32, "commit_interval": 0},
}


def write_run(
    folder: Path,
    content_px: tuple[int, int] = (70, 52),
    style_px: tuple[int, int] = (60, 50),
    content_kind: PixelKind = RGB8,
    **keys: Any,
) -> Path:
    """Write content and style of these (width, height) and a config to `folder`; `keys` as for `write_config`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_picture(folder / "content.png", *content_px, seed=1, kind=content_kind)
    write_picture(folder / "style.png", *style_px, seed=2)
    return write_config(folder, **keys)


def write_config(folder: Path, name: str = "config.yaml", **keys: Any) -> Path:
    """Write SMALL with `keys` changed: sections are merged, other values replaced, and None removes a key."""
    merged = {**SMALL}
    for key, value in keys.items():
        merged[key] = {**SMALL[key], **value} if isinstance(SMALL.get(key), dict) else value
    path = folder / name
    path.write_text(yaml.safe_dump({key: value for key, value in merged.items() if value is not None}))
    return path


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def user_environment() -> dict[str, str]:
    """The environment of a user, whose programs take all cores; pytest's workers have one thread (conftest.py)."""
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


def run_pipeline(*argv: object, env: Mapping[str, str] | None = None, **environment: str) -> Outcome:
    """Run the installed command in a separate process. `env`: its environment, to which `environment` is added."""
    result = subprocess.run(
        [PIPELINE, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**(os.environ if env is None else env), **environment},
    )
    return Outcome(result.returncode, result.stdout, result.stderr)


def make_call(capfd: Any, monkeypatch: Any) -> Callable[..., Outcome]:
    """A function that runs a command line in this process: `call("plan", "-c", path)`."""
    from pipeline.cli import app

    def call(*argv: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["pipeline", *map(str, argv)])
        capfd.readouterr()
        try:
            app.main()
        except SystemExit as stop:
            return Outcome(int(stop.code or 0), *capfd.readouterr())
        raise AssertionError("cli.main returned")

    return call


def journal(work_dir: Path) -> list[dict[str, Any]]:
    """The records of a journal, read as plain JSON lines; an incomplete last line is dropped."""
    path = work_dir / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["record"] for line in lines if line.endswith("\n")]


def write_journal(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a journal with correct checksums around any content: a CRC is no signature."""
    crc, lines = 0, []
    for record in records:
        text = json.dumps(record)
        crc = checksum(text.encode(), crc)
        lines.append(f'{{"crc": "{crc:08x}", "record": {text}}}\n')
    path.write_text("".join(lines))


# Fields of the journal's records that differ between two runs.
MEASURED = ("time", "seconds", "busy", "remaining_s")


def results(work_dir: Path) -> list[dict[str, Any]]:
    """The journal's records of finished work, without the fields that differ between two runs, such as times."""
    kinds = ("stage_prepared", "iteration", "pass", "stage_done")
    done = [record for record in journal(work_dir) if record["type"] in kinds]
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in done]


# Runs a command line, and prints the peak of the process in KiB after its output.
MEASURED_COMMAND = """
import atexit, sys
from pathlib import Path
from pipeline.__main__ import main

def print_peak():
    status = Path("/proc/self/status").read_text()
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))

atexit.register(print_peak)
main()
"""


def peak_of_command(*arguments: object) -> int:
    """The peak of resident memory of a command, in bytes."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURED_COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=3 * TIMEOUT_S,
        check=False,
        env=user_environment(),  # threads take memory
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.splitlines()[-1]) * 1024


def run_until(config: Path, last: Callable[[Any], bool]) -> None:
    """Run a config in this process, and stop it after the first event for which `last` is true."""
    import pipeline
    from pipeline.core.errors import Stopped

    stop = threading.Event()
    with contextlib.suppress(Stopped):
        pipeline.run(pipeline.load_config(config), sink=lambda event: last(event) and stop.set(), stop=stop)
    assert stop.is_set()


def canvases(work_dir: Path) -> dict[str, bytes]:
    """Every file of the store by its path; a finished run retains one canvas per stage.

    Temporary files that a killed run has not renamed, and aids for viewers, are left out: no run reads them.
    """
    store = work_dir / "store.zarr"
    files = [path for path in sorted(store.rglob("*")) if path.is_file() and path.suffix != ".partial"]
    files = [path for path in files if not is_aid(path.name)]
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def leftovers(output: Path) -> list[str]:
    """Names of the temporary files of `output` in its directory."""
    return sorted(path.name for path in output.parent.iterdir() if path.name.startswith(f".{output.stem}"))


Event = dict[str, Any]


def keys_of(events: list[Event]) -> list[tuple[Any, ...]]:
    """Keys that identify the same event in every run of one config, resumed or not."""
    keys: list[tuple[Any, ...]] = []
    iteration = 0
    for event in events:
        if event["event"] == "StageStarted":
            iteration = event["iteration"]
        elif event["event"] == "IterationDone":
            keys.append((event["stage"], iteration, "iteration"))
            iteration += 1
        elif event["event"] == "WorkDone":
            keys.append((event["stage"], 0 if event["what"] == "export" else iteration, event["what"], event["done"]))
    return keys


def gradient_tiles(events: list[Event]) -> int:
    """The number of tiles for which gradients were computed."""
    return sum(event.get("what") == "gradient pass" and event["done"] > 0 for event in events)


# Modules that a run imports lazily; torch's own, at the first gradient, would take half of a small run.
_PRELOADED = [
    "pytest",
    "pipeline.cli.app",
    "pipeline.commands.preview.crop",
    "pipeline.cli.reports",
    "pipeline.render.iteration",
    "pipeline.render.preparation",
    "pyvips",
    "torch.fx.experimental.symbolic_shapes",
]


# Every start polls all children of all threads: without the lock, two threads reap one child and the second reads 255.
_REAPING = threading.Lock()


class Nursery:
    """Starts `pipeline` commands by forking a server process, and kills those that still run at the end."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        self._children: list[Child] = []

    def start(self, *argv: object, kill_before: int = 0, watch: Watch | None = None) -> Child:
        """Start a command. With `kill_before` n it kills itself before its nth commit (see `_commit_of`).

        `watch` intercepts every call by which it changes files.
        """
        log = self._folder / f"log_{len(self._children)}"
        log.touch()
        arguments = (
            [str(argument) for argument in argv],
            str(log),
            kill_before,
            watch and (watch.address, watch.reads),
        )
        process = self._context.Process(target=_child, args=arguments)
        # One thread: starting torch's thread pool would be most of the time of such a small run.
        with _REAPING, _environment(OMP_NUM_THREADS="1"):
            process.start()
        self._children.append(Child(process, log))
        return self._children[-1]

    def run(self, *argv: object) -> Child:
        """Start a command and wait for its end."""
        child = self.start(*argv)
        child.wait()
        return child

    def close(self) -> None:
        """Kill the commands that still run."""
        for child in self._children:
            child.kill()


class Child:
    """A command in a separate process, running or finished."""

    def __init__(self, process: Any, log: Path):
        self.process = process
        self.pid: int = process.pid
        self._log = log

    @property
    def err(self) -> str:
        """The output so far, stdout and stderr."""
        return self._log.read_text()

    def events(self) -> list[Event]:
        """The events that --log-format json has printed so far."""
        whole, _, _ = self.err.rpartition("\n")
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def wait(self) -> int:
        """Wait for the end; returns the exit code, or minus the number of the signal that killed the process."""
        wait([self.process.sentinel], TIMEOUT_S)
        with _REAPING:
            code = self.process.exitcode
        assert code is not None, f"still running:\n{self.err}"
        return int(code)

    def is_alive(self) -> bool:
        with _REAPING:
            return bool(self.process.is_alive())

    def wait_until(self, reached: Callable[[list[Event]], bool]) -> bool:
        """Wait until the events fulfil `reached`; False if the process ends before."""
        deadline = time.monotonic() + TIMEOUT_S
        while not reached(self.events()):
            if not self.is_alive():
                return reached(self.events())
            assert time.monotonic() < deadline, f"not reached:\n{self.err}"
            time.sleep(0.002)
        return True

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the process (SIGSTOP) during the block, from the beginning of which no thread is in a system call."""
        self.signal(signal.SIGSTOP)
        deadline = time.monotonic() + TIMEOUT_S
        while self.is_alive() and not all(state in "TZX" for state in self._thread_states()):
            assert time.monotonic() < deadline, "the process does not stop"
            time.sleep(0.001)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def _thread_states(self) -> list[str]:
        """One letter per thread, as in proc(5): T is stopped."""
        states = []
        for stat in Path(f"/proc/{self.pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):  # the thread has ended
                states.append(stat.read_text().rpartition(")")[2].split()[0])
        return states

    def kill(self) -> int:
        """Send SIGKILL; returns the exit code."""
        self.signal(signal.SIGKILL)
        return self.wait()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    previous = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in previous.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _reset_signals() -> None:
    """As in a shell's foreground: background commands ignore INT, nohup ignores HUP, and a run inherits that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _child(argv: list[str], log: str, kill_before: int, watch: tuple[str, bool] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["pipeline", *argv]
    _reset_signals()
    if kill_before:
        _kill_before_commit(kill_before)
    if watch:
        be_watched(*watch)
    from pipeline.__main__ import main

    main()


def _kill_before_commit(number: int) -> None:
    """Kill this process just before its nth commit (see `_commit_of`)."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if _commit_of(event, args) is not None:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _commit_of(event: str, args: tuple[Any, ...]) -> str | None:
    """The path that a Python audit event is about to create or change, unless it is a file inside an array."""
    if event == "os.rename":
        path = Path(os.fsdecode(args[1]))
    elif event == "os.mkdir" or (event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
        path = Path(os.fsdecode(args[0])) if isinstance(args[0], str | bytes | os.PathLike) else Path()
    else:
        return None
    inside_array = any(part.startswith("stage_") for part in path.parent.parts)
    return None if inside_array or path.name in ("lock", "null") or path == Path() else str(path)
