"""Worker processes on this machine: each is watched by a keeper thread, which starts a new one when it ends."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

from pipeline.core.isolation import own_environment
from pipeline.executors.worker import Role, WorkerSpec

# What a worker process runs. The settings come first: distributed heeds them while it is imported.
_WORKER = """
from pipeline.executors.library import enter_dask_settings
enter_dask_settings()
from pipeline.executors.worker import main
main()
"""
# Ctrl-C and the end of a terminal signal the whole process group, but only the parent stops workers.
_PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


class Keepers:
    """A worker process for each role, until `close`.

    `spec_of`: what a new process of a role is told. `ended` is called on a keeper's thread with the process id and the
    code of a process that ended by itself, and with what it returned for the one before it, at first 0; where it
    raises, no new one is started, and the error is `broken`. `lock`: a descriptor that all processes inherit.
    """

    def __init__(
        self,
        roles: Sequence[Role],
        folder: Path,
        lock: int | None,
        spec_of: Callable[[Role], WorkerSpec],
        ended: Callable[[int, int, int], int],
        environment: Mapping[str, str],
    ):
        self._lock, self._spec_of, self._ended = lock, spec_of, ended
        self._log, self._environment = folder / "workers.log", environment
        self._state = threading.Lock()  # guards the attributes below
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._dropped: set[int] = set()
        self._closing = False
        self.broken: Exception | None = None
        self._threads = [threading.Thread(target=self._keep, args=(role,), daemon=True) for role in roles]
        for thread in self._threads:
            thread.start()

    def kill(self, pid: int) -> None:
        """Kill one process; a new one is started."""
        with self._state:
            if pid in self._processes:
                self._processes[pid].kill()

    def drop(self) -> None:
        """Kill all processes and wait for their end; new ones are started at once, and nothing is reported."""
        with self._state:
            killed = list(self._processes.values())
            for process in killed:
                self._dropped.add(process.pid)
                process.kill()
        for process in killed:
            process.wait()

    def close(self, grace_s: float = 0) -> None:
        """End the processes: at once, or by asking them to hand over their results first."""
        with self._state:
            self._closing = True
            processes = list(self._processes.values())
            for process in processes:
                process.send_signal(signal.SIGUSR1 if grace_s else signal.SIGKILL)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace_s or None)
            process.kill()
        for thread in self._threads:
            thread.join()

    def last_words(self) -> str:
        """The last line that a process wrote: distributed says there why it ended."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((f" Their last words: {line.strip()}" for line in reversed(lines) if line.strip()), "")

    def _keep(self, role: Role) -> None:
        """Start a process, wait for its end, start the next. The kernel kills it if this thread ends."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS_SIGNALS)  # inherited by the process
        returned = 0
        try:
            while (process := self._start(role)) is not None:
                code = process.wait()
                with self._state:
                    del self._processes[process.pid]
                    if self._closing or process.pid in self._dropped:
                        continue
                returned = self._ended(process.pid, code, returned)
        except Exception as error:  # whatever it is: the thread that waits for tasks has to raise it
            self.broken = error

    def _start(self, role: Role) -> subprocess.Popen[bytes] | None:
        """A new worker process, or None after `close`."""
        # everything that tasks can be imported from here; -P keeps the current folder out
        path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
        spec = self._spec_of(role)
        with self._state, self._log.open("ab") as log:
            if self._closing:
                return None
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _WORKER],
                env={**self._environment, **_gpu_of(role, self._environment), "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=() if self._lock is None else (self._lock,),
            )
            self._processes[process.pid] = process
        with suppress(BrokenPipeError), cast(IO[bytes], process.stdin) as stdin:  # it may have ended already
            stdin.write(pickle.dumps(spec))
        return process


def environment() -> dict[str, str]:
    """The variables for worker processes: one that is started later computes as the first ones do."""
    return own_environment(os.environ)


def _gpu_of(role: Role, variables: Mapping[str, str]) -> dict[str, str]:
    """The variable that shows a process its own GPU alone, as the first; none where it may see all."""
    if role.device is None:
        return {}
    if role.device == "cpu":  # it updates, or computes on the CPU: a context on a GPU would cost memory there
        return {_VISIBLE_GPUS: ""}
    number = int(role.device.partition(":")[2] or 0)
    visible = [name for name in variables.get(_VISIBLE_GPUS, "").split(",") if name]
    return {_VISIBLE_GPUS: visible[number] if number < len(visible) else str(number)}


def ending(code: int) -> str:
    """Describes how a process ended."""
    if code >= 0:
        return f"ended with code {code}"
    hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"
