"""The Python ends of libvips pipelines: the file that a decoder reads, decoded bands, and bands for a saver.

    FileSource ──► decoder, resize ──► BandPump ──► (y0, rows) …        … rows ──► RowSource ──► saver ──► file

libvips works in threads of its own. Each end can be closed early, so that libvips stops within the piece it is working
on. FileSource keeps the OSError that it met, because libvips passes errors on as text, if at all.
"""

from __future__ import annotations

import errno
import os
import queue
import re
import stat
import struct
import threading
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
from numpy.typing import NDArray

from pipeline.core.cancel import CancelToken
from pipeline.core.errors import InputError, storage_error
from pipeline.core.image_formats import PixelKind
from pipeline.core.text import shown

Rows = NDArray[np.uint8] | NDArray[np.uint16]

# By libvips' pixel format. The last two are of CIELAB.
DTYPES = {"uchar": "uint8", "ushort": "uint16", "short": "int16", "float": "float32"}
POLL_S = 0.2  # how often a thread that waits for libvips checks whether the call was cancelled
BAND_BYTES = 64 * 2**20  # upper bound of one band; two are in memory while writing
BAND_ROWS_PX = 512  # the rows of a default chunk of the store, if BAND_BYTES allows that many


class FileSource:
    """An image file for libvips' custom source.

    libvips' own file source maps the file: the pages count as this process's memory, and a file that is truncated
    while it is read ends the process (SIGBUS). Opening by name would interpret loader options in brackets.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._failure: OSError | None = None
        self._closed = False
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would block until another process writes to it
            what = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise OSError(errno.EINVAL, f"it is {what}, not an image file")
        descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        self._descriptor = descriptor
        self.size_bytes = os.fstat(descriptor).st_size
        self._position = 0

    def read_at(self, offset: int, count: int) -> bytes:
        """At most `count` bytes from `offset` on; none if the disk fails or the offset is impossible."""
        try:
            return os.pread(self._descriptor, count, offset)
        except (OSError, OverflowError):
            return b""

    def read(self, count: int) -> bytes | None:
        """The next bytes; None, the end of the file, if the disk fails or after end(): the decoder then gives up."""
        if self._closed:
            return None
        try:
            data = os.pread(self._descriptor, count, self._position)
        except OSError as error:
            self._failure = error
            return None
        self._position += len(data)
        return data

    def end(self) -> None:
        """Pretend that the file ends here, the only way to stop a decoder that reads a whole image at once."""
        self._closed = True

    def raise_failure(self) -> None:
        """Raise the disk's error, if there was one: the decoder would report a truncated file instead."""
        if self._failure is not None:
            raise storage_error(self.path, self._failure)

    def seek(self, offset: int, whence: int) -> int:
        """Move as io.IOBase.seek does; returns the new position."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size_bytes}[whence]
        return self._position


class BandPump:
    """Runs a libvips pipeline in a thread and yields its pixels band by band."""

    def __init__(self, file: FileSource, image: Any, band_px: int) -> None:
        self._file = file
        self._image = image
        self._band_px = band_px
        self._written = 0  # bytes of pixels that libvips has delivered
        self._dtype = np.dtype(DTYPES[image.format])
        self._band: NDArray[np.uint8] | None = None  # as bytes
        # At most three bands exist: one queued here, one being filled, one with the caller.
        self._queue: queue.Queue[tuple[int, Rows] | Exception | None] = queue.Queue(maxsize=1)
        self._stop = threading.Event()

    def bands(self, cancel: CancelToken) -> Generator[tuple[int, Rows]]:
        """Yield ``(y0, rows)``; leaving the iteration early ends the thread."""
        path = self._file.path
        thread = threading.Thread(target=self._run, name=f"decode {path.name}", daemon=True)
        thread.start()
        try:
            while (item := self._next(cancel)) is not None:
                if isinstance(item, pyvips.Error):
                    self._file.raise_failure()
                    raise undecodable(path, item) from item
                if isinstance(item, Exception):
                    raise item
                yield item
                del item  # else this frame would keep the band in memory during the next wait
            self._file.raise_failure()
        finally:
            self._stop.set()
            self._image.set_kill(True)
            self._file.end()
            thread.join()

    def _next(self, cancel: CancelToken) -> tuple[int, Rows] | Exception | None:
        while True:
            try:
                return self._queue.get(timeout=POLL_S)
            except queue.Empty:
                cancel.raise_if_set()

    def _run(self) -> None:
        target = pyvips.TargetCustom()
        target.on_write(self._write)
        try:
            self._image.rawsave_target(target)
        except Exception as error:  # raised again in the caller's thread
            self._put(error)
        else:
            self._put(None)

    def _write(self, data: Any) -> int:
        """Take bytes from libvips; returning -1 makes it stop."""
        pixels = np.frombuffer(data, np.uint8)
        width_px, height_px, channels = self._image.width, self._image.height, self._image.bands
        row_bytes = channels * width_px * self._dtype.itemsize
        taken = 0
        while taken < pixels.size:
            y0 = self._written // (self._band_px * row_bytes) * self._band_px
            if self._band is None:
                self._band = np.empty(min(self._band_px, height_px - y0) * row_bytes, np.uint8)
            start = self._written - y0 * row_bytes
            count = min(self._band.size - start, pixels.size - taken)
            self._band[start : start + count] = pixels[taken : taken + count]
            taken += count
            self._written += count
            if start + count == self._band.size:
                band, self._band = self._band, None
                if not self._put((y0, band.view(self._dtype).reshape(-1, width_px, channels))):
                    return -1
        return taken

    def _put(self, item: tuple[int, Rows] | Exception | None) -> bool:
        """Wait for room in the queue; False if the caller has left the iteration."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


