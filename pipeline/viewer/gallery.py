"""Finished pictures as a folder for any web host: the page of `pipeline view`, DeepZoom tiles and no server.

gallery/index.html          the page
gallery/gallery.json        the works: title, credit, and the pictures of each, the result first
gallery/assets/…            scripts and style
gallery/tiles/NAME.dz/…     the tiles of each picture
"""

from __future__ import annotations

import itertools
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
from pipeline.core.files import partial_beside, read_regular, rename_synced, sync_file_system, taken, write_whole
from pipeline.core.lengths import DEFAULT_DPI
from pipeline.core.text import shown
from pipeline.images import srgb_output
from pipeline.plan import sheets_of
from pipeline.render.export import export_canvas
from pipeline.store import StageArray
from pipeline.viewer import assets

# What libvips makes: tiles of 254 px with one px of their neighbours on each side.
_TILE_PX, _OVERLAP_PX = 254, 1
_LIST = "gallery.json"
_MAX_LIST_BYTES = 2**24


@dataclass(frozen=True)
class GalleryPicture:
    """One picture of a work: a name for its folder, a title, its pixels, in the colours of `space`, and their alpha."""

    name: str
    title: str
    pixels: StageArray
    alpha: StageArray | None = None
    space: SpaceName = "srgb"


@dataclass(frozen=True)
class Work:
    """One work of a gallery. `pictures`: the result first, then what it is compared with. `dpi`: of the print."""

    title: str
    credit: str
    pictures: Sequence[GalleryPicture]
    dpi: float | None = None


def write_gallery(
    output: Path, work: Work, cancel: CancelToken, on_progress: Callable[[int, int], None], *, add: bool = False
) -> None:
    """Write the folder `output`, which gets its name when it is complete; with `add`, add the work to the one there.

    Raises ConfigError if the name is taken, or to be added to and no gallery; StorageError, Stopped. Then nothing is
    left behind, and a gallery that was there is as it was.
    """
    works = read_works(output) if add else []
    if not add and taken(output):
        raise ConfigError(
            f"output {output}: exists. Choose another name, or add the picture to this gallery with --add."
        )
    # a crash may have left tiles that the list does not name
    names = {path.stem for path in (output / "tiles").glob("*.dz")} if add else set()
    with storage(output), partial_beside(output) as partial:
        (partial / "tiles").mkdir(parents=True)
        entry = _write_work(partial / "tiles", work, names, cancel, on_progress)
        if add:
            for folder in (partial / "tiles").iterdir():
                folder.rename(output / "tiles" / folder.name)
            sync_file_system(output)
            _write_page(output, [*works, entry])  # the list last: until then the page does not know the tiles
        else:
            _write_page(partial, [entry])
            sync_file_system(partial)
            rename_synced(partial, output)


def read_works(output: Path) -> list[dict[str, Any]]:
    """The works of a gallery. Raises ConfigError if the folder is none."""
    try:
        works = json.loads(read_regular(output / _LIST, _MAX_LIST_BYTES))["works"]
        if works and all(isinstance(picture["id"], str) for work in works for picture in work["pictures"]):
            return list(works)
        raise ValueError("it has no works")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"--add: {output} is no gallery ({shown(str(error), 200)}). Omit --add to make one."
        ) from error


def _write_work(
    folder: Path, work: Work, names: set[str], cancel: CancelToken, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Write the tiles of a work under names that are free, and give its entry in the list."""
    entries = []
    for number, picture in enumerate(work.pictures):
        name = next(name for name in _names(picture.name) if name not in names)
        names.add(name)
        planes = [picture.pixels, *([] if picture.alpha is None else [picture.alpha])]
        options = ExportConfig(bits=8, quality=90, dpi=DEFAULT_DPI)
        (sheet,) = sheets_of(folder / f"{name}.dz", picture.pixels.shape[:2], options)
        share = _part(on_progress, number, len(work.pictures))
        export_canvas(planes, sheet, options, srgb_output(picture.space), cancel, share)
        entries.append(_entry(name, picture))
    return {"title": work.title, "credit": work.credit, "dpi": work.dpi, "pictures": entries}


def _names(name: str) -> itertools.chain[str]:
    return itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))


def _part(on_progress: Callable[[int, int], None], number: int, count: int) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(number * total + done, count * total)


def _write_page(folder: Path, works: Sequence[dict[str, Any]]) -> None:
    write_static_page(folder, "index.html")
    text = json.dumps({"page": assets.page_version(), "works": works}, indent=1)
    write_whole(folder / _LIST, text.encode())


def write_static_page(folder: Path, page: str) -> None:
    """Write a page of the viewer as index.html of a folder, with all files that it needs."""
    (folder / "assets").mkdir(exist_ok=True)
    source = Path(assets.__file__).with_name("assets")
    for name, data in assets.page_files().items():
        if name == page:
            text = data.decode().replace("<html", '<html data-gallery="yes"', 1)
            (folder / "index.html").write_text(text, encoding="utf-8")
        elif not name.endswith(".html"):
            (folder / "assets" / name).write_bytes(data)
    for name in assets.LICENSES:
        shutil.copyfile(source / name, folder / "assets" / name)


def _entry(name: str, picture: GalleryPicture) -> dict[str, Any]:
    height, width, _ = picture.pixels.shape
    return {
        "id": name,
        "version": "1",
        "tiles": f"tiles/{name}.dz/{name}_files/",
        "title": picture.title,
        "kind": "gallery",
        "problem": "",
        "height": height,
        "width": width,
        "tile_px": _TILE_PX,
        "overlap": _OVERLAP_PX,
        "format": "jpg" if picture.alpha is None else "png",
    }
