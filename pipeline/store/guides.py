"""The masks of a stage, and the names of their arrays."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.store.layout import CONTENT_GUIDE, guide_name, style_key


@dataclass(frozen=True)
class Guides:
    """Number of style masks, whether other styles cover the rest of the canvas, and whether there is a content map.

    `first`: the number of the first mask's array.
    """

    masks: int = 0
    rest: bool = False
    content: bool = False
    first: int = 0

    @property
    def regions(self) -> int:
        """Number of regions with Gram matrices of their own; 0 if all styles apply to the whole canvas."""
        return self.masks + self.rest if self.masks else 0

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of the mask arrays, of one uint8 channel each."""
        masks = map(guide_name, range(self.first, self.first + self.masks))
        return *masks, *([CONTENT_GUIDE] if self.content else [])

    def keys(self, key: str) -> tuple[str, ...]:
        """The style keys of a layer key: itself, or one per region."""
        return tuple(style_key(key, region) for region in range(self.regions)) or (key,)


UNGUIDED = Guides()
