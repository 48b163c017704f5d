"""Finished pictures: what a format can hold, and streaming export.

Axes in names: H rows, W columns, C channels. The caller hands over bands of rows, (h, W, 3); libvips sees them as an
uncompressed TIFF that it reads once from top to bottom, because its savers stream only from a file-like source:

    read_rows (caller's thread) ──► _RowSource: TIFF header, then bands ──► tiffload ──► saver (its own thread)

Under the output's name there is either nothing, or what was there before, or the whole new picture.
"""

from __future__ import annotations

import errno
import functools
import os
import queue
import secrets
import shutil
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyvips
from numpy.typing import NDArray

from pipeline.errors import ConfigError, SpaceError

Rows = NDArray[np.uint8] | NDArray[np.uint16]

BAND_BYTES = 64 * 2**20  # upper bound of one band; two are in memory while writing
BAND_ROWS_PX = 512  # as many rows as a chunk of the store has, where BAND_BYTES allows it
COMPRESSIONS = ("deflate", "zstd", "jpeg", "none")

pyvips.cache_set_max(0)
pyvips.concurrency_set(min(pyvips.concurrency_get(), 4))  # every thread has strips of its own


@dataclass(frozen=True)
class Format:
    """What one kind of output can hold."""

    name: str
    suffixes: tuple[str, ...]
    bits: tuple[int, ...]
    max_side_px: int


# 10,000,000 px is libvips' own limit; PNG and TIFF could hold more.
FORMATS = (
    Format("TIFF", (".tif", ".tiff"), (8, 16), 10_000_000),
    Format("PNG", (".png",), (8, 16), 10_000_000),
    Format("JPEG", (".jpg", ".jpeg"), (8,), 65_500),
    Format("DeepZoom", (".dz",), (8,), 10_000_000),
    Format("OME-Zarr", (".zarr",), (8, 16), 10_000_000),
)


def check_output(path: Path, width_px: int, height_px: int, bits: int, compression: str) -> None:
    """Refuse an output that would fail at the end of a run. `compression` concerns TIFF alone.

    Raises ConfigError: unknown suffix, picture too large or too deep for the format, a compression that is unknown,
    unfit or not in this libvips, a name that is taken by something else, a folder that cannot be written.
    """
    form = _format_of(path)
    side_px = max(width_px, height_px)
    if side_px > form.max_side_px:
        other = [f for f in FORMATS if f.max_side_px >= side_px]
        raise ConfigError(f"{path}: {form.name} ends at {form.max_side_px:,} px a side, not {side_px:,}.{_use(other)}")
    if bits not in form.bits:
        other = [f for f in FORMATS if bits in f.bits]
        raise ConfigError(f"{path}: {form.name} is not written with {bits} bits a channel.{_use(other)}")
    _check_compression(path, form, bits, compression)
    _check_place(path, form)


def write_image(
    path: Path,
    width_px: int,
    height_px: int,
    read_rows: Callable[[int, int], Rows],
    *,
    bits: int = 8,
    compression: str = "deflate",
    quality: int = 95,
    on_progress: Callable[[float], None] | None = None,
) -> None:
    """Write a picture of sRGB rows as TIFF, PNG, JPEG or DeepZoom, by the suffix of `path`.

    read_rows(y0, y1) returns rows [y0, y1), (y1 − y0, width_px, 3), uint8 or, with 16 bits, uint16; it is called in
    the calling thread, from top to bottom, each row once. A DeepZoom is a folder: ``name.dz/name.dzi`` beside
    ``name.dz/name_files/``. `quality`, 1 to 100, is that of JPEG. on_progress gets the fraction done, at last 1.0.

    Raises what check_output raises, SpaceError where the disk is full, and whatever read_rows and on_progress raise;
    in all these cases an older output stays as it was.
    """
    check_output(path, width_px, height_px, bits, compression)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = new_partial(path)
    source = _RowSource(width_px, height_px, bits)
    save = functools.partial(_save, source, partial, path, compression, quality)
    try:
        _feed(source, save, path, read_rows, on_progress)
        put_in_place(partial, path)
    except OSError as error:
        if error.errno == errno.ENOSPC and not isinstance(error, SpaceError):
            raise _no_space(path) from error
        raise
    finally:
        _remove(partial)
    if on_progress is not None:
        on_progress(1.0)


def _format_of(path: Path) -> Format:
    for form in FORMATS:
        if path.suffix.lower() in form.suffixes:
            return form
    known = ", ".join(suffix for form in FORMATS for suffix in form.suffixes)
    raise ConfigError(f"{path}: the suffix '{path.suffix}' names no output format; give one of {known}.")


def _use(formats: list[Format]) -> str:
    return " Use " + " or ".join(form.suffixes[0] for form in formats) + "." if formats else ""


