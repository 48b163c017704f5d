"""Sample pictures of a training: what the network makes of a few pictures, beside what it was given.

Axes in names: H rows, W columns, C channels, 1 batch.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.core.cancel import NEVER, CancelToken
from pipeline.feedforward.network import enlarged
from pipeline.feedforward.photographs import Photograph, lowered, read_picture
from pipeline.feedforward.training import Trainer, spec_of
from pipeline.images import read_header
from pipeline.images.tile_codec import encode_tile

_LONG_PX = 512
_PREVIEW_PX = 256
_DEFAULT_NUMBER = 2
_GAP_PX = 8
Picture = NDArray[np.uint8]


def read_tensor(image: Photograph, cancel: CancelToken = NEVER) -> Tensor:
    """An image at the size that `image` names, (1, 3, H, W), float32, 0..255."""
    picture = read_picture(image, image.width_px, image.height_px, cancel)
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float()


def fitted(image: Photograph, long_px: int, multiple: int = 1, least_px: int = 0) -> Photograph:
    """The same file at a long side of `long_px`, more if its short side needs it for `least_px`.

    Both sides are multiples of `multiple`, as `least_px` is.
    """
    ratio = max(long_px / max(image.width_px, image.height_px), least_px / min(image.width_px, image.height_px))
    width, height = (
        max(multiple, round(px * ratio) // multiple * multiple) for px in (image.width_px, image.height_px)
    )
    return Photograph(image.path, width, height, image.size_bytes)


def sample_pictures(
    config: TrainConfig, photographs: Sequence[Photograph], cancel: CancelToken = NEVER
) -> list[Tensor]:
    """The pictures that the samples show, (1, 3, H, W). Raises InputError for those that the config names."""
    found = []
    for path in config.samples:
        header = read_header(path, config.limits)
        found.append(Photograph(path, header.width_px, header.height_px, 0))
    multiple = config.factor if config.task == "super-resolution" else 1
    least_px = spec_of(config).least_side_px() * multiple
    chosen = found or list(photographs[:_DEFAULT_NUMBER])
    return [read_tensor(fitted(image, _LONG_PX, multiple, least_px), cancel) for image in chosen]


def sample_sheet(trainer: Trainer, config: TrainConfig, pictures: Sequence[Tensor]) -> bytes:
    """A row for each picture, as a JPEG: content and every style; or bicubic, the network and the original."""
    rows = [_sample_row(trainer, config, picture_1CHW) for picture_1CHW in pictures]
    height, width = (max(picture.shape[axis] for row in rows for picture in row) for axis in (0, 1))
    columns = max(map(len, rows))
    shape = (len(rows) * (height + _GAP_PX) - _GAP_PX, columns * (width + _GAP_PX) - _GAP_PX, 3)
    sheet: Picture = np.full(shape, 255, np.uint8)
    for row, cells in enumerate(rows):
        for column, cell in enumerate(cells):
            y, x = row * (height + _GAP_PX), column * (width + _GAP_PX)
            sheet[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
    return encode_tile(sheet, "jpg")


def _sample_row(trainer: Trainer, config: TrainConfig, picture_1CHW: Tensor) -> list[Picture]:
    if config.task == "super-resolution":
        small = lowered(picture_1CHW, config.factor)
        return [_pixels(enlarged(small, config.factor)), _pixels(trainer.result(small, 0)), _pixels(picture_1CHW)]
    return [_pixels(picture_1CHW), *(_pixels(trainer.result(picture_1CHW, i)) for i in range(len(config.styles)))]


def preview_text(trainer: Trainer, config: TrainConfig, picture_1CHW: Tensor) -> str:
    """A small JPEG of what the network makes of a picture, as a data URL, for the metadata of its file."""
    row = _sample_row(trainer, config, picture_1CHW)
    large = torch.from_numpy(row[1]).permute(2, 0, 1)[None].float()
    ratio = min(1.0, _PREVIEW_PX / max(large.shape[2:]))
    height, width = (max(1, round(side * ratio)) for side in large.shape[2:])
    small = F.interpolate(large, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return f"data:image/jpeg;base64,{base64.b64encode(encode_tile(_pixels(small), 'jpg')).decode()}"


def _pixels(picture_1CHW: Tensor) -> Picture:
    rounded = picture_1CHW[0].clamp(0, 255).round().byte().permute(1, 2, 0)
    result: Picture = rounded.contiguous().numpy()
    return result
