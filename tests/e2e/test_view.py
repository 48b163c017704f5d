"""The page of `pipeline view` in a real browser."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import pipeline
from pipeline.core.events import IterationDone
from tests.support.browser import Browser, browser
from tests.support.e2e import PIPELINE, read_picture, run_until, write_run

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    with browser() as one:
        one.resize(1280, 800)
        yield one


class Server:
    """`pipeline view` as a process, which can be killed and started again at the same address."""

    def __init__(self, work_dir: Path) -> None:
        self._work_dir, self._port = work_dir, 0
        self.start()

    def start(self) -> None:
        command = [PIPELINE, "view", "--run", self._work_dir, "--token", TOKEN, "--port", str(self._port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.address = self._process.stdout.readline().strip()
        assert self.address, self._process.stderr.read()
        self._port = int(self.address.split(":")[2].split("/")[0])

    def end(self, number: int = signal.SIGINT) -> tuple[int, str]:
        self._process.send_signal(number)
        _, text = self._process.communicate(timeout=30)
        return self._process.returncode, text


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    config = write_run(tmp_path_factory.mktemp("view"), content_px=(300, 200), initial_size=150)
    pipeline.run(pipeline.load_config(config))
    return config.parent


def opened(page: Browser, address: str) -> None:
    page.errors(), page.hosts()
    page.driver.get(address)
    page.wait("document.body.dataset.ready === 'yes' && pipelineView.viewA.layers.get('a')?.item != null")
    page.wait("pipelineView.page.state.pictures.filter((one) => one.kind === 'input').every((one) => one.version)")
    page.wait_for_tiles()


def test_shows_the_pixels_that_were_painted_and_clips_the_swipe(page, finished) -> None:
    """At 100 % the known pixels are at the known place, and each side of the line has its own picture."""
    server = Server(finished / "run")
    try:
        opened(page, server.address)
        page.do("pipelineView.viewA.full()")
        page.do("pipelineView.viewA.viewer.viewport.panTo(new OpenSeadragon.Point(0.5, 1 / 3), true)")
        page.wait("Math.abs(pipelineView.viewA.scale() - 1) < 1e-6")
        page.wait_for_tiles()
        viewport = "pipelineView.viewA.viewer.viewport"
        corner = page.run(f"{viewport}.pixelFromPoint(new OpenSeadragon.Point(0, 0), true)")
        top = page.run("document.getElementById('view-a').getBoundingClientRect().top")
        x, y = round(corner["x"]), round(corner["y"] + top)
        result = read_picture(finished / "out.png")

        def shown(x0: int, x1: int) -> np.ndarray:
            return page.pixels()[y + 60 : y + 140, x + x0 : x + x1].astype(int)

        alone = shown(0, 300)
        assert np.abs(alone - result[60:140]).mean() < 12  # JPEG, and a canvas that starts at half a px
        page.do("pipelineView.choose('b', 'style_0')")
        page.do("pipelineView.setMode('swipe')")
        page.wait("pipelineView.viewA.layers.get('b')?.item != null")
        for line in (0, 150, 300):
            page.do(f"pipelineView.setSwipe({(x + line) / page.run('document.getElementById(`view-a`).clientWidth')})")
            page.wait_for_tiles()
            changes = np.abs(shown(0, 300) - alone).mean(axis=(0, 2))
            assert changes[: max(line - 20, 0)].max(initial=0) == 0  # the handle is 30 px wide
            assert line == 300 or changes[line + 20 :].mean() > 20
        assert page.errors() == []
        assert page.hosts() == {"127.0.0.1"}
    finally:
        assert server.end()[0] == 0


def test_fits_a_phone(page, finished) -> None:
    """At 390 px nothing is cut off at the right, and the panel opens."""
    server = Server(finished / "run")
    try:
        page.resize(390, 844)
        opened(page, server.address)
        page.driver.find_element("id", "toggle-panel").click()
        assert page.wait("document.getElementById('panel').clientWidth > 300")
        assert page.run("document.documentElement.scrollWidth") <= 390
    finally:
        page.resize(1280, 800)
        server.end()


def test_follows_a_run_and_survives_the_viewers_death(page, tmp_path) -> None:
    """Picture and curves advance without a reload; when the viewer dies the page says so, and recovers with it."""
    config = write_run(tmp_path, optimizer={"max_iterations": 6})
    run_until(config, lambda event: isinstance(event, IterationDone) and event.iteration == 1)
    server = Server(tmp_path / "run")
    try:
        opened(page, server.address)
        page.driver.execute_script("window.stayed = true")
        before = page.run("pipelineView.viewA.layers.get('a').picture.tiles")
        pipeline.run(pipeline.load_config(config))
        page.wait(f"pipelineView.viewA.layers.get('a').picture.tiles !== '{before}'")
        page.wait("pipelineView.page.state.phase === 'done'")
        assert page.run("pipelineView.page.state.stages.at(-1).curves.objective.length") == 6
        page.wait("pipelineView.viewA.viewer.world.getItemCount() === 1")  # the old picture is gone
        server.end(signal.SIGKILL)
        page.wait("document.getElementById('phase').dataset.phase === 'lost'")
        server.start()
        page.wait("document.getElementById('phase').dataset.phase === 'done'")
        assert page.run("document.getElementById('notice').hidden")
        assert page.run("window.stayed")
    finally:
        code, text = server.end()
    assert (code, "Traceback" in text) == (0, False)
