"""The arrays of a run of `apply`. Loads no torch."""

from __future__ import annotations

from pipeline.config import ApplyConfig
from pipeline.core.image_formats import PixelKind
from pipeline.core.tiling import Size
from pipeline.store import ALPHA, CONTENT, FIXED16, ArraySpec, guide_name

CANVAS = "canvas_1"  # slot 0 is the content: see store.result_name
UNMATCHED = "canvas_0"  # before its histogram is matched


def arrays_of(config: ApplyConfig, content_size: Size, canvas: Size, content: PixelKind) -> dict[str, ArraySpec]:
    """The arrays of the stage: content, alpha, masks, and the canvas that the last pass writes."""
    chunk_px = config.store.chunk_px
    pixels = "uint8" if content.bits == 8 else FIXED16.name
    arrays = {CONTENT: ArraySpec((*content_size, 3), chunk_px, pixels)}
    if content.alpha:
        arrays[ALPHA] = ArraySpec((*canvas, 1), chunk_px, pixels)
    arrays |= {guide_name(index): ArraySpec((*canvas, 1), chunk_px, "uint8") for index in range(len(config.masks))}
    form = FIXED16.name if config.store.state_dtype == "compact" else _float(config)
    arrays[CANVAS] = ArraySpec((*canvas, 3), chunk_px, form)
    if config.match_histogram:
        arrays[UNMATCHED] = arrays[CANVAS]
    return arrays


def mask_arrays(config: ApplyConfig) -> tuple[str | None, ...]:
    """The array of each network's mask; None where it has none."""
    numbers = iter(range(len(config.masks)))
    return tuple(None if network.mask is None else guide_name(next(numbers)) for network in config.networks)


def _float(config: ApplyConfig) -> str:
    return "float64" if config.compute.dtype == "float64" else "float32"
