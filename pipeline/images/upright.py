"""Turning an image upright as its EXIF orientation says, for orientations that read rows in another order.

The decoder delivers rows from top to bottom, and the upright image needs columns. So its pixels are written, turned, to
memory, or above a size to a file in a folder of the run, and read again from there:

    rows of the file ──► BandPump ──► turned, in memory or in a scratch file ──► libvips image, read from top to bottom
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
from numpy.typing import NDArray

from pipeline.core.cancel import CancelToken
from pipeline.core.errors import storage
from pipeline.images.vips_streams import DTYPES, BandPump, FileSource

# From this size on, pixels are turned in a file. libvips has the same limit, but takes the system's temporary folder,
# which may be small, or in memory.
SCRATCH_BYTES = 100 * 2**20
_BAND_BYTES, _BAND_ROWS_PX = 8 * 2**20, 512
# Three bands of the decoder, and the turned copy of one.
TURNING_BYTES = 4 * _BAND_BYTES

# By orientation: whether rows and columns change places, and whether the upright rows and columns run backwards.
_TURNS = {3: (False, True, True), 4: (False, True, False), 5: (True, False, False)}
_TURNS |= {6: (True, False, True), 7: (True, True, True), 8: (True, True, False)}

_Place = Callable[[NDArray[Any], int, int], None]  # pixels, and the row and column of the first of them


@contextmanager
def upright(file: FileSource, image: Any, turn: int, folder: Path | None, cancel: CancelToken) -> Iterator[Any]:
    """The image of `file`, opened for sequential access, turned as orientation `turn` (3 to 8) says.

    `folder`: for the scratch file; None keeps the pixels in memory, whatever their size. Raises InputError for broken
    pixels, StorageError if the disk is full or fails, Stopped.
    """
    transposed, up, left = _TURNS[turn]
    width, height = (image.height, image.width) if transposed else (image.width, image.height)
    dtype = np.dtype(DTYPES[image.format])
    size_bytes = width * height * image.bands * dtype.itemsize
    if folder is None or size_bytes <= SCRATCH_BYTES:
        pixels = np.empty((height, width, image.bands), dtype)

        def place(part: NDArray[Any], y: int, x: int) -> None:
            pixels[y : y + len(part), x : x + part.shape[1]] = part

        _turn(file, image, (transposed, up, left), place, cancel)
        memory = pyvips.Image.new_from_memory(pixels.data, width, height, image.bands, image.format)
        yield _as_before(memory, image)
        return
    with storage(folder):
        descriptor, name = tempfile.mkstemp(prefix=".upright-", suffix=".partial", dir=folder)
        try:
            row_bytes = width * image.bands * dtype.itemsize

            def write(part: NDArray[Any], y: int, x: int) -> None:
                for row, pixels in enumerate(np.ascontiguousarray(part), start=y):
                    _write_all(descriptor, pixels, row * row_bytes + x * image.bands * dtype.itemsize)

            _turn(file, image, (transposed, up, left), write, cancel)
            raw = pyvips.Image.rawload(name, width, height, image.bands, format=image.format)
            yield _as_before(raw, image)
        finally:
            os.close(descriptor)
            Path(name).unlink(missing_ok=True)


def _turn(file: FileSource, image: Any, turn: tuple[bool, bool, bool], place: _Place, cancel: CancelToken) -> None:
    """Decode the image and place its rows, turned, band by band."""
    transposed, up, left = turn
    row_bytes = image.width * image.bands * np.dtype(DTYPES[image.format]).itemsize
    band_px = max(1, min(_BAND_BYTES // row_bytes, _BAND_ROWS_PX, image.height))
    with closing(BandPump(file, image, band_px).bands(cancel)) as bands:
        for y0, rows in bands:
            part: NDArray[Any] = rows.transpose(1, 0, 2) if transposed else rows
            y, x = (0, y0) if transposed else (y0, 0)
            if up:
                part = part[::-1]
                y = 0 if transposed else image.height - y0 - len(rows)
            if left:
                part = part[:, ::-1]
                x = image.height - y0 - len(rows) if transposed else 0
            place(part, y, x)


def _write_all(descriptor: int, pixels: NDArray[Any], offset: int) -> None:
    data = pixels.data.cast("B")
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _as_before(turned: Any, image: Any) -> Any:
    """The turned image with the colours of the image, which raw pixels do not say."""
    turned = turned.copy(interpretation=image.interpretation)
    if image.get_typeof("icc-profile-data"):
        turned.set_type(pyvips.GValue.blob_type, "icc-profile-data", image.get("icc-profile-data"))
    return turned
