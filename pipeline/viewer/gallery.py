"""A finished picture as a folder for any web host: the page of `pipeline view`, DeepZoom tiles and no server.

gallery/index.html         the page
gallery/gallery.json       its pictures, title and credits
gallery/assets/…           scripts and style
gallery/tiles/NAME.dz/…    the tiles of each picture
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ExportConfig
from pipeline.core.cancel import CancelToken
from pipeline.core.color_spaces import SpaceName
from pipeline.core.errors import ConfigError, storage
from pipeline.core.files import new_partial, sync_file_system, sync_folder, taken
from pipeline.core.lengths import DEFAULT_DPI
from pipeline.images import srgb_output
from pipeline.plan import sheets_of
from pipeline.render.export import export_canvas
from pipeline.store import StageArray
from pipeline.viewer import assets

# What libvips makes: tiles of 254 px with one px of their neighbours on each side.
_TILE_PX, _OVERLAP_PX = 254, 1


@dataclass(frozen=True)
class GalleryPicture:
    """One picture of a gallery: a name for its folder, a title, and its pixels, in the colours of `space`."""

    name: str
    title: str
    pixels: StageArray
    space: SpaceName = "srgb"


def write_gallery(
    output: Path,
    pictures: Sequence[GalleryPicture],
    title: str,
    credit: str,
    cancel: CancelToken,
    on_progress: Callable[[int, int], None],
) -> None:
    """Write the folder `output`, which gets its name when it is complete. The first picture is shown first.

    Raises ConfigError if the name is taken, StorageError, Stopped; then nothing is left behind.
    """
    if taken(output):
        raise ConfigError(f"output {output}: exists, and a gallery is a new folder. Choose another name.")
    with storage(output):
        partial = new_partial(output)
        try:
            (partial / "tiles").mkdir(parents=True)
            for number, picture in enumerate(pictures):
                tiles = partial / "tiles" / f"{picture.name}.dz"
                share = _part(on_progress, number, len(pictures))
                options = ExportConfig(bits=8, quality=90, dpi=DEFAULT_DPI)
                (sheet,) = sheets_of(tiles, picture.pixels.shape[:2], options)
                export_canvas([picture.pixels], sheet, options, srgb_output(picture.space), cancel, share)
            _write_page(partial, pictures, title, credit)
            sync_file_system(partial)
            partial.replace(output)
            sync_folder(output.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _part(on_progress: Callable[[int, int], None], number: int, count: int) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(number * total + done, count * total)


def _write_page(folder: Path, pictures: Sequence[GalleryPicture], title: str, credit: str) -> None:
    (folder / "assets").mkdir()
    source = Path(assets.__file__).with_name("assets")
    for name, data in assets.page_files().items():
        place = folder / "index.html" if name == "index.html" else folder / "assets" / name
        place.write_bytes(data)
    for name in assets.LICENSES:
        shutil.copyfile(source / name, folder / "assets" / name)
    page = (folder / "index.html").read_text(encoding="utf-8")
    (folder / "index.html").write_text(page.replace("<html", '<html data-gallery="yes"', 1), encoding="utf-8")
    (folder / "gallery.json").write_text(json.dumps(_state(pictures, title, credit), indent=1), encoding="utf-8")


def _state(pictures: Sequence[GalleryPicture], title: str, credit: str) -> dict[str, Any]:
    """The state of a run that is done, as far as a gallery shows it."""
    height, width, _ = pictures[0].pixels.shape
    return {
        "phase": "done",
        "problem": "",
        "page": assets.page_version(),
        "name": title,
        "work_dir": "",
        "credit": credit,
        "width": width,
        "height": height,
        "dpi": None,
        "stage": 0,
        "iteration": 0,
        "eta_s": None,
        "stages": [],
        "log": [],
        "crops": [],
        "allow_crops": False,
        "config_options": [],
        "pictures": [_entry(picture) for picture in pictures],
    }


def _entry(picture: GalleryPicture) -> dict[str, Any]:
    height, width, _ = picture.pixels.shape
    return {
        "id": picture.name,
        "version": "1",
        "tiles": f"tiles/{picture.name}.dz/{picture.name}_files/",
        "title": picture.title,
        "kind": "gallery",
        "problem": "",
        "height": height,
        "width": width,
        "tile_px": _TILE_PX,
        "overlap": _OVERLAP_PX,
    }
