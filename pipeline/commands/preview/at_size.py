"""The config of a smaller run with the same stages as a larger one, up to a size.

For a run of 130 px with `initial_size: 48` the stages are

    at 96 px       48 ── 96                         stages of the run
    at 100 px      48 ── 96 ── 100                  only the last stage has another size
    at 130 px      48 ── 96 ── 130 ( ── 130 ── …)   the run itself, including stages for styles larger than it
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.config import MAX_SIDE_PX, Config, ExportConfig, StageConfig, StyleConfig
from pipeline.images import read_header
from pipeline.plan import fit, long_sides


def full_px(config: Config) -> int:
    """The long side of the run's result. Raises InputError for a content that is not an image."""
    if config.target_px is not None:
        return config.target_px
    assert config.content is not None  # the config requires a size without a content
    header = read_header(config.content, config.limits)
    return max(header.width_px, header.height_px)


def at_size(config: Config, long_px: int) -> Config:
    """The config of the run up to its stage of this long side, or of the whole run if that is smaller.

    `config`: with a number as `initial_size`, because `auto` depends on the sizes that are changed here.
    If the run has no stage of that size, its next stage is replaced by one, with no style larger than in the run.
    Export options are the defaults.
    """
    if long_px >= full_px(config):
        return config.model_copy(update={"export": ExportConfig()})
    assert config.initial_size != "auto"
    size: int | tuple[int, int] = long_px
    if isinstance(config.size_px, tuple):
        width, height = config.size_px
        shape = fit((height, width), long_px)
        size = shape[1], shape[0]
    sides_px = [min(side_px, long_px) for side_px in long_sides(config.initial_size, config.stage_ratio, long_px)]
    # The config refuses `stages` entries that apply to no stage.
    floors = [0, *(entry.up_to for entry in config.stages)]
    entries = [
        entry
        for floor, entry in zip(floors, config.stages, strict=False)
        if any(floor < side_px <= entry.up_to for side_px in sides_px)
    ]
    if not config.style_stages:  # the sizes of the styles follow from the canvas
        return config.model_copy(update={"size": size, "stages": tuple(entries), "export": ExportConfig()})
    stages = tuple(
        entry.model_copy(update={"styles": _no_larger(entry.styles, long_px)}) if entry.styles else entry
        for entry in entries
    )
    styles = _no_larger(config.styles, long_px)
    shorter = config.model_copy(update={"size": size, "styles": styles, "stages": stages, "export": ExportConfig()})
    last = tuple(_full_at(style, long_px) for style in shorter.for_stage(long_px).styles)
    return shorter.model_copy(update={"stages": _with_last_styles(shorter, sides_px, last)})


def _no_larger(styles: Sequence[StyleConfig], long_px: int) -> tuple[StyleConfig, ...]:
    """The styles, no larger than in the run at a canvas of this size, so that they add no stages."""
    largest = [min(round(long_px * max(style.scale, 1.0)), MAX_SIDE_PX) for style in styles]
    return tuple(
        style.model_copy(update={"max_size": min(max_size, style.max_size or max_size)})
        for style, max_size in zip(styles, largest, strict=True)
    )


def _full_at(style: StyleConfig, long_px: int) -> StyleConfig:
    """The style with a scale at which it reaches max_size at this size; after rounding up it would add a stage."""
    assert style.max_size is not None
    if math.ceil(style.max_size / max(style.scale, 1.0)) <= long_px:
        return style
    scale = style.max_size / long_px
    if math.ceil(style.max_size / scale) > long_px:
        scale = math.nextafter(scale, math.inf)
    return style.model_copy(update={"scale": scale})


def _with_last_styles(
    config: Config, sides_px: Sequence[int], styles: tuple[StyleConfig, ...]
) -> tuple[StageConfig, ...]:
    """The entries of `stages`, with one for the last stage if its styles differ from the others'.

    `sides_px`: the long sides of all stages.
    """
    *earlier, long_px = sides_px
    if styles == config.for_stage(long_px).styles:
        return config.stages
    entries = [entry for entry in config.stages if entry.up_to < long_px]
    last = next((entry for entry in config.stages if entry.up_to >= long_px), StageConfig(up_to=long_px))
    # The stage before the last keeps the entry that applied to it.
    if earlier and (entries[-1].up_to if entries else 0) < earlier[-1]:
        entries.append(last.model_copy(update={"up_to": long_px - 1}))
    return (*entries, last.model_copy(update={"up_to": long_px, "styles": styles}))
