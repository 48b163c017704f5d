# ruff: noqa: D102 - tornado names the methods: get, post, prepare
"""The answers of the server. Every address starts with the token; nothing in an address is used as a path."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import Callable
from concurrent.futures import Executor
from http.client import responses
from typing import Any, Protocol, TypeVar

from tornado import iostream, web

from pipeline.core.errors import DamagedStateError, PipelineError
from pipeline.core.events import Note, Sink
from pipeline.core.text import printable, shown
from pipeline.images.tile_codec import TILE_TYPES
from pipeline.viewer import access, assets, maps
from pipeline.viewer.crops import CropRefusedError, Crops
from pipeline.viewer.pictures import NoPictureError, Pictures, SupersededError, TileAddress
from pipeline.viewer.snapshot import RunReader

T = TypeVar("T")

_ALIVE_S = 5.0  # an event stream says at least this often that it is alive
# Of the style element that OpenSeadragon 6.1.1 adds for touch screens.
_OPENSEADRAGON_STYLE = "'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='"
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        f"style-src 'self' {_OPENSEADRAGON_STYLE}",
        "connect-src 'self'",
        "img-src 'self' data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the address has the token
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Server": "pipeline view",
}


class Site(Protocol):
    """What the handlers need of the server. `number` grows with every change of the state."""

    token: str
    listening: str
    number: int
    closing: bool
    sink: Sink
    pool: Executor
    reader: RunReader
    pictures: Pictures
    crops: Crops

    async def state_text(self) -> str:
        """The state as JSON in one line."""

    async def wait_for_change(self, seen: int, timeout_s: float) -> None:
        """Wait until `number` is another one than `seen`, or for a time."""

    def changed(self) -> None:
        """Wake the pages."""

    def report_damage(self, text: str) -> None:
        """Show that a chunk is damaged."""


class RefusalError(web.HTTPError):
    """A request that is answered with a status and one line of text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status)
        self.text = text


