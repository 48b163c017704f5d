"""Plans from numbers alone: configs and image headers without files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.config import Config
from pipeline.core.image_formats import RGB8, PixelKind
from pipeline.core.vgg_layers import VGG19_WIDTHS
from pipeline.images.color import PLAIN_RGB, ColorSource
from pipeline.plan import Device
from pipeline.plan.plan import make_plan
from pipeline.plan.sizes import stage_sizes
from tests.support.inputs import plain


@dataclass(frozen=True)
class Header:
    """The header of an image that does not exist."""

    height_px: int
    width_px: int
    bits: int = 8
    decode_bytes: int = 0
    kind: PixelKind = RGB8
    dpi: float | None = None
    scratch_bytes: int = 0
    notes: tuple[str, ...] = ()
    path: Path = Path("/c.png")
    colors: ColorSource = PLAIN_RGB


def config_of(**values) -> Config:
    base = {"content": "/c.png", "styles": [{"image": "/s.png"}], "output": "/o.tif"}
    return Config.model_validate(base | plain(values), context={"base": Path("/")})


def planned(
    content_size=(1000, 800),
    style_sizes=((700, 900),),
    widths=VGG19_WIDTHS,
    device="cpu",
    device_bytes=0,
    **values,
):
    values.setdefault("styles", [{"image": f"/s{index}.png"} for index in range(len(style_sizes))])
    return make_plan(
        config_of(**values), headers(content_size, style_sizes), widths, 0, Device(device, device, device_bytes)
    )


def headers(content, styles) -> dict[Path, Header]:
    """Headers of /c.png, and of /s0.png, /s1.png, …"""
    named = {Path(f"/s{index}.png"): Header(*size) for index, size in enumerate(styles)}
    return named | ({Path("/c.png"): Header(*content)} if content else {})


def sizes_of(content, styles, initial_px, target_px, styles_values=None, **values):
    """The stages' sizes. `styles_values`: further keys of each style."""
    values["styles"] = [
        {"image": f"/s{index}.png", **more} for index, more in enumerate(styles_values or [{}] * len(styles))
    ]
    config = config_of(initial_size=initial_px, size=target_px, **values)
    return stage_sizes(config, headers(content, styles))
