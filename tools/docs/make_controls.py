"""Make the images of docs/controls.md: the effect of each control, side by side, labelled with its keys.

    python -m tools.docs.make_controls                 all of them
    python -m tools.docs.make_controls tv color        some

Every image is a run of its own with the samples in configs/samples and the packaged network, in a folder of --folder
that is named after a hash of its config, so that nothing is rendered twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyvips
import yaml

import pipeline
from pipeline.core.presets import PRESETS

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "configs" / "samples"
FONT = Path(pipeline.__file__).parent / "assets" / "DejaVuSans.ttf"
GAP_PX, LABEL_PX, HEIGHT_PX = 8, 26, 300
MAX_BYTES = 150_000
# The defaults, at a size that renders in a minute; the keys of a control override them.
BASE: dict[str, Any] = {
    "content": str(SAMPLES / "landscape.jpg"),
    "styles": [{"image": str(SAMPLES / "strokes.jpg")}],
    "output": "out.png",
    "size": 320,
    "initial_size": 160,
    "stage_ratio": 2,
    "network": {"name": "vgg19-lite"},
}
Keys = dict[str, Any]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Control:
    """One figure of the docs: (label, keys) of each of its renders, and the part of them that is shown, in px.

    `inputs`: (label, file) of images shown before the renders. `prepare` creates the files that the renders need.
    """

    renders: Sequence[tuple[str, Keys]]
    crop: Box | None = None
    inputs: Sequence[tuple[str, str]] = ()
    prepare: Callable[[Path], None] = lambda folder: None


def draw_dots(folder: Path) -> None:
    """Draw a second painting, dots.png: brush-sized discs of strong colours on dark blue."""
    rng = np.random.default_rng(0)
    dots = np.full((480, 480, 3), (20, 30, 70), np.uint8)
    y, x = np.mgrid[:480, :480]
    colours = np.array([(240, 200, 40), (230, 70, 50), (60, 170, 200), (245, 240, 220), (120, 60, 150)])
    for cy, cx, radius in zip(
        rng.integers(0, 480, 900), rng.integers(0, 480, 900), rng.integers(5, 10, 900), strict=True
    ):
        dots[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = rng.choice(colours)
    folder.mkdir(parents=True, exist_ok=True)
    pyvips.Image.new_from_array(dots, interpretation="srgb").write_to_file(str(folder / "dots.png"))


STROKES = str(SAMPLES / "strokes.jpg")
DOTS: Keys = {"image": "../dots.png"}  # relative to a run's folder
RECONSTRUCTED: Keys = {"styles": [], "loss": {"content_weight": 1.0, "style_weight": 0.0}, "init": "noise"}

CONTROLS: dict[str, Control] = {
    "stages": Control(
        [
            ("strokes at every stage", {}),
            ("dots from 161 px on", {"stages": [{"up_to": 160}, {"up_to": 320, "styles": [DOTS]}]}),
            ("dots up to 160 px", {"stages": [{"up_to": 160, "styles": [DOTS]}]}),
        ],
        inputs=[("dots.png", "dots.png")],
        prepare=draw_dots,
    ),
    "styles": Control(
        [
            ("strokes 1", {"styles": [{"image": STROKES}]}),
            ("strokes 1, dots 1", {"styles": [{"image": STROKES}, DOTS]}),
            ("dots 1", {"styles": [DOTS]}),
        ],
        prepare=draw_dots,
    ),
    "style_size": Control(
        [
            ("max_size: null", {"styles": [DOTS]}),
            ("max_size: 120", {"styles": [{**DOTS, "max_size": 120}]}),
        ],
        prepare=draw_dots,
    ),
    "init": Control([(f"init: {init}", {"init": init}) for init in ("content", "noise", "gray")]),
    "texture": Control(
        [
            ("preset: texture, size: [320, 240]", {"preset": "texture", "content": None, "size": [320, 240]}),
            (
                "dots, size: 240",
                {"preset": "texture", "content": None, "size": 240, "styles": [DOTS]},
            ),
        ],
        inputs=[("dots.png", "dots.png")],
        prepare=draw_dots,
    ),
    "reconstruction": Control(
        [
            (f"content_layers: {{{layer}: 1}}", {**RECONSTRUCTED, "network": {"content_layers": {layer: 1.0}}})
            for layer in ("conv1_1", "conv3_1", "conv4_2", "conv5_1")
        ]
    ),
    "layers": Control(
        [
            (f"style_layers up to {last}", {"network": {"style_layers": dict.fromkeys(names, 1 / len(names))}})
            for last, names in (
                ("conv1_1", ("conv1_1",)),
                ("conv3_1", ("conv1_1", "conv2_1", "conv3_1")),
                ("conv5_1", ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")),
            )
        ]
    ),
}


def merged(base: Keys, keys: Keys) -> Keys:
    """`base` overridden by `keys`: sections are merged, other values are replaced."""
    both = {**base, **keys}
    return both | {
        key: merged(base[key], value)
        for key, value in keys.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }


def draw_masks(folder: Path) -> None:
    """Draw sky.png, white above the horizon of landscape.jpg, and house.png, white around its house; soft edges."""
    draw_dots(folder)
    y, x = np.mgrid[:240, :320] / 240
    sky = np.clip((0.56 - y) / 0.06, 0, 1)
    house = np.clip(2.5 - 2 * np.hypot(x - 1.1, y - 0.76) / 0.16, 0, 1)
    for name, mask in (("sky", sky), ("house", house)):
        grey = pyvips.Image.new_from_array(np.rint(255 * mask).astype(np.uint8), interpretation="b-w")
        grey.write_to_file(str(folder / f"{name}.png"))


def draw_cutout(folder: Path) -> None:
    """Draw cutout.png: landscape.jpg in a disc with a soft edge, transparent around it."""
    folder.mkdir(parents=True, exist_ok=True)
    content = pyvips.Image.new_from_file(str(SAMPLES / "landscape.jpg"))
    y, x = np.mgrid[: content.height, : content.width] / content.height
    disc = np.clip((0.48 - np.hypot(x - 2 / 3, y - 0.5)) / 0.05, 0, 1)
    alpha = pyvips.Image.new_from_array(np.rint(255 * disc).astype(np.uint8), interpretation="b-w")
    content.bandjoin(alpha).write_to_file(str(folder / "cutout.png"))


PAINTED: Keys = {"image": STROKES}
SKY = "../sky.png"
CONSTANT: Keys = {"target_pixel_change": 40.0, "schedule": "constant", "stop_condition": 0.0}
# The paper's loss, colours and pooling have the most grain.
GRAINY: Keys = {
    "network": {"pooling": "max"},
    "loss": {"kind": "normalized", "tv_weight": 0},
    "optimizer": {"target_pixel_change": 12.8, "color_space": "rgb"},
}
CONTROLS |= {
    "presets": Control(
        [
            (name, {"preset": name, **({"content": None, "size": [320, 240]} if name == "texture" else {})})
            for name in PRESETS
        ]
    ),
    "kind": Control(
        [
            ("wasserstein", {}),
            ("normalized", {"loss": {"kind": "normalized"}}),
            ("gatys", {"loss": {"kind": "gatys", "content_weight": 1e-4}}),
        ]
    ),
    "color_space": Control(
        [(space, {"optimizer": {"color_space": space}}) for space in ("decorrelated", "rgb")],
        crop=(160, 80, 160, 160),
    ),
    "pooling": Control(
        [(pooling, {"network": {"pooling": pooling}}) for pooling in ("mixed", "max", "average", "tent", "l2")],
        crop=(160, 80, 160, 160),
    ),
    "average": Control(
        [
            (f"average: {average:g}", merged(GRAINY, {"optimizer": {**CONSTANT, "average": average}}))
            for average in (0.0, 0.9, 0.97)
        ],
        crop=(180, 100, 100, 100),
    ),
    "tv": Control(
        [
            ("tv_weight: 0", {"loss": {"tv_weight": 0.0}}),
            ("2, squared", {"loss": {"tv_weight": 2.0, "tv_kind": "squared"}}),
            ("0.1, absolute", {}),
            ("0.5, absolute", {"loss": {"tv_weight": 0.5}}),
        ],
        crop=(160, 80, 160, 160),
    ),
    "color": Control(
        [(f"color: {color}", {"styles": [PAINTED], "color": color}) for color in ("style", "content", "luminance")]
    ),
    "masks": Control(
        [
            ("without masks", {"styles": [PAINTED, DOTS]}),
            ("strokes where it is white, dots elsewhere", {"styles": [{**PAINTED, "mask": SKY}, DOTS]}),
            ("dots where it is white, strokes elsewhere", {"styles": [PAINTED, {**DOTS, "mask": SKY}]}),
        ],
        inputs=[("mask: sky.png", "sky.png")],
        prepare=draw_masks,
    ),
    "content_mask": Control(
        [
            ("content_mask: null", {"styles": [PAINTED], "loss": {"content_weight": 0.3}}),
            (
                "content_mask: house.png",
                {"styles": [PAINTED], "loss": {"content_weight": 0.3, "content_mask": "../house.png"}},
            ),
        ],
        inputs=[("house.png", "house.png")],
        prepare=draw_masks,
    ),
    "alpha": Control(
        [("out.png", {"content": "../cutout.png", "styles": [PAINTED]})],
        inputs=[("content: cutout.png", "cutout.png")],
        prepare=draw_cutout,
    ),
}


def render(keys: Keys, folder: Path) -> Any:
    """The output image of BASE with `keys`, rendered in a folder of its own."""
    config = merged(BASE, keys)
    run_dir = folder / hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return pyvips.Image.new_from_file(str(pipeline.run(pipeline.load_config(path))))


def over_checks(image: Any) -> Any:
    """An image with alpha over a grey checkerboard."""
    y, x = np.mgrid[: image.height, : image.width] // (image.height // 20)
    checks = np.where((y + x) % 2, 200, 240).astype(np.uint8)
    below = pyvips.Image.new_from_array(checks, interpretation="b-w").colourspace("srgb")
    return below.composite2(image, "over")


def labelled(image: Any, label: str) -> Any:
    """The image at HEIGHT_PX with its label below."""
    image = image.colourspace("srgb")
    image = (over_checks(image) if image.hasalpha() else image).extract_band(0, n=3)
    image = image.resize(HEIGHT_PX / image.height, kernel="lanczos3" if image.height > HEIGHT_PX else "cubic")
    text = pyvips.Image.text(label, font="DejaVu Sans 11", fontfile=str(FONT), dpi=96)
    shown = (255 - text).gravity("centre", image.width, LABEL_PX, extend="white").colourspace("srgb")
    return image.join(shown, "vertical")


def figure(control: Control, folder: Path) -> Any:
    """The inputs and renders of a control in one row."""
    control.prepare(folder)
    parts = [labelled(pyvips.Image.new_from_file(str(folder / name)), label) for label, name in control.inputs]
    for label, keys in control.renders:
        image = render(keys, folder)
        parts.append(labelled(image.crop(*control.crop) if control.crop else image, label))
    row = parts[0]
    for part in parts[1:]:
        row = row.join(part, "horizontal", expand=True, shim=GAP_PX, background=255)
    return row


def save(image: Any, path: Path) -> None:
    """Write a JPEG of at most MAX_BYTES."""
    for quality in range(90, 40, -5):
        data = image.jpegsave_buffer(Q=quality, keep="none")
        if len(data) <= MAX_BYTES:
            break
    path.write_bytes(data)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted(CONTROLS)))
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "out" / "controls")
@click.option("--pictures", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "docs" / "pictures")
def main(names: Sequence[str], folder: Path, pictures: Path) -> None:
    """Render missing images and write docs/pictures/controls_NAME.jpg."""
    folder = folder.resolve()
    for name in names or CONTROLS:
        save(figure(CONTROLS[name], folder), pictures / f"controls_{name}.jpg")
        click.echo(name)


if __name__ == "__main__":
    main()
