"""Screenshots of the page for docs/viewer.md, at 1,280 and 390 px, light and dark.

python -m tools.view.screenshots RUN_DIR docs/pictures
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pyvips

import pipeline
from tests.support.browser import Browser, browser

SHOTS = (
    ("viewer_light", 1280, 800, "light", "swipe"),
    ("viewer_dark", 1280, 800, "dark", "beside"),
    ("viewer_phone", 390, 760, "dark", "swipe"),
)


def take(page: Browser, address: str, folder: Path) -> None:
    for name, width, height, scheme, mode in SHOTS:
        page.resize(width, height)
        page.scheme(scheme)
        page.driver.get(address)
        page.wait("document.body.dataset.ready === 'yes' && pipelineView.viewA.layers.get('a')?.item != null")
        page.wait("pipelineView.page.state.pictures.filter((one) => one.kind === 'input').every((one) => one.version)")
        page.do(f"pipelineView.setMode('{mode}')")
        page.wait_for_tiles()
        page.wait("new Promise((done) => setTimeout(() => done(true), 1500))")  # the view glides to its place
        page.wait_for_tiles()
        pyvips.Image.new_from_array(page.pixels()).write_to_file(str(folder / f"{name}.jpg"), Q=85)


def main() -> None:
    run_dir, folder = map(Path, sys.argv[1:])
    stop, ready, addresses = threading.Event(), threading.Event(), []

    def on_ready(address: str) -> None:
        addresses.append(address)
        ready.set()

    thread = threading.Thread(target=pipeline.view, args=(run_dir,), kwargs={"on_ready": on_ready, "stop": stop})
    thread.start()
    try:
        ready.wait(60)
        with browser() as page:
            take(page, addresses[0], folder)
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    main()