# How libtiff, libjpeg and libheif say that they know a codec, or a layout, and were built without it.
_UNSUPPORTED = re.compile("not (configured|implemented|supported|been built in)|unsupported|not available", re.I)


def is_unsupported(error: Exception) -> bool:
    """Whether a libvips error says that the file may be intact, and this build cannot decode it."""
    return _UNSUPPORTED.search(str(getattr(error, "detail", error))) is not None


def undecodable(path: Path, error: Exception) -> InputError:
    """The error for a file whose pixels libvips cannot decode, with what to do about it."""
    if is_unsupported(error):
        return InputError(
            f"{path}: is stored in a way that this build of libvips cannot decode, and need not be damaged "
            f"({reason(error)}). Save it as a PNG, as a TIFF with deflate or LZW compression, or as a JPEG of 8 bits."
        )
    return InputError(
        f"{path}: cannot be decoded; it is damaged, truncated, or stored in strips that are too large: "
        f"{reason(error)}. Save an intact copy again."
    )


def reason(error: Exception) -> str:
    """The first line of a libvips error, without its full stop."""
    detail = str(getattr(error, "detail", error)).strip()
    return shown((detail.splitlines() or [str(error)])[0].strip().rstrip("."), 200)


class RowSource:
    """An uncompressed BigTIFF, one strip per row, whose rows are supplied while libvips reads it.

    libvips' savers stream only from a file-like source. Two bands exist at once: the one that libvips reads, and the
    next, queued or being made.
    """

    def __init__(self, width_px: int, height_px: int, kind: PixelKind) -> None:
        self.width_px, self.height_px, self.kind = width_px, height_px, kind
        row_bytes = width_px * kind.pixel_bytes
        self.band_px = max(1, min(BAND_BYTES // row_bytes, BAND_ROWS_PX))
        self._header = _tiff_header(width_px, height_px, kind)
        self._size = len(self._header) + height_px * row_bytes
        self._position = 0
        self._start, self._bytes = 0, memoryview(self._header)  # offset and content of the current piece
        self._queue: queue.Queue[memoryview | None] = queue.Queue()
        self._room = threading.Semaphore(1)
        self._image: Any = None
        self.cancelled = threading.Event()

    def image(self) -> Any:
        """The libvips image."""
        source = pyvips.SourceCustom()
        source.on_read(self._read)
        source.on_seek(self._seek)
        image = pyvips.Image.new_from_source(source, "", access="sequential", fail_on="error").copy()
        self._image = image
        return image

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until one more band may be put, or the source is cancelled; False after `timeout_s`."""
        return self._room.acquire(timeout=timeout_s)

    def put(self, rows: Rows, y0: int, y1: int) -> None:
        """Queue the band of rows [y0, y1)."""
        shape = y1 - y0, self.width_px, self.kind.channels
        assert (rows.shape, rows.itemsize) == (shape, self.kind.bits // 8), f"{rows.shape} {rows.dtype}"
        self._queue.put(np.ascontiguousarray(rows).data.cast("B"))

    def cancel(self) -> None:
        """End reading and writing: both sides stop waiting."""
        self.cancelled.set()
        if self._image is not None:
            self._image.set_kill(True)  # else libvips would process the rows that it has read
        self._queue.put(None)
        self._room.release()

    def _read(self, count: int) -> memoryview | None:
        """Bytes at the current position; None, the end of the file, after cancel()."""
        while self._start + len(self._bytes) <= self._position < self._size:
            self._start += len(self._bytes)
            self._bytes = memoryview(b"")  # freed before the wait, because the next band is being made meanwhile
            band = None if self.cancelled.is_set() else self._next()
            if band is None:
                return None
            self._bytes = band
        offset = self._position - self._start
        if offset < 0:  # libtiff sometimes reads the header again, but never pixels
            assert self._position < len(self._header), "libvips read rows a second time"
            data = memoryview(self._header)[self._position : self._position + count]
        else:
            data = self._bytes[offset : offset + count]
        self._position += len(data)
        return data

    def _next(self) -> memoryview | None:
        band = self._queue.get()
        self._room.release()
        return band

    def _seek(self, offset: int, whence: int) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position


def _tiff_header(width_px: int, height_px: int, kind: PixelKind) -> bytes:
    """An uncompressed RGB or RGBA BigTIFF up to its first pixel: little-endian, one strip per row.

    Fields are (tag, type, values); a value block longer than 8 bytes follows the directory, in order.
    """
    row_bytes = width_px * kind.pixel_bytes
    types = {3: "H", 4: "I", 16: "Q"}
    fields: list[tuple[int, int, Any]] = [
        (256, 4, [width_px]),
        (257, 4, [height_px]),
        (258, 3, [kind.bits] * kind.channels),
        (259, 3, [1]),  # no compression
        (262, 3, [2]),  # RGB
        (273, 16, range(height_px)),  # offsets of the rows, filled in below
        (277, 3, [kind.channels]),
        (278, 4, [1]),  # rows per strip
        (279, 4, [row_bytes] * height_px),
        (284, 3, [1]),  # interleaved
        *([(338, 3, [2])] if kind.alpha else []),  # alpha, not premultiplied
    ]
    directory_end = 16 + 8 + 20 * len(fields) + 8
    sizes = [struct.calcsize(f"<{len(values)}{types[number_type]}") for _, number_type, values in fields]
    pixels_at = directory_end + sum(size for size in sizes if size > 8)
    head = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(fields))
    blocks = b""
    for tag, number_type, values in fields:
        numbers = [pixels_at + row * row_bytes for row in values] if tag == 273 else values
        packed = struct.pack(f"<{len(numbers)}{types[number_type]}", *numbers)
        if len(packed) > 8:
            packed, blocks = struct.pack("<Q", directory_end + len(blocks)), blocks + packed
        head += struct.pack("<HHQ", tag, number_type, len(numbers)) + packed.ljust(8, b"\0")
    return head + struct.pack("<Q", 0) + blocks
