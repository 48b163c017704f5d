"""A headless Chromium for the tests of the page; tests that need it are skipped where it is missing."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

CHROMIUM = os.environ.get("TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = os.environ.get("TEST_CHROMEDRIVER") or shutil.which("chromedriver")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--force-color-profile=srgb",
)


class Browser:
    """One page in a browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def resize(self, width: int, height: int) -> None:
        """The size of the page in CSS px, one of which is one px of the screen."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def scheme(self, scheme: str) -> None:
        """Light or dark, as the system's setting."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self.driver.execute_script(f"return {script}")

    def do(self, script: str) -> None:
        """Run a statement of JavaScript."""
        self.driver.execute_script(script)

    def wait(self, script: str, timeout_s: float = 30) -> Any:
        """Wait until an expression is true, and give its value."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, timeout_s, 0.1).until(lambda _: self.run(script), script)

    def wait_for_tiles(self) -> None:
        """Wait until all tiles of the visible pictures are drawn."""
        world = "[pipelineView.viewA, pipelineView.viewB].every(({viewer: {world}}) => [...Array(world.getItemCount())"
        self.wait(f"{world}.keys()].every((index) => world.getItemAt(index).getFullyLoaded()))")
        self.wait("new Promise((done) => setTimeout(() => done(true), 300))")

    def pixels(self) -> np.ndarray:
        """The page as (H, W, 3)."""
        import pyvips

        image = pyvips.Image.new_from_buffer(io.BytesIO(self.driver.get_screenshot_as_png()).read(), "")
        return np.asarray(image.numpy())[..., :3]

    def errors(self) -> list[str]:
        """What the page has written to the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def hosts(self) -> set[str]:
        """The hosts that the page has sent requests to since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [message for message in messages if message["method"] == "Network.requestWillBeSent"]
        urls = [urlsplit(message["params"]["request"]["url"]) for message in sent]
        return {url.hostname or "" for url in urls if url.scheme not in ("data", "blob", "chrome")}


@contextmanager
def browser(logged: bool = True) -> Iterator[Browser]:
    """A browser, or a visible skip of the test. `logged`: for `errors` and `hosts`, which take time."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    for flag in _FLAGS:
        options.add_argument(flag)
    if logged:
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@contextmanager
def hosted(folder: Path) -> Iterator[str]:
    """The address of a folder on a web server that knows nothing of it."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