class Handler(web.RequestHandler):
    """Base class: refuses wrong tokens and hosts, and answers errors with one line."""

    def initialize(self, viewer: Site) -> None:
        self.viewer = viewer
        self.gone = False

    def set_default_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        if not access.allowed_host(self.request.headers.get("Host"), self.viewer.listening):
            raise RefusalError(403, "This name is not the viewer's. Open the address that `pipeline view` printed.")
        given = self.path_kwargs.pop("token", "")
        if not hmac.compare_digest(self.viewer.token.encode(), given.encode()):  # in constant time
            raise RefusalError(403, "The token in the address is missing or wrong. Open what `pipeline view` printed.")

    def compute_etag(self) -> None:
        return None

    def on_connection_close(self) -> None:
        self.gone = True

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function on a thread of the pool, unless the browser has hung up before its turn comes."""

        def call() -> T:
            if self.gone:
                raise RefusalError(499, "the browser no longer waits")
            return function(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self.viewer.pool, call)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None, None))[1]
        text = error.text if isinstance(error, RefusalError) else responses.get(status_code, "error")
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{text}\n")

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if not isinstance(value, web.HTTPError | iostream.StreamClosedError):
            place = f"{self.request.method} {self.request.path.replace(self.viewer.token, '…')}"
            self.viewer.sink(Note(printable(f"viewer: {shown(place, 200)}: {type(value).__name__}: {value}")))


class Unknown(Handler):
    """Every other address."""

    def prepare(self) -> None:
        given = self.request.path.split("/")[1:2]
        self.path_kwargs["token"] = given[0] if given else ""
        super().prepare()
        raise RefusalError(404, "There is nothing at this address.")


class Page(Handler):
    """The page, with the state and the address of a coarse picture in it, so that it waits for neither."""

    async def get(self) -> None:
        self.set_header("Content-Type", assets.content_type("index.html"))
        self.write(assets.page_with(await self.viewer.state_text()))


class Asset(Handler):
    """A file of the page."""

    def get(self, name: str) -> None:
        data = assets.page_files().get(name)
        if data is None:
            raise RefusalError(404, "The page has no such file.")
        self.set_header("Content-Type", assets.content_type(name))
        self.write(data)


class State(Handler):
    """The state as JSON, for pages that poll."""

    async def get(self) -> None:
        self.set_header("Content-Type", "application/json")
        self.write(await self.viewer.state_text())


class Events(Handler):
    """The state as server-sent events: at once, and after each change. A slow page misses states, and nobody waits."""

    async def get(self) -> None:
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("X-Accel-Buffering", "no")
        seen = -1
        try:
            while not self.gone and not self.viewer.closing:
                if self.viewer.number != seen:
                    seen = self.viewer.number
                    self.write(f"data: {await self.viewer.state_text()}\n\n")
                else:
                    self.write(": alive\n\n")
                await self.flush()  # until the browser has taken it
                await self.viewer.wait_for_change(seen, _ALIVE_S)
        except iostream.StreamClosedError:
            pass


class Tile(Handler):
    """One tile of a picture."""

    async def get(self, picture: str, version: str, level: str, column: str, row: str, suffix: str) -> None:
        address = TileAddress(picture, version, int(level), int(column), int(row), suffix)
        try:
            data = await self.in_thread(self.viewer.pictures.tile, address)
        except NoPictureError as error:
            raise RefusalError(404, str(error)) from None
        except SupersededError as error:
            raise RefusalError(410, str(error)) from None
        except DamagedStateError as error:
            self.viewer.report_damage(str(error))
            raise RefusalError(502, str(error)) from None
        except (PipelineError, OSError) as error:
            raise RefusalError(503, shown(str(error), 300)) from None
        self.set_header("Content-Type", TILE_TYPES[suffix])
        self.set_header("Cache-Control", "private, max-age=31536000, immutable")
        self.write(data)


class Map(Handler):
    """A map of the running stage."""

    async def get(self, kind: str) -> None:
        try:
            data = await self.in_thread(maps.chunk_map, self.viewer.reader, kind)
        except (PipelineError, OSError) as error:
            raise RefusalError(404, shown(str(error), 300)) from None
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps(data))


class Crop(Handler):
    """Renders a crop (POST), and gives its image (GET)."""

    async def post(self) -> None:
        if not access.same_origin(self.request.headers.get("Origin"), self.request.headers.get("Host")):
            raise RefusalError(403, "Crops are ordered from the page itself.")
        if self.request.headers.get("Content-Type") != "application/json":  # which no foreign form can send
            raise RefusalError(400, "Send x, y, width and height as JSON.")
        try:
            rect = json.loads(self.request.body)
            numbers = [rect[name] for name in ("x", "y", "width", "height")]
        except (ValueError, LookupError, TypeError):
            raise RefusalError(400, "Send x, y, width and height as JSON.") from None
        if not all(type(number) is int and 0 <= number < 10_000_000 for number in numbers):
            raise RefusalError(400, "x, y, width and height are whole px.")
        try:
            self.viewer.crops.start(*numbers)
        except CropRefusedError as error:
            raise RefusalError(409, str(error)) from None
        self.viewer.changed()
        self.set_status(202)

    async def get(self, number: str) -> None:
        data = await self.in_thread(self.viewer.crops.image, int(number))
        if data is None:
            raise RefusalError(404, "There is no such crop.")
        self.set_header("Content-Type", "image/png")
        self.write(data)


_TILE_PATTERN = (
    r"tiles/(?P<picture>[a-z]+(?:_[a-z0-9]+)?)/(?P<version>[a-z0-9-]{1,40})"
    rf"/(?P<level>\d{{1,2}})/(?P<column>\d{{1,7}})_(?P<row>\d{{1,7}})\.(?P<suffix>{'|'.join(TILE_TYPES)})"
)


def routes(viewer: Site) -> list[Any]:
    """The handlers by address."""
    token = r"/(?P<token>[A-Za-z0-9_-]+)/"
    patterns: list[tuple[str, type[Handler]]] = [
        ("", Page),
        (r"assets/(?P<name>[A-Za-z0-9.-]+)", Asset),
        ("state", State),
        ("events", Events),
        (_TILE_PATTERN, Tile),
        (rf"maps/(?P<kind>{'|'.join(re.escape(kind) for kind in maps.KINDS)})", Map),
        ("crops", Crop),
        (r"crops/(?P<number>\d{1,6})\.png", Crop),
    ]
    return [(token + pattern, handler, {"viewer": viewer}) for pattern, handler in patterns]
