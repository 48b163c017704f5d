"""Which masks a stage has, and the names of their arrays."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.store.layout import CONTENT_GUIDE, guide_name, style_key


@dataclass(frozen=True)
class Guides:
    """What guides the losses of a stage: this many masks of styles; maybe styles for the rest; maybe a content map."""

    masks: int = 0
    rest: bool = False
    content: bool = False

    @property
    def regions(self) -> int:
        """Regions with Grams of their own; 0 where all styles paint the whole canvas."""
        return self.masks + self.rest if self.masks else 0

    @property
    def arrays(self) -> tuple[str, ...]:
        """The stage's arrays that keep them, one channel of 0..255 each."""
        return *map(guide_name, range(self.masks)), *([CONTENT_GUIDE] if self.content else [])

    def keys(self, layer: str) -> tuple[str, ...]:
        """The style terms of a layer: itself, or one per region."""
        return tuple(style_key(layer, region) for region in range(self.regions)) or (layer,)


UNGUIDED = Guides()
