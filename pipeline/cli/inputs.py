"""What the arguments of `run` and `init` are: configs, folders of configs, or images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.arguments import with_options
from pipeline.core.presets import PRESETS

if TYPE_CHECKING:
    from pipeline.config import OneLine

_CONFIG_SUFFIXES = (".yaml", ".yml")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".heic", ".heif", ".avif", ".gif")
# How much of a file with another suffix is looked at.
_HEAD_BYTES = 1024


@dataclass(frozen=True)
class Inputs:
    """The configs to run in turn, or the images of one line."""

    configs: tuple[Path, ...] = ()
    line: OneLine | None = None


# The options of a command line with images.
with_images = with_options(
    click.option("-o", "--output", metavar="FILE", help="With images: the image to write."),
    click.option("--size", metavar="SIZE", help="With images: long side, such as 4096 or 60cm."),
    click.option("--dpi", metavar="N", help="With images: dots per inch, such as 150."),
    click.option("--preset", type=click.Choice(PRESETS), help="Settings for a kind of picture."),
)


def inputs_of(
    files: Sequence[str], config_path: Path | None, images: dict[str, str | None], overrides: tuple[str, ...]
) -> Inputs:
    """The runs that the arguments of `run` ask for. `images`: the options for images. Raises UsageError."""
    if config_path is not None:
        if files:
            raise click.UsageError(f"give either --config or {files[0]}, not both")
        _refuse_image_options(images)
        return Inputs((config_path,))
    if not files:
        raise click.UsageError("give a content image and its style images, or configs; see pipeline run --help")
    first_config = next((name for name in files if _is_config(name)), None)
    first_image = next((name for name in files if not _is_config(name)), None)
    if first_config is not None and first_image is not None:
        raise click.UsageError(
            f"{first_config} is a config and {first_image} an image: give images with -o, or configs alone"
        )
    if first_config is None:
        return Inputs(line=line_of(files, images, overrides))
    _refuse_image_options(images)
    configs = [path for name in files for path in _configs_at(Path(name))]
    return Inputs(tuple({path.resolve(): path for path in configs}.values()))


def line_of(files: Sequence[str], images: dict[str, str | None], overrides: tuple[str, ...]) -> OneLine:
    """The images of a command line: the content, then the styles. Raises UsageError."""
    from pipeline.config import OneLine  # noqa: PLC0415 - slow

    if len(files) < 2:
        raise click.UsageError(f"{files[0]} is the content: give at least one style image too")
    output = images["output"]
    if output is None:
        raise click.UsageError("give the image to write, such as -o out.png")
    rest = {name: images[name] for name in ("size", "dpi", "preset")}
    return OneLine(files[0], tuple(files[1:]), output, **rest, overrides=overrides)


def split_config(files: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The config to write among the arguments of `init`, and the images. Raises UsageError for several configs."""
    configs = [name for name in files if name == "-" or _is_config(name)]
    if len(configs) > 1:
        raise click.UsageError(f"{configs[0]} and {configs[1]}: give one config to write")
    return (Path(configs[0]) if configs else None), [name for name in files if name not in configs]


def _refuse_image_options(images: dict[str, str | None]) -> None:
    examples = {"output": "output=out.png", "size": "size=4096", "dpi": "export.dpi=150", "preset": "preset=portrait"}
    for name, value in images.items():
        if value is not None:
            raise click.UsageError(f"--{name} is for images; with a config use --set, such as --set {examples[name]}")


def _is_config(name: str) -> bool:
    """Whether an argument is a config or a folder, by its suffix, else by its content: a config is text."""
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in _CONFIG_SUFFIXES or path.is_dir():
        return True
    if suffix in _IMAGE_SUFFIXES:
        return False
    try:
        with path.open("rb") as file:
            text = file.read(_HEAD_BYTES).decode("utf-8", "ignore")
    except (OSError, ValueError):
        return False
    head = text.lstrip()
    return bool(head) and not head.startswith("<") and "\0" not in text and ":" in text


def _configs_at(path: Path) -> list[Path]:
    """A config, or those of a folder in the order of their names. Raises UsageError for a folder without one."""
    if not path.is_dir():
        return [path]
    found = sorted(
        entry
        for entry in path.iterdir()
        if entry.suffix.lower() in _CONFIG_SUFFIXES and not entry.name.startswith(".") and entry.is_file()
    )
    if not found:
        raise click.UsageError(f"{path}: a folder without configs ({', '.join(_CONFIG_SUFFIXES)})")
    return found
