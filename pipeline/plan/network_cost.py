"""The cost of the network per pixel: which layers are in use, their widths, operations and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config, StyleConfig, regions_of
from pipeline.core.errors import InputError
from pipeline.core.vgg_layers import LAYER_BY_NAME, Layer, halo_px, needed_layers
from pipeline.store import UNGUIDED, Guides, layer_key

# Bytes of the position of a maximum. Average pooling keeps none, but is planned like max: so runs on disk keep their
# tiles.
_INDEX_BYTES = {"mixed": 8, "max": 8, "average": 8}


@dataclass(frozen=True)
class LayerUse:
    """The layers that the losses use, and the channels of every layer.

    `itemsize`: bytes per value of a feature map on the CPU. `guides`: the masks of the stage. `pooling`: the network's.
    `with_mean`: the style loss compares means too, so Gram matrices have one more row and column. `scales`: how many
    scales of the canvas the losses compare, each half the size of the one before.
    """

    widths: Mapping[str, int]
    style_layers: tuple[str, ...]
    content_layers: tuple[str, ...]
    itemsize: int
    guides: Guides = UNGUIDED
    pooling: str = "max"
    with_mean: bool = False
    scales: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """All layers in use, style layers first."""
        return self.style_layers + self.content_layers

    @property
    def halo_px(self) -> int:
        """K_F, the forward halo of a tile, which equals K_B, the backward halo (eqs. 12 and 13)."""
        return halo_px(self.names, self.pooling)

    @property
    def gram_halo_px(self) -> int:
        """The forward halo of a tile of the Gram pass, which runs the style layers only."""
        return halo_px(self.style_layers, self.pooling)

    @property
    def content_widths(self) -> dict[str, int]:
        """Channels of the content features, by layer key: of each content layer at each scale."""
        return {
            layer_key(layer, scale): self.widths[layer] for scale in range(self.scales) for layer in self.content_layers
        }

    @property
    def style_layer_keys(self) -> tuple[str, ...]:
        """The layer keys of the style: its layers at each scale."""
        return tuple(layer_key(layer, scale) for scale in range(self.scales) for layer in self.style_layers)

    @property
    def style_keys(self) -> tuple[str, ...]:
        """The names of all style terms: the style's layer keys, or with masks those of every region."""
        return tuple(key for layer in self.style_layer_keys for key in self.guides.keys(layer))

    def channels(self) -> list[tuple[Layer, int, int]]:
        """(layer, channels in, channels out) of every layer that runs, down to the deepest in use."""
        rows, channels = [], 3
        for layer in needed_layers(self.names):
            out = self.widths.get(layer.name, channels)
            rows.append((layer, channels, out))
            channels = out
        return rows

    def flop_per_px(self) -> int:
        """Floating-point operations of a forward pass per canvas pixel: 2·9·C_in·C_out per position."""
        return sum(
            18 * c_in * c_out // layer.stride**2 for layer, c_in, c_out in self.channels() if layer.kind == "conv"
        )

    def gradient_bytes_per_px(self, itemsize: int) -> int:
        """Peak device bytes of the gradient pass per outer pixel, with `itemsize` bytes per value of a feature map.

        The backward pass frees the maps of deep layers, and its gradients grow towards the pixels: the peak is at the
        layer where both together are largest.
        """
        tape, peak = 4 * 3 * self.itemsize, 0  # the tile, its scaled copy and their gradients
        for layer, c_in, c_out in self.channels():
            positions = 1 / layer.stride**2
            tape += int(c_out * positions * itemsize)
            if layer.kind == "pool":
                tape += int(c_out * positions * _INDEX_BYTES.get(self.pooling, 0))
            # The gradient of the output, the layer's own seed, and the gradient of the input, padded and not.
            working = int((2 * c_out + c_in * (4 if layer.kind == "pool" else 2)) * positions * itemsize)
            peak = max(peak, tape + max(working, self._columns_bytes(layer, c_in)))
        return peak + self._guides_bytes_per_px()

    def _guides_bytes_per_px(self) -> int:
        """Device bytes per outer pixel of the masks: maps, shares, their means, and two products with features."""
        if not self.guides.arrays:
            return 0
        maps = len(self.guides.arrays) + 3 * (self.guides.regions + 1)
        products = max((2 * self.widths[name] // LAYER_BY_NAME[name].stride ** 2 for name in self.names), default=0)
        return (maps + products) * self.itemsize

    def _columns_bytes(self, layer: Layer, c_in: int) -> int:
        """Bytes of the unfolded input of a float64 convolution: torch has no direct float64 kernel on the CPU."""
        return 9 * c_in * self.itemsize // layer.stride**2 if self.itemsize == 8 and layer.kind == "conv" else 0

    def grams_bytes(self) -> int:
        """Bytes of the Gram sums of one tile, in float64."""
        return (
            max(1, self.guides.regions)
            * self.scales
            * sum((self.widths[name] + self.with_mean) ** 2 * 8 for name in self.style_layers)
        )

    def parameters_bytes(self) -> int:
        """Bytes of the convolutions' weights."""
        return self.itemsize * sum(9 * c_in * c_out for layer, c_in, c_out in self.channels() if layer.kind == "conv")

    def forward_bytes_per_px(self, itemsize: int, copies: int) -> int:
        """Peak device bytes of a pass without gradient per outer pixel: the largest pair of neighbouring maps.

        `copies`: how many copies of both a library makes in another memory layout.
        """
        return max(
            (c_in * (4 if layer.kind == "pool" else 1) + 2 * c_out + copies * (c_in + c_out))
            * itemsize
            // layer.stride**2
            + self._columns_bytes(layer, c_in)
            for layer, c_in, c_out in self.channels()
        ) + (self._guides_bytes_per_px() if self.guides.regions else 0)

    def largest_values_per_px(self) -> float:
        """Values of the largest feature map per outer pixel."""
        return max(c_out / layer.stride**2 for layer, _, c_out in self.channels())


def layer_names(config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The style layers and the content layers whose weight in the loss is not 0."""
    style = tuple(config.network.style_layers) if config.loss.style_weight > 0 else ()
    return style, tuple(config.network.content_layers) if config.loss.content_weight > 0 else ()


def layers_in_use(config: Config, widths: Mapping[str, int], scales: int = 1) -> LayerUse:
    """The layers whose weight in the loss is not 0, at `scales` scales.

    Raises InputError if the weights file lacks one of them.
    """
    style, content = layer_names(config)
    missing = [name for name in style + content if name not in widths]
    if missing:
        raise InputError(
            f"{config.network.weights}: has no layer {', '.join(missing)}, which network.style_layers or "
            f"content_layers asks for. It has {', '.join(widths)}."
        )
    guides = guides_of(config.styles if style else (), config.loss.content_mask if content else None)
    itemsize = 8 if config.compute.dtype == "float64" else 4
    pooling, with_mean = config.network.pooling, config.loss.compares_means
    return LayerUse(widths, style, content, itemsize, guides, pooling, with_mean, scales)


def guides_of(styles: Sequence[StyleConfig], content_mask: Path | None) -> Guides:
    """The guides (masks) of a stage with these styles: one region per mask, and one for styles without a mask."""
    regions = regions_of(styles)
    masks = sum(region.mask is not None for region in regions)
    return Guides(masks, masks < len(regions) if masks else False, content_mask is not None)
