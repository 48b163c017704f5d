"""Make the pictures of docs/controls.md: what each control changes, side by side, each with its keys.

    python tools/make_controls.py                 all of them
    python tools/make_controls.py tv color        some

Every picture is a run of its own, of the samples in configs/samples and the packaged network, in a folder of --folder
that is named after its keys: what was rendered before is not rendered again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pyvips
import yaml

import pipeline

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "configs" / "samples"
GAP_PX, LABEL_PX, HEIGHT_PX = 8, 26, 300
MOST_BYTES = 150_000
# The quickstart's settings, at a size that is rendered in a minute; a control's keys come on top.
BASE: dict[str, Any] = {
    "content": str(SAMPLES / "landscape.jpg"),
    "styles": [{"image": str(SAMPLES / "strokes.jpg")}],
    "output": "out.png",
    "size": 320,
    "initial_size": 160,
    "network": {"name": "vgg19-lite", "pooling": "average"},
    "loss": {"content_weight": 0.02},
    "optimizer": {"target_pixel_change": 5},
}
Keys = dict[str, Any]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Control:
    """One picture of the docs: (label, keys) of every render in it, and the part of them that is shown, in px.

    `inputs`: pictures to show before them, by label. Files that it needs, and has not, are made by `prepare`.
    """

    renders: Sequence[tuple[str, Keys]]
    crop: Box | None = None
    inputs: Sequence[tuple[str, str]] = ()
    prepare: Callable[[Path], None] = lambda folder: None


CONTROLS: dict[str, Control] = {
    "tv": Control(
        [
            ("tv_weight: 0", {"network": {"pooling": "max"}}),
            ("tv_weight: 0.3", {"network": {"pooling": "max"}, "loss": {"tv_weight": 0.3}}),
            ("tv_weight: 2", {"network": {"pooling": "max"}, "loss": {"tv_weight": 2.0}}),
        ],
        crop=(170, 100, 150, 140),
    ),
    "color": Control(
        [
            ("color: style", {}),
            ("color: content", {"color": "content"}),
            ("color: luminance", {"color": "luminance"}),
        ],
    ),
}


def merged(base: Keys, keys: Keys) -> Keys:
    """`base` with `keys`: sections are merged, all else is replaced."""
    both = {**base, **keys}
    return both | {
        key: merged(base[key], value)
        for key, value in keys.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }


def render(keys: Keys, folder: Path) -> Any:
    """The picture of BASE with `keys`, of a run in a folder of its own."""
    config = merged(BASE, keys)
    run_dir = folder / hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return pyvips.Image.new_from_file(str(pipeline.run(pipeline.load_config(path))))


def labelled(image: Any, label: str) -> Any:
    """The image at HEIGHT_PX, with its label under it."""
    image = image.colourspace("srgb").extract_band(0, n=3)
    image = image.resize(HEIGHT_PX / image.height, kernel="lanczos3" if image.height > HEIGHT_PX else "cubic")
    text = pyvips.Image.text(label, font="sans 11", dpi=96)
    shown = (255 - text).gravity("centre", image.width, LABEL_PX, extend="white").colourspace("srgb")
    return image.join(shown, "vertical")


def picture(control: Control, folder: Path) -> Any:
    """Inputs and renders of a control in one row."""
    control.prepare(folder)
    parts = [labelled(pyvips.Image.new_from_file(str(folder / name)), label) for label, name in control.inputs]
    for label, keys in control.renders:
        made = render(keys, folder)
        parts.append(labelled(made.crop(*control.crop) if control.crop else made, label))
    row = parts[0]
    for part in parts[1:]:
        row = row.join(part, "horizontal", expand=True, shim=GAP_PX, background=255)
    return row


def save(image: Any, path: Path) -> None:
    """Write a JPEG of at most MOST_BYTES."""
    for quality in range(90, 40, -5):
        data = image.jpegsave_buffer(Q=quality, keep="none")
        if len(data) <= MOST_BYTES:
            break
    path.write_bytes(data)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted(CONTROLS)))
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "out" / "controls")
@click.option("--pictures", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "docs" / "pictures")
def main(names: Sequence[str], folder: Path, pictures: Path) -> None:
    """Render what is missing, and write docs/pictures/controls_NAME.jpg."""
    folder = folder.resolve()
    for name in names or CONTROLS:
        save(picture(CONTROLS[name], folder), pictures / f"controls_{name}.jpg")
        click.echo(name)


if __name__ == "__main__":
    main()
