"""Masks: where each style applies (Gatys et al., "Controlling Perceptual Factors in Neural Style Transfer").

Styles with the same mask file form a region of the canvas. Styles without a mask form one more region, the area that
the masks leave uncovered. With mask values m in 0..1, a pixel belongs to region r with weight T_r:

    T_r = m_r / max(1, Σ m)          T_rest = max(0, 1 − Σ m)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.sections import StyleConfig


@dataclass(frozen=True)
class MaskRegion:
    """A region of the canvas: its mask (None: the area that no mask covers) and the indices of its styles."""

    mask: Path | None
    styles: tuple[int, ...]


def regions_of(styles: Sequence[StyleConfig]) -> tuple[MaskRegion, ...]:
    """The regions of a stage: one per mask file in the order of the styles, then that of the styles without a mask."""
    masks: list[Path | None] = list(dict.fromkeys(style.mask for style in styles if style.mask is not None))
    if any(style.mask is None for style in styles):
        masks.append(None)
    return tuple(
        MaskRegion(mask, tuple(index for index, style in enumerate(styles) if style.mask == mask)) for mask in masks
    )


def shared_masks(styles: Sequence[StyleConfig], prefix: str) -> Iterator[tuple[str, int]]:
    """(dotted key, index of the first style with the same mask) of every further style that shares a mask.

    A resume compares masks by content, which does not say which styles share one: that depends on the file names.
    """
    for region in regions_of(styles):
        if region.mask is not None:
            yield from ((f"{prefix}styles.{index}.mask_of", region.styles[0]) for index in region.styles[1:])
