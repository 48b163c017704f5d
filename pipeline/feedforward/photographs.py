"""The photographs of a training: which can be used, and the crops of a step.

A crop depends on the seed, the step and its place in the batch alone, so that a resumed training sees what it would
have seen. Every epoch takes the photographs in an order of its own. Axes in names: B batch, H rows, W columns,
C channels.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import LimitsConfig
from pipeline.core.cancel import NEVER, CancelToken
from pipeline.core.errors import ConfigError, InputError, storage
from pipeline.core.events import Note, Sink, WorkDone, ignore
from pipeline.core.files import is_of_the_system
from pipeline.core.image_formats import RGB8
from pipeline.core.text import count, shown
from pipeline.images import ImageHeader, read_header, stream_rgb

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
# A photograph is reduced to this many crops along its short side, as those of MSCOCO (480 px) are for 256 px.
_REDUCED_CROPS = 2
# Reduced photographs that stay in memory: those of MSCOCO's size are 0.9 MB each.
_CACHE_BYTES = 512 * 2**20
_BAND_PX = 256
# Further photographs that are named if they are skipped; after these only their number.
_MAX_NAMED = 5

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Photograph:
    """A photograph that can be used, its size in px, and that of the file in bytes."""

    path: Path
    width_px: int
    height_px: int
    size_bytes: int


def find_photographs(
    folder: Path, crop_px: int, limits: LimitsConfig, sink: Sink = ignore, cancel: CancelToken = NEVER
) -> list[Photograph]:
    """The photographs in `folder` and its subfolders, by name; those that cannot be used are skipped and named.

    Raises ConfigError if there is none, Stopped, StorageError.
    """
    if not folder.is_dir():
        raise ConfigError(f"photographs: {folder} is not a folder. Name one with photographs ({' '.join(SUFFIXES)}).")
    found, skipped = [], []
    paths = _image_files(folder)
    for number, path in enumerate(paths, start=1):
        sink(WorkDone(0, "photographs", number, len(paths)))
        cancel.raise_if_set()
        try:
            header = read_header(path, limits)
        except InputError as error:
            skipped.append(str(error))
            continue
        short_px = min(header.width_px, header.height_px)
        if short_px < crop_px:
            skipped.append(f"{path}: its short side has {short_px} px, less than a crop of {crop_px} px.")
            continue
        found.append(Photograph(path, header.width_px, header.height_px, path.stat().st_size))
    for text in skipped[:_MAX_NAMED]:
        sink(Note(f"skipped {shown(text, 400)}"))
    if (more := len(skipped) - _MAX_NAMED) > 0:
        sink(Note(f"skipped {count(more, 'further photograph')} that cannot be used"))
    if not found:
        reason = f": all {len(skipped)} were skipped" if skipped else f" with the suffix {' '.join(SUFFIXES)}"
        raise ConfigError(f"photographs: {folder} has no usable photograph{reason}. Name another folder.")
    return found


def _image_files(folder: Path) -> list[Path]:
    """Files with the suffix of an image, in an order that does not depend on the file system."""
    with storage(folder):
        paths = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    wanted = [path for path in paths if path.suffix.lower() in SUFFIXES and not is_of_the_system(path.name)]
    return sorted(wanted, key=lambda path: path.relative_to(folder).as_posix())


def read_picture(
    header: ImageHeader | Photograph, width_px: int, height_px: int, cancel: CancelToken = NEVER
) -> Picture:
    """An image in sRGB, resized, (H, W, 3). Raises InputError for bad pixels, Stopped, StorageError."""
    bands = stream_rgb(header.path, width_px, height_px, min(_BAND_PX, height_px), cancel, RGB8)
    rows: list[NDArray[Any]] = [band.copy() for _, band in bands]
    return np.concatenate(rows)


@dataclass
class Crops:
    """The crops of every step. `scaled`: of different parts of the photographs, reduced to `crop_px`."""

    photographs: Sequence[Photograph]
    crop_px: int
    seed: int
    scaled: bool = True
    sink: Sink = ignore
    _cache: OrderedDict[int, Picture] = field(default_factory=OrderedDict)
    _cached_bytes: int = 0
    _broken: set[int] = field(default_factory=set)

    def batch(self, step: int, size: int) -> Tensor:
        """The crops of a step, (B, 3, H, W), float32, 0..255. Raises ConfigError if no photograph can be decoded."""
        crops = [self.crop(step * size + index) for index in range(size)]
        return torch.stack([torch.from_numpy(crop) for crop in crops]).permute(0, 3, 1, 2).contiguous().float()

    def crop(self, number: int) -> NDArray[np.float32]:
        """The crop with this number, counted over all steps, (crop_px, crop_px, 3)."""
        epoch, place = divmod(number, len(self.photographs))
        picture = self._picture(_order(self.seed, epoch, len(self.photographs))[place])
        rng = np.random.default_rng([self.seed, 0, number])
        short_px = min(picture.shape[:2])
        side = int(rng.integers(self.crop_px, short_px + 1)) if self.scaled else self.crop_px
        y, x = (int(rng.integers(length - side + 1)) for length in picture.shape[:2])
        window = picture[y : y + side, x : x + side].astype(np.float32)
        if side != self.crop_px:
            window = _reduced(window, self.crop_px)
        return np.ascontiguousarray(window[:, ::-1] if rng.random() < 0.5 else window)

    def _picture(self, index: int) -> Picture:
        """A photograph, or the next one that can be decoded, reduced."""
        for offset in range(len(self.photographs)):
            number = (index + offset) % len(self.photographs)
            if number in self._broken:
                continue
            try:
                return self._decoded(number)
            except InputError as error:  # its header was good
                self._broken.add(number)
                self.sink(Note(f"skipped {shown(str(error), 400)}"))
        raise ConfigError("photographs: none can be decoded. Name a folder with others.")

    def _decoded(self, number: int) -> Picture:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        photograph = self.photographs[number]
        ratio = min(1.0, _REDUCED_CROPS * self.crop_px / min(photograph.width_px, photograph.height_px))
        width, height = (max(self.crop_px, round(px * ratio)) for px in (photograph.width_px, photograph.height_px))
        picture = read_picture(photograph, width, height)
        self._cache[number] = picture
        self._cached_bytes += picture.nbytes
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return picture


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 1, epoch]).permutation(size)


def _reduced(window_HWC: NDArray[np.float32], side_px: int) -> NDArray[np.float32]:
    window_1CHW = torch.from_numpy(window_HWC).permute(2, 0, 1)[None]
    smaller = F.interpolate(window_1CHW, (side_px, side_px), mode="bicubic", antialias=True, align_corners=False)
    result: NDArray[np.float32] = smaller[0].clamp(0, 255).permute(1, 2, 0).numpy()
    return result


def lowered(pictures_BCHW: Tensor, factor: int) -> Tensor:
    """The input of super-resolution: blurred (σ 1 px, as in the paper), and reduced by `factor`, bicubic."""
    reach = 4
    at = torch.arange(-reach, reach + 1, dtype=pictures_BCHW.dtype, device=pictures_BCHW.device)
    kernel = torch.exp(-at.square() / 2)
    kernel = (kernel / kernel.sum()).repeat(pictures_BCHW.shape[1], 1, 1, 1)
    blurred = pictures_BCHW
    for axis, weight in ((2, kernel.mT), (3, kernel)):
        margins = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        blurred = F.conv2d(F.pad(blurred, margins, mode="replicate"), weight, groups=weight.shape[0])
    height, width = (side // factor for side in blurred.shape[2:])
    smaller = F.interpolate(blurred, (height, width), mode="bicubic", antialias=False, align_corners=False)
    return smaller.clamp(0, 255).round()
