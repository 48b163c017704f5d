"""The page of `pipeline view` in a real browser."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import pipeline
from pipeline.core.events import IterationDone
from tests.support.browser import Browser, browser, hosted
from tests.support.e2e import PIPELINE, read_picture, run_until, write_run

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    with browser() as one:
        one.resize(1280, 800)
        yield one


class Server:
    """`pipeline view` as a process, which can be killed and started again at the same address."""

    def __init__(self, work_dir: Path, *options: object) -> None:
        self._run = options or ("--run", work_dir)
        self._port = 0
        self.start()

    def start(self) -> None:
        command = [PIPELINE, "view", *map(str, self._run), "--token", TOKEN, "--port", str(self._port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.address = self._process.stdout.readline().strip()
        assert self.address, self._process.stderr.read()
        self._port = int(self.address.split(":")[2].split("/")[0])

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self._process.pid)

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


def test_chooses_stages_shows_maps_and_renders_a_crop(page, tmp_path) -> None:
    """While a stage is painted: its maps have data, every stage can be chosen, and a crop comes from a click."""
    config = write_run(tmp_path, content_px=(100, 80), optimizer={"max_iterations": 3})
    run_until(config, lambda event: isinstance(event, IterationDone) and (event.stage, event.iteration) == (1, 0))
    server = Server(tmp_path / "run", "-c", config, "--allow-crops")
    try:
        opened(page, server.address)
        for kind in ("progress", "change", "gradient", "losses", "style"):
            page.do(f"pipelineView.map.choose('{kind}')")
            page.wait(f"pipelineView.map.drawn?.kind === '{kind}'")
            values = page.run("pipelineView.map.drawn.values.flat()")
            assert None not in values
            assert kind == "progress" or len(set(values)) > 1
        assert page.run("document.querySelector('.map').getBoundingClientRect().width") > 100
        slider = page.driver.find_element("id", "stage")
        assert page.run("pipelineView.page.a") == "stage_1"
        slider.send_keys("\ue012")  # arrow to the left
        shown = "(({picture, item}) => picture.id === '%s' && item?.getContentSize().x === picture.width)"
        page.wait(shown % "stage_0" + "(pipelineView.viewA.layers.get('a'))")
        assert page.run("document.getElementById('label-a').textContent").startswith("stage 1")
        slider.send_keys("\ue014")
        page.wait(shown % "stage_1" + "(pipelineView.viewA.layers.get('a'))")
        page.driver.find_element("css selector", "#view-a .openseadragon-canvas").click()
        page.wait("document.getElementById('crop-command').textContent.includes('--crop 0,0,100,80')")
        page.do("document.getElementById('crop-render').click()")
        page.wait("document.querySelector('#crops img')?.naturalWidth === 100", 60)
        assert page.errors() == []
    finally:
        assert server.end()[0] == 0


def test_says_that_a_run_was_killed_or_damaged_and_recovers(page, nursery, tmp_path) -> None:
    """The page stays open while the run dies, is damaged, repaired and resumed."""
    config = write_run(tmp_path, optimizer={"max_iterations": 200})
    run, phase = tmp_path / "run", "document.getElementById('phase').dataset.phase"
    child = nursery.start("run", "-c", config)
    server = Server(run)
    try:
        page.errors(), page.hosts()
        page.driver.get(server.address)
        page.driver.execute_script("window.stayed = true")
        page.wait("/left/.test(document.getElementById('headline').textContent)", 60)
        assert page.run(phase) == "running"
        page.wait("pipelineView.page.state.stage === 1 && pipelineView.page.state.iteration > 1", 60)
        child.kill()
        page.wait(f"{phase} === 'stopped'")
        # neither the viewer nor the browser keeps the tiles of the first stage, which is damaged now
        server.end(signal.SIGKILL)
        page.driver.execute_cdp_cmd("Network.clearBrowserCache", {})
        for chunk in run.glob("store.zarr/stage_0/canvas_*/c/0/0/0"):
            chunk.write_bytes(chunk.read_bytes()[::-1])
        page.wait(f"{phase} === 'lost'")
        server.start()
        page.wait(f"{phase} === 'stopped'")
        page.do("pipelineView.choose('a', 'stage_0')")
        page.wait("document.getElementById('notice').textContent.includes('verify')")
        report = pipeline.verify(run, repair=True)
        assert (report.repaired, report.remaining) == (True, ())
        page.wait("/given up by a repair|rolled the run back/.test(document.getElementById('log').textContent)")
        page.wait("document.getElementById('notice').hidden")
        child = nursery.start("run", "-c", config)
        page.wait(f"{phase} === 'running'")
        before = page.run("pipelineView.page.state.iteration")
        page.wait(f"pipelineView.page.state.iteration > {before}", 60)
        assert page.run("window.stayed")
    finally:
        child.kill()
        code, text = server.end()
    assert (code, "Traceback" in text) == (0, False)


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="Linux with CONFIG_SCHED_AUTOGROUP")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_has_a_session_of_its_own_with_a_low_priority_and_ends_with_its_parent(finished, number) -> None:
    """In the terminal's session, its priority would not count against a run in another terminal."""
    server = Server(finished / "run")
    (child,) = server.process.children()
    assert os.getsid(child.pid) == child.pid
    assert child.nice() == min(os.nice(0) + 10, 19)
    assert Path(f"/proc/{child.pid}/autogroup").read_text(encoding="ascii").endswith("nice 10\n")
    assert server.end(number)[0] == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    child.wait(30)


def test_gallery_and_page_of_a_preview_work_on_any_host(page, finished, tmp_path) -> None:
    gallery = pipeline.gallery(finished / "run", tmp_path / "gallery", title="Small", stage=0, credit="by me")
    pipeline.gallery(finished / "run", gallery, title="Large", add=True)
    with hosted(gallery) as address:
        page.errors(), page.hosts()
        page.driver.get(address)
        page.wait("pipelineView.viewA.layers.get('a')?.item?.getContentSize().x === 150")
        assert "by me" in page.run("document.getElementById('facts').textContent")
        page.do("pipelineView.setMode('beside')")
        page.do("document.querySelectorAll('#works button')[1].click()")
        page.wait("pipelineView.viewA.layers.get('a').item.getContentSize().x === 300")
        page.wait_for_tiles()
        for view in ("A", "B"):  # the whole picture fits each half
            bounds = f"pipelineView.view{view}.viewer.viewport.getBounds(true)"
            page.wait(f"((box) => box.x <= 0.001 && box.x + box.width >= 0.999)({bounds})")
        assert (page.run("document.title"), page.errors(), page.hosts()) == ("Large", [], {"127.0.0.1"})
    config, vary = finished / "config.yaml", ["loss.style_weight=0.5,2"]
    pipeline.preview(config, pipeline.GridSpec(vary, ["optimizer.max_iterations=1"], 150, page=tmp_path / "grid"))
    with hosted(tmp_path / "grid") as address:
        page.driver.get(address)
        page.wait("window.previewGrid?.views.every(({world}) => world.getItemCount() === 1)")
        page.do("previewGrid.views[0].viewport.zoomTo(3, null, true)")
        page.wait("Math.abs(previewGrid.views[1].viewport.getZoom(true) - 3) < 1e-6")
        page.driver.find_elements("css selector", "figcaption button")[1].click()
        assert "--set loss.style_weight=2" in page.run("document.getElementById('command').textContent")
        text = page.run("fetch(document.getElementById('download').href).then((answer) => answer.text())")
        assert "style_weight: 2" in text
        assert (page.errors(), page.hosts()) == ([], {"127.0.0.1"})