def _check_compression(path: Path, form: Format, bits: int, compression: str) -> None:
    if compression not in COMPRESSIONS:
        raise ConfigError(f"{path}: unknown compression '{compression}'; allowed: {', '.join(COMPRESSIONS)}.")
    if form.name != "TIFF":
        return
    if compression == "jpeg" and bits != 8:
        raise ConfigError(f"{path}: JPEG compression in TIFF has 8 bits a channel, not {bits}. Use deflate.")
    if not _can_compress(compression):
        usable = ", ".join(name for name in COMPRESSIONS if _can_compress(name))
        raise ConfigError(f"{path}: this build of libvips cannot write {compression} in TIFF; it can: {usable}.")


@functools.cache
def _can_compress(compression: str) -> bool:
    """Whether this build of libvips writes TIFF with a compression: its codecs differ from wheel to wheel."""
    try:
        pyvips.Image.black(16, 16).tiffsave_buffer(compression=compression)
    except pyvips.Error:
        return False
    return True


def _check_place(path: Path, form: Format) -> None:
    """The output can be made, and would replace nothing but an older output."""
    if form.name == "DeepZoom":
        if path.exists() and not _is_deepzoom(path):
            raise ConfigError(f"{path}: exists and is not a DeepZoom folder; it would be lost. Choose another name.")
    elif form.name != "OME-Zarr" and path.is_dir():
        raise ConfigError(f"{path}: is a folder. Choose the name of a file.")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(f"{path}: {folder} is a file, not a folder. Choose another place.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{path}: the folder {folder} cannot be written. Choose another place, or change its rights.")


def _is_deepzoom(path: Path) -> bool:
    """Whether a folder holds a DeepZoom of its own name, and nothing else."""
    names = {f"{path.stem}.dzi", f"{path.stem}_files"}
    return path.is_dir() and {entry.name for entry in path.iterdir()} <= names


def _feed(
    source: _RowSource,
    save: Callable[[], None],
    path: Path,
    read_rows: Callable[[int, int], Rows],
    on_progress: Callable[[float], None] | None,
) -> None:
    """Run the saver in a thread and give it bands from this one, so that signals and errors of the caller work."""
    failures: list[Exception] = []
    thread = threading.Thread(target=_run_saver, args=(source, save, failures), name=f"export {path.name}", daemon=True)
    thread.start()
    try:
        for y0 in range(0, source.height_px, source.band_px):
            if not source.wait_for_room():
                break  # the saver has failed
            y1 = min(y0 + source.band_px, source.height_px)
            source.put(read_rows(y0, y1), y0, y1)
            if on_progress is not None:
                on_progress(0.99 * y1 / source.height_px)  # the rest is the pyramid, the sync and the rename
    except BaseException:
        source.cancel()
        raise
    finally:
        thread.join()
    if failures:
        raise failures.pop()  # not [0]: a cycle would keep the removed file open, and its space taken


def _run_saver(source: _RowSource, save: Callable[[], None], failures: list[Exception]) -> None:
    try:
        save()
    except Exception as error:  # raised again in the caller's thread
        failures.append(error)
    finally:
        source.cancel()


def _save(source: _RowSource, partial: Path, path: Path, compression: str, quality: int) -> None:
    """One libvips saver from end to end. Progressive and optimised JPEG are off: they need the whole picture."""
    try:
        image = source.image()
        match _format_of(path).name:
            case "TIFF":
                tiles = {"tile": True, "tile_width": 256, "tile_height": 256, "pyramid": True, "bigtiff": True}
                image.tiffsave(str(partial), compression=compression, Q=quality, keep="icc", **tiles)
            case "PNG":
                image.pngsave(str(partial), keep="icc")
            case "JPEG":
                image.jpegsave(str(partial), Q=quality, keep="icc")
            case "DeepZoom":
                partial.mkdir()
                image.dzsave(str(partial / path.stem), suffix=".jpg", Q=quality, keep="icc")
                (partial / f"{path.stem}_files" / "vips-properties.xml").unlink(missing_ok=True)  # a date, no use
            case name:
                raise AssertionError(f"{name} is written elsewhere")
    except pyvips.Error as error:
        if _is_full(error, partial.parent):
            raise _no_space(path) from error
        raise OSError(f"{path}: cannot be written: {str(error.detail or error).strip()}") from error


def _is_full(error: pyvips.Error, folder: Path) -> bool:
    """Whether a libvips error comes from a full disk: libtiff drops the reason, so the disk is asked too."""
    return os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(folder).free < 2**20


def _no_space(path: Path) -> SpaceError:
    return SpaceError(f"{path}: the disk is full; the picture was not written. Free space, then export again.")


def _sync(partial: Path) -> None:
    """The new picture is on the disk before it gets its name."""
    if partial.is_dir():
        os.sync()  # ten thousands of tiles: one sync of all is faster than one each
        return
    with partial.open("rb+") as file:
        os.fsync(file.fileno())


