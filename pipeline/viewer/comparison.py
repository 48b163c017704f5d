"""The images of a preview as a folder for any web host: side by side, zoomed together, each with its settings.

grid/index.html             the page
grid/grid.json              the images row by row: settings, command and config of each
grid/pictures/1.png …       the images
grid/assets/…               scripts and style
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import ConfigError, storage
from pipeline.core.files import partial_beside, rename_synced, sync_file_system, taken
from pipeline.core.tiling import Size
from pipeline.viewer.gallery import write_static_page


@dataclass(frozen=True)
class ComparedPicture:
    """One image: its file and (height, width), the settings that it differs by, and what renders it in full size."""

    picture: Path
    size: Size
    settings: tuple[str, ...]
    command: str
    config_text: str


def refuse_taken(output: Path) -> None:
    """Raise ConfigError if the name of the folder is taken."""
    if taken(output):
        raise ConfigError(f"--page {output}: exists, and a page is a new folder. Choose another name.")


def write_comparison(output: Path, title: str, pictures: Sequence[ComparedPicture], across: int) -> None:
    """Write the folder `output`, which gets its name when it is complete. Raises ConfigError if that is taken."""
    refuse_taken(output)
    with storage(output), partial_beside(output) as partial:
        (partial / "pictures").mkdir(parents=True)
        entries = []
        for number, one in enumerate(pictures, start=1):
            name = f"pictures/{number}{one.picture.suffix}"
            shutil.copyfile(one.picture, partial / name)
            size = {"height": one.size[0], "width": one.size[1]}
            choice = {"settings": one.settings, "command": one.command, "config": one.config_text}
            entries.append({"picture": name, **size, **choice})
        text = json.dumps({"title": title, "across": across, "pictures": entries}, indent=1)
        (partial / "grid.json").write_text(text, encoding="utf-8")
        write_static_page(partial, "grid.html")
        sync_file_system(partial)
        rename_synced(partial, output)
