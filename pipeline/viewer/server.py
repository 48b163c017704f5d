"""The web server of `pipeline view`: one thread for the network, two for tiles, and one that watches the journal."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tornado import httpserver, netutil, web

from pipeline.config import AnyConfig, LimitsConfig
from pipeline.core.errors import ConfigError
from pipeline.core.events import Note, Sink
from pipeline.viewer import access, assets
from pipeline.viewer.crops import Crops
from pipeline.viewer.handlers import Unknown, routes
from pipeline.viewer.inputs import Inputs, inputs_of_config, inputs_of_run
from pipeline.viewer.pictures import Pictures
from pipeline.viewer.snapshot import RunReader, Snapshot
from pipeline.viewer.state import Usage, print_dpi, run_state

_WATCH_S = 0.5
_TILE_THREADS = 2
# A new iteration is announced when the tiles of the one before have taken at most a hundredth of the machine since, but
# within a minute: iterations of a canvas so large that its tiles take longer are far apart.
_REST = 100
_MIN_PAUSE_S, _MAX_PAUSE_S = 2.0, 60.0
_MAX_REQUEST_BYTES = 10_000


@dataclass(frozen=True)
class ViewerOptions:
    """Where the server listens, its token, and whether the page may order crops. `port` 0: any free one.

    `config_options`: of the command line, for the crop command that the page shows.
    """

    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = None
    allow_crops: bool = False
    config_options: Sequence[str] = ()


class Viewer:
    """Serves the page of one run until it is stopped. `config`: of the run, if it was given."""

    def __init__(self, work_dir: Path, config: AnyConfig | None, options: ViewerOptions, sink: Sink) -> None:
        if options.token is not None:
            access.check_token(options.token)
        elif not access.is_loopback(options.host):
            raise ConfigError(
                f"--host {options.host}: other machines can reach this address, and the page is sent unencrypted. Give "
                "a --token of your own to say that you mean it; `ssh -L` needs neither."
            )
        self.options, self.sink, self.config = options, sink, config
        self.listening = options.host
        self.token = options.token or secrets.token_urlsafe(18)
        self.pool: Executor
        self.reader = RunReader(work_dir)
        self.number, self.closing = 0, False
        self._busy_s = self._pause_until_s = 0.0
        self._session = secrets.token_hex(4)
        self._snapshot = Snapshot()
        self._damage: list[str] = []
        self._usage = Usage(work_dir)
        self._looked_at = False
        self._text: tuple[int, str] = (-1, "")
        self._loop: asyncio.AbstractEventLoop | None = None

    def serve(self, stop: threading.Event, on_ready: Callable[[str], None]) -> None:
        """Answer requests until `stop` is set; `on_ready` gets the address. Raises ConfigError if it is taken."""
        limits = self.config.limits if self.config else LimitsConfig()
        self.inputs = Inputs(limits, self._changed_on_thread)
        self.crops = Crops(self.options.config_options, self.options.allow_crops, self._changed_on_thread)
        self.pictures = Pictures(self.reader, self.inputs)
        try:
            with (
                ThreadPoolExecutor(_TILE_THREADS, "tiles") as self.pool,
                ThreadPoolExecutor(1, "watch") as self._watcher,
            ):
                asyncio.run(self._serve(stop, on_ready))
        finally:
            self.crops.close()
            self.inputs.close()

    async def _serve(self, stop: threading.Event, on_ready: Callable[[str], None]) -> None:
        self._loop, self._change = asyncio.get_running_loop(), asyncio.Condition()
        host = self.options.host
        try:
            sockets = netutil.bind_sockets(self.options.port, host, backlog=64)
        except OSError as error:
            raise ConfigError(f"--host {host} --port {self.options.port}: {error.strerror}. Choose another.") from error
        application = web.Application(
            routes(self),
            default_handler_class=Unknown,
            default_handler_args={"viewer": self},
            log_function=lambda _: None,
        )
        server = httpserver.HTTPServer(
            application, max_body_size=_MAX_REQUEST_BYTES, max_header_size=16_384, body_timeout=10.0
        )
        server.add_sockets(sockets)
        name = f"[{host}]" if ":" in host else host
        await self._look()
        await self.state_text()  # the first page has it at once
        on_ready(f"http://{name}:{sockets[0].getsockname()[1]}/{self.token}/")
        while not stop.is_set():
            await asyncio.sleep(_WATCH_S)
            await self._look()
            await self._count()
        self.closing = True
        server.stop()
        await self._notify()
        await server.close_all_connections()

    async def _look(self) -> None:
        """Read the run directory if it has changed, and wake the pages."""
        loop = asyncio.get_running_loop()
        snapshot = await loop.run_in_executor(self._watcher, self.reader.latest)
        if snapshot is self._snapshot and self.number:
            return
        if self._is_next_iteration(snapshot) and time.monotonic() < self._pause_until_s:
            return
        busy_s, self._busy_s = self.pictures.busy_s - self._busy_s, self.pictures.busy_s
        pause_s = min(_MAX_PAUSE_S, max(_MIN_PAUSE_S, _REST * busy_s / (os.cpu_count() or 1)))
        self._pause_until_s = time.monotonic() + pause_s
        if snapshot.position != self._snapshot.position:
            self._damage.clear()  # found at the position before; tiles of the new one will tell
        self._snapshot = snapshot
        if snapshot.manifest is not None:
            self.inputs.want(inputs_of_run(snapshot.manifest))
        elif self.config is not None:
            self.inputs.want(inputs_of_config(self.config))
        await self._notify()

    async def _count(self) -> None:
        """Count the disk space again if it is time, and somebody has looked since."""
        if not self._looked_at or not self._usage.is_due():
            return
        self._looked_at = False
        if await asyncio.get_running_loop().run_in_executor(self._watcher, self._usage.count):
            await self._notify()

    def _is_next_iteration(self, snapshot: Snapshot) -> bool:
        """Whether only another iteration of the same stage is new: the pages can wait for it."""
        old, new = self._snapshot, snapshot
        same_run = (old.owner, old.problem, old.manifest) == (new.owner, new.problem, new.manifest)
        return same_run and (old.position.stage, old.position.prepared, old.position.stage_done) == (
            new.position.stage,
            new.position.prepared,
            new.position.stage_done,
        )

    async def _notify(self) -> None:
        self.number += 1
        async with self._change:
            self._change.notify_all()

    def changed(self) -> None:
        """Wake the pages; on the server's thread."""
        self._waking = asyncio.ensure_future(self._notify())  # kept: the loop itself holds tasks weakly

    def _changed_on_thread(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.changed)

    async def wait_for_change(self, seen: int, timeout_s: float) -> None:
        """Wait until `number` is another one than `seen`, or for a time."""
        try:
            async with asyncio.timeout(timeout_s), self._change:
                await self._change.wait_for(lambda: self.number != seen or self.closing)
        except TimeoutError:
            pass

    def report_damage(self, text: str) -> None:
        """Show on the page, and say once, that a chunk is damaged."""
        if text not in self._damage and len(self._damage) < 20:
            self._damage.append(text)
            self.sink(Note(text))
            self.changed()

    async def state_text(self) -> str:
        """The state as JSON in one line; all pages share it."""
        number, self._looked_at = self.number, True
        if self._text[0] != number:
            loop = asyncio.get_running_loop()
            text = await loop.run_in_executor(self._watcher, lambda: json.dumps(self.state(), allow_nan=False))
            self._text = number, text
        return self._text[1]

    def state(self) -> dict[str, Any]:
        """Everything that the page shows."""
        snapshot = self._snapshot
        state = run_state(snapshot)
        return {
            **state,
            **self._usage.measured(snapshot.owner),
            "problem": state["problem"] or (self._damage[0] if self._damage else ""),
            "session": self._session,
            "page": assets.page_version(),
            "name": self.reader.work_dir.name,
            "work_dir": str(self.reader.work_dir),
            "dpi": print_dpi(snapshot.manifest),
            "pictures": self.pictures.listing(snapshot),
            "config_options": list(self.options.config_options),
            "crops": list(self.crops.entries),
            "allow_crops": self.crops.allowed,
        }