def put_in_place(partial: Path, path: Path) -> None:
    """Give a finished picture, file or folder, its name, once it is on the disk.

    A folder cannot be replaced at once: the old one steps aside until then.
    """
    _sync(partial)
    old = partial.with_name(f"{partial.name}.old")
    if partial.is_dir() and path.exists():
        path.rename(old)
    try:
        partial.replace(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    _remove(old)


def new_partial(path: Path) -> Path:
    """A free name beside `path` for what is not whole yet; what exports of this machine left when killed is removed."""
    prefix = f".{path.stem}.partial-{os.uname().nodename}-"
    for entry in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
        pid = entry.name.removeprefix(prefix).partition("-")[0]
        if entry.suffix == path.suffix and pid.isdigit() and not psutil.pid_exists(int(pid)):
            _remove(entry)
    return path.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


class _RowSource:
    """An uncompressed strip BigTIFF whose rows are made while it is read.

    Two bands exist at once: the one libvips reads, and the next, waiting or being made.
    """

    def __init__(self, width_px: int, height_px: int, bits: int) -> None:
        self.width_px, self.height_px, self.bits = width_px, height_px, bits
        row_bytes = 3 * width_px * bits // 8
        self.band_px = max(1, min(BAND_BYTES // row_bytes, BAND_ROWS_PX))
        self._header = _tiff_header(width_px, height_px, bits)
        self._size = len(self._header) + height_px * row_bytes
        self._position = 0
        self._start, self._bytes = 0, memoryview(self._header)  # what is at hand: offset and content
        self._queue: queue.Queue[memoryview | None] = queue.Queue()
        self._room = threading.Semaphore(1)
        self._cancelled = threading.Event()

    def image(self) -> Any:
        """The picture as libvips sees it, with the sRGB profile attached."""
        source = pyvips.SourceCustom()
        source.on_read(self._read)
        source.on_seek(self._seek)
        image = pyvips.Image.new_from_source(source, "", access="sequential", fail_on="error").copy()
        profile = pyvips.Operation.call("profile_load", "srgb")
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
        return image

    def wait_for_room(self) -> bool:
        """Wait until one more band may be made; False where nobody will read it."""
        self._room.acquire()
        return not self._cancelled.is_set()

    def put(self, rows: Rows, y0: int, y1: int) -> None:
        """Hand over the band [y0, y1)."""
        dtype = np.dtype(np.uint16 if self.bits == 16 else np.uint8)
        assert (rows.shape, rows.dtype) == ((y1 - y0, self.width_px, 3), dtype), f"{rows.shape} {rows.dtype}"
        self._queue.put(np.ascontiguousarray(rows).data.cast("B"))

    def cancel(self) -> None:
        """Wake both sides up: no more bands will come or be read."""
        self._cancelled.set()
        self._queue.put(None)
        self._room.release()

    def _read(self, count: int) -> memoryview | None:
        """Bytes at the position; None, the end, after cancel()."""
        while self._start + len(self._bytes) <= self._position < self._size:
            self._start += len(self._bytes)
            self._bytes = memoryview(b"")  # before the wait: the next band is being made meanwhile
            band = None if self._cancelled.is_set() else self._next()
            if band is None:
                return None
            self._bytes = band
        offset = self._position - self._start
        if offset < 0:  # libtiff goes back to the header at times, never to pixels
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


def _tiff_header(width_px: int, height_px: int, bits: int) -> bytes:
    """All of an uncompressed RGB BigTIFF but its pixels: little-endian, one strip per row.

    Fields are (tag, type, values); a value block longer than 8 bytes follows the directory, in order.
    """
    row_bytes = 3 * width_px * bits // 8
    types = {3: "H", 4: "I", 16: "Q"}
    fields: list[tuple[int, int, Any]] = [
        (256, 4, [width_px]),
        (257, 4, [height_px]),
        (258, 3, [bits] * 3),
        (259, 3, [1]),  # no compression
        (262, 3, [2]),  # RGB
        (273, 16, range(height_px)),  # where the rows are: filled in below
        (277, 3, [3]),  # channels
        (278, 4, [1]),  # rows per strip
        (279, 4, [row_bytes] * height_px),
        (284, 3, [1]),  # interleaved
    ]
    directory_end = 16 + 8 + 20 * len(fields) + 8
    sizes = [struct.calcsize(f"<{len(values)}{types[kind]}") for _, kind, values in fields]
    pixels_at = directory_end + sum(size for size in sizes if size > 8)
    head = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(fields))
    blocks = b""
    for tag, kind, values in fields:
        numbers = [pixels_at + row * row_bytes for row in values] if tag == 273 else values
        packed = struct.pack(f"<{len(numbers)}{types[kind]}", *numbers)
        if len(packed) > 8:
            packed, blocks = struct.pack("<Q", directory_end + len(blocks)), blocks + packed
        head += struct.pack("<HHQ", tag, kind, len(numbers)) + packed.ljust(8, b"\0")
    return head + struct.pack("<Q", 0) + blocks
