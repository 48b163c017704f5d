"""The plan of `apply`: passes, tiles, memory and disk, from the config and the headers of its files. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config import ApplyConfig, input_files
from pipeline.core.errors import ConfigError, InputError
from pipeline.core.image_formats import PixelKind
from pipeline.core.text import shown
from pipeline.core.tiling import Size
from pipeline.feedforward import activations
from pipeline.feedforward.activations import Step
from pipeline.feedforward.arrays import CANVAS, arrays_of
from pipeline.feedforward.network_file import NetworkHeader, read_network_header
from pipeline.feedforward.spec import Conv
from pipeline.feedforward.strategy import Strategy, nothing_kept, strategies
from pipeline.feedforward.wct_file import WctHeader, WctLevel, is_wct_file, read_wct_header
from pipeline.feedforward.workload import ApplyWork
from pipeline.images import ImageHeader, read_header
from pipeline.plan import Device, Plan, StagePlan, fit
from pipeline.plan.sizes import size_of
from pipeline.store import (
    STYLE,
    ArraySpec,
)

_NO_MATCH = (
    "match_histogram: is for networks of super-resolution; a style changes the colours on purpose. Use color: "
    "luminance to keep those of the content."
)


@dataclass(frozen=True)
class NetworkUse:
    """A network of the config, and the share of each of its styles."""

    header: NetworkHeader
    style_S: tuple[float, ...]

    @property
    def norms(self) -> list[Conv]:
        """The convolutions whose norms need a pass of their own."""
        return self.header.spec.measured_norms()


@dataclass(frozen=True)
class WctUse:
    """The levels that are applied, in order, and the size of the style."""

    header: WctHeader
    levels: tuple[WctLevel, ...]
    style_size: Size


@dataclass(frozen=True)
class ApplyPlan:
    """The plan as all commands show it, and what the passes need. `content_size`: as the networks see it.

    `arrays`: of the stage. `keeps`: whether the passes keep activations among them.
    """

    plan: Plan
    networks: tuple[NetworkUse, ...]
    wct: WctUse | None
    content_size: Size
    content: PixelKind
    arrays: Mapping[str, ArraySpec]
    keeps: bool = False

    @property
    def stage(self) -> StagePlan:
        """The only stage."""
        return self.plan.stages[0]

    @property
    def norms(self) -> list[tuple[int, Conv]]:
        """(number of a network, the convolution before its norm) of each pass but the last."""
        return [(index, conv) for index, use in enumerate(self.networks) for conv in use.norms]


def plan_apply(config: ApplyConfig, device: Device) -> ApplyPlan:
    """Plan `config`, which is from `resolved`. Raises ConfigError, InputError."""
    images = {path: read_header(path, config.limits) for key, path in input_files(config) if key[-1] != "file"}
    if is_wct_file(config.networks[0].file):
        return _plan_wct(config, device, images)
    if config.style is not None:
        raise ConfigError(
            f"style: {config.networks[0].file} has its style in it; leave this key out, or name a file of "
            "encoder-decoder pairs in networks."
        )
    networks = _networks(config)
    factor = networks[0].header.spec.factor
    content_size = _content_size(config, size_of(images[config.content]), factor)
    canvas = content_size[0] * factor, content_size[1] * factor
    _check_sizes(config, networks, content_size, images)
    source = images[config.content].kind
    content = PixelKind(source.bits, source.alpha and factor == 1)
    specs = tuple(use.header.spec for use in networks)
    arrays = arrays_of(config, content_size, canvas, content)
    *others, last = strategies(config, specs, content_size, device)
    passes = 1 + sum(len(use.norms) for use in networks) + config.match_histogram
    file_bytes = sum(use.header.size_bytes for use in networks)
    work = ApplyWork(
        config, specs, (), content_size, canvas, content, images, device, arrays, passes, file_bytes
    )  # fmt: skip
    for strategy in others:
        with suppress(ConfigError):  # it does not fit into memory
            return _planned(work, networks, strategy)
    return _planned(work, networks, last)


def _planned(work: ApplyWork, networks: tuple[NetworkUse, ...], strategy: Strategy) -> ApplyPlan:
    size, specs = work.content_size, [use.header.spec for use in networks]
    steps = [activations.steps_of(spec, index, size, strategy.keeps) for index, spec in enumerate(specs)]
    work = replace(
        work, steps=tuple(map(tuple, steps)), arrays={**work.arrays, **strategy.arrays}, notes=strategy.notes
    )
    return ApplyPlan(work.checked_plan(), networks, None, size, work.content, work.arrays, strategy.keeps)


def _plan_wct(config: ApplyConfig, device: Device, images: Mapping[Path, ImageHeader]) -> ApplyPlan:
    network = config.networks[0]
    header = read_wct_header(network.file, config.limits.max_weights_bytes)
    if len(config.networks) > 1 or network.mask is not None or network.styles is not None:
        raise ConfigError("networks: with a file of encoder-decoder pairs it is the only one, without mask and styles.")
    if config.match_histogram:
        raise ConfigError(_NO_MATCH)
    if config.style is None:
        raise ConfigError(f"style: missing; {network.file} applies the style of an image. Name one (--style).")
    if config.activations not in ("auto", "recompute"):
        raise nothing_kept(config)
    there = {level.number: level for level in header.levels}
    if missing := [level for level in config.wct.levels if level not in there]:
        raise ConfigError(f"wct.levels: {network.file} has no level {missing[0]}, but {', '.join(map(str, there))}.")
    levels = tuple(there[number] for number in config.wct.levels)
    content_size = _content_size(config, size_of(images[config.content]), 1)
    style = size_of(images[config.style])
    style_size = fit(style, min(max(style), max(content_size)))
    least = max(level.least_side_px for level in levels)
    for role, path, size in (("content", config.content, content_size), ("style", config.style, style_size)):
        if min(size) < least:
            raise InputError(f"{role} {path}: at {size[1]}×{size[0]} px it is too small; {least} px are needed.")
    content = images[config.content].kind
    steps = tuple((Step(level.encoder), Step(level.layers)) for level in levels)
    arrays = arrays_of(config, content_size, content_size, content)
    arrays |= {STYLE: ArraySpec((*style_size, 3), config.store.chunk_px, "uint8")}
    arrays |= {"canvas_0": arrays[CANVAS]} if len(levels) > 1 else {}
    work = ApplyWork(
        config, levels, steps, content_size, content_size, content, images, device, arrays, 3 * len(levels),
        header.size_bytes, one_at_a_time=True,
    )  # fmt: skip
    return ApplyPlan(work.checked_plan(), (), WctUse(header, levels, style_size), content_size, content, arrays)


def _networks(config: ApplyConfig) -> tuple[NetworkUse, ...]:
    uses = []
    for index, network in enumerate(config.networks):
        header = read_network_header(network.file, config.limits.max_weights_bytes)
        uses.append(NetworkUse(header, _style_shares(index, header, network.styles)))
    factors = {use.header.spec.factor for use in uses}
    if len(factors) > 1:
        raise ConfigError(f"networks: they enlarge by {' and '.join(map(str, sorted(factors)))}. Use one factor.")
    if factors != {1}:
        if config.color != "style":
            raise ConfigError(
                f"color: {config.color} is for styles; a network of super-resolution has none. Leave it out."
            )
        if all(network.mask is not None for network in config.networks):
            raise ConfigError("networks: where the masks are black, nothing would be enlarged. Leave out one mask.")
    elif config.match_histogram:
        raise ConfigError(_NO_MATCH)
    return tuple(uses)


def _style_shares(index: int, header: NetworkHeader, styles: Mapping[str, float] | None) -> tuple[float, ...]:
    names = header.spec.styles
    if styles is None:
        return (1.0, *(0.0 for _ in names[1:]))
    if unknown := [name for name in styles if name not in names]:
        listed = ", ".join(shown(name, 100) for name in names[:20])
        raise ConfigError(
            f"networks.{index}.styles: {shown(unknown[0])} is no style of {header.path}. It has: {listed}."
        )
    total = sum(styles.values())
    return tuple(styles.get(name, 0.0) / total for name in names)


def _content_size(config: ApplyConfig, content: Size, factor: int) -> Size:
    """(height, width) of the content as the networks see it."""
    if config.size_px is None:
        return content
    if config.size_px % factor:
        raise ConfigError(f"size: {config.size_px} px is no multiple of {factor}, by which the network enlarges.")
    return fit(content, config.size_px // factor)


def _check_sizes(
    config: ApplyConfig, networks: Sequence[NetworkUse], content: Size, images: Mapping[Path, ImageHeader]
) -> None:
    least = max(use.header.spec.least_side_px() for use in networks)
    if min(content) < least:
        raise InputError(
            f"content {config.content}: at {content[1]}×{content[0]} px it is too small for the network, which needs "
            f"{least} px on each side. Use a larger size."
        )
    height, width = size_of(images[config.content])
    for path in config.masks:
        mask_height, mask_width = size_of(images[path])
        if min(abs(mask_height - height * mask_width / width), abs(mask_width - width * mask_height / height)) > 1:
            raise InputError(
                f"mask {path}: has {mask_width}×{mask_height} px, which is another aspect ratio than that of the "
                f"content ({width}×{height} px). Draw it over the image, at any size of the same aspect ratio."
            )
