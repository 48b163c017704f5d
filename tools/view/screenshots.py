"""Screenshots of the pages for docs/viewer.md, at 1,280 and 390 px, light and dark.

python -m tools.view.screenshots docs/pictures --run RUN_DIR --gallery GALLERY --page PREVIEW_PAGE
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pyvips

import pipeline
from tests.support.browser import Browser, browser, hosted

# (name, width and height of the window, scheme of colours, mode, map) of the page of a run.
SHOTS = (
    ("viewer_light", 1280, 800, "light", "swipe", ""),
    ("viewer_dark", 1280, 800, "dark", "beside", ""),
    ("viewer_map", 1280, 800, "light", "single", "style"),
    ("viewer_phone", 390, 760, "dark", "swipe", ""),
)


def shoot(page: Browser, path: Path) -> None:
    """Save the page once everything has come to rest."""
    page.wait("new Promise((done) => setTimeout(() => done(true), 1500))")
    pyvips.Image.new_from_array(page.pixels()).write_to_file(str(path), Q=85)


def look(page: Browser, address: str, width: int, height: int, scheme: str) -> None:
    """Open a page at a size and in a scheme of colours."""
    page.resize(width, height)
    page.scheme(scheme)
    page.driver.get(address)
    page.wait("document.body.dataset.ready === 'yes'")


def shoot_run(page: Browser, address: str, folder: Path) -> None:
    """The page of a run, in every mode."""
    for name, width, height, scheme, mode, kind in SHOTS:
        look(page, address, width, height, scheme)
        page.wait("pipelineView.page.state.pictures.filter((one) => one.kind === 'input').every((one) => one.version)")
        page.do(f"pipelineView.setMode('{mode}')")
        page.do(f"document.getElementById('map').value = '{kind}'; pipelineView.map.choose('{kind}')")
        page.wait_for_tiles()
        shoot(page, folder / f"{name}.jpg")


def shoot_gallery(page: Browser, address: str, folder: Path) -> None:
    """The newest picture of a gallery, before and after."""
    look(page, address, 1280, 800, "light")
    page.wait("pipelineView.viewA.layers.get('a')?.item != null")
    page.do("pipelineView.setMode('swipe')")
    page.do("pipelineView.works.step(100)")
    page.wait_for_tiles()
    shoot(page, folder / "viewer_gallery.jpg")


def shoot_preview(page: Browser, address: str, folder: Path) -> None:
    """The images of a preview, one of which is chosen."""
    look(page, address, 1280, 800, "dark")
    page.wait("window.previewGrid?.views.every(({world}) => world.getItemCount() === 1)")
    page.do("document.querySelectorAll('figcaption button')[1].click()")
    shoot(page, folder / "viewer_preview.jpg")


@contextmanager
def viewed(run: Path) -> Iterator[str]:
    """The address of a viewer of a run."""
    stop, ready, addresses = threading.Event(), threading.Event(), list[str]()

    def on_ready(address: str) -> None:
        addresses.append(address)
        ready.set()

    thread = threading.Thread(target=pipeline.view, args=(run,), kwargs={"on_ready": on_ready, "stop": stop})
    thread.start()
    try:
        ready.wait(60)
        yield addresses[0]
    finally:
        stop.set()
        thread.join()


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--run", type=click.Path(path_type=Path))
@click.option("--gallery", type=click.Path(path_type=Path))
@click.option("--page", "preview", type=click.Path(path_type=Path))
def main(folder: Path, run: Path | None, gallery: Path | None, preview: Path | None) -> None:
    """Write screenshots into FOLDER."""
    kinds: list[tuple[Path | None, Callable[[Path], object], Callable[[Browser, str, Path], None]]] = [
        (run, viewed, shoot_run),
        (gallery, hosted, shoot_gallery),
        (preview, hosted, shoot_preview),
    ]
    with browser() as page:
        for source, served, take in kinds:
            if source is not None:
                with served(source) as address:  # type: ignore[attr-defined]
                    take(page, address, folder)


if __name__ == "__main__":
    main()
