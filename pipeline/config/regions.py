"""Masks: which styles paint where, and where the content counts (Gatys et al., "Controlling perceptual factors").

Styles with the same mask file form a region of the canvas; those without any form one more, of what the masks leave.
A pixel belongs to region r by the share T_r, from the masks m there, 0..1:

    T_r = m_r / max(1, Σ m)          T_rest = max(0, 1 − Σ m)

A stage keeps every mask, and the map of the content's weight, as an array at the size of its canvas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.sections import StyleConfig


@dataclass(frozen=True)
class MaskRegion:
    """A part of the canvas: its mask (None: what the others leave), and the indices of the styles that paint it."""

    mask: Path | None
    styles: tuple[int, ...]


def regions_of(styles: Sequence[StyleConfig]) -> tuple[MaskRegion, ...]:
    """The regions of a stage: one per mask file in the order of the styles, then what is left if it has a style."""
    masks: list[Path | None] = list(dict.fromkeys(style.mask for style in styles if style.mask is not None))
    if any(style.mask is None for style in styles):
        masks.append(None)
    return tuple(
        MaskRegion(mask, tuple(index for index, style in enumerate(styles) if style.mask == mask)) for mask in masks
    )


def shared_masks(styles: Sequence[StyleConfig], start: str) -> Iterator[tuple[str, int]]:
    """(dotted key, the first style with the same mask) of every style that is not the first; keys begin with `start`.

    Masks are compared by content when a run goes on, but which styles have one in common is a matter of names.
    """
    for region in regions_of(styles):
        if region.mask is not None:
            yield from ((f"{start}styles.{index}.mask_of", region.styles[0]) for index in region.styles[1:])
