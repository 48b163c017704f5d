"""Finished pictures: what a format can hold, and streaming export.

Axes in names: H rows, W columns, C channels. The caller hands over bands of rows, (h, W, C); libvips sees them as an
uncompressed TIFF that it reads once from top to bottom, because its savers stream only from a file-like source:

    read_rows (caller's thread) ──► RowSource: TIFF header, then bands ──► tiffload ──► saver (its own thread)

The smaller levels of a TIFF come behind the largest, and are made beside it: libvips keeps them in files until then.
Under the output's name there is either nothing, or what was there before, or the whole new picture.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
from numpy.typing import NDArray

from pipeline.core.cancel import NEVER, CancelToken
from pipeline.core.errors import ConfigError, StorageError, storage, storage_error
from pipeline.core.files import (
    names_in,
    new_partial,
    partial_name,
    remove,
    sync_file_system,
    sync_folder,
    taken,
    unwritable,
)
from pipeline.core.image_formats import (
    COMPRESSIONS,
    FORMATS,
    OUTPUT_SUFFIXES,
    RGB8,
    Format,
    PixelKind,
    format_of,
    unsupported_options,
)
from pipeline.core.tiling import Size
from pipeline.images.vips_streams import POLL_S, FileTarget, Rows, RowSource

# The C library's environment is everybody's: one picture at a time changes it.
_ENVIRONMENT = threading.Lock()


def check_output(path: Path, width_px: int, height_px: int, bits: int, compression: str) -> None:
    """Refuse an output that would fail at the end of a run. `compression` concerns TIFF alone.

    Raises ConfigError: unknown suffix, picture too large or too deep for the format, a compression that is unknown,
    unfit or not in this libvips, a name that is taken by something else, a folder that cannot be written; StorageError
    for a disk that is read-only.
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


def refuse_unheeded(path: Path, options: Mapping[str, object], alpha: bool = False) -> None:
    """Raise ConfigError for options of an export that the format passes over; see pictures.unsupported_options."""
    if wrong := [f"{option}: {why}" for option, why in unsupported_options(path, options, alpha)]:
        raise ConfigError(f"{path}: {'. '.join(wrong)}.")


def write_image(
    path: Path,
    width_px: int,
    height_px: int,
    read_rows: Callable[[int, int], Rows],
    *,
    kind: PixelKind = RGB8,
    compression: str = "deflate",
    quality: int = 95,
    pyramid: bool = True,
    on_progress: Callable[[float], None] | None = None,
    cancel: CancelToken = NEVER,
    on_whole: Callable[[Path], None] = lambda partial: None,
) -> None:
    """Write a picture of sRGB rows as TIFF, PNG, JPEG or DeepZoom, by the suffix of `path`.

    read_rows(y0, y1) returns rows [y0, y1), (y1 − y0, width_px, channels), uint8 or, with 16 bits, uint16; it is called
    in the calling thread, from top to bottom, each row once. Alpha, for formats that have it, does not multiply the
    colours. A DeepZoom is a folder: ``name.dz/name.dzi`` beside ``name.dz/name_files/``, of JPEG tiles, with alpha of
    PNG ones. `quality`, 1 to 100, is that of JPEG. `pyramid`: a TIFF has smaller levels, which take
    their own size on the disk a second time until it is whole. on_progress gets the fraction done, at last 1.0.
    Raises Stopped soon after `cancel` is set. `on_whole` is called with the file or folder
    that is whole and on the disk, before it gets its name.

    Raises what check_output raises, StorageError where the disk is full or fails, and whatever read_rows, on_progress
    raise; in all these cases an older output stays as it was.
    """
    check_output(path, width_px, height_px, kind.bits, compression)
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = new_partial(path)
        source = RowSource(width_px, height_px, kind)
        options = {"compression": compression, "Q": quality, "pyramid": pyramid}
        levels: contextlib.AbstractContextManager[Callable[[], None]] = contextlib.nullcontext(lambda: None)
        if pyramid and _format_of(path).name == "TIFF":
            levels = _libvips_files_in(path.with_name(partial_name(path)).absolute())
        try:
            with levels as files_are_open:
                save = functools.partial(_save, source, partial, path, options, files_are_open)
                _feed(source, save, path, read_rows, on_progress, cancel)
            put_in_place(partial, path, on_whole)
        finally:
            with contextlib.suppress(OSError):  # a disk that failed fails here too, and says less
                remove(partial)
    if on_progress is not None:
        on_progress(1.0)


def _format_of(path: Path) -> Format:
    if (form := format_of(path)) is not None:
        return form
    known = ", ".join(OUTPUT_SUFFIXES)
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
    _check_name(path)
    if form.name == "DeepZoom":
        if path.exists() and not _is_deepzoom(path):
            raise ConfigError(f"{path}: exists and is not a DeepZoom folder; it would be lost. Choose another name.")
    elif form.name == "OME-Zarr":
        if path.exists() and not _is_ome_zarr(path):
            raise ConfigError(f"{path}: exists and is not an OME-Zarr of ours; it would be lost. Choose another name.")
    elif path.is_dir():
        raise ConfigError(f"{path}: is a folder. Choose the name of a file.")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(f"{path}: {folder} is a file, not a folder. Choose another place.")
    if (error := unwritable(folder)) is not None:
        if error.errno == errno.EROFS:  # maybe after a week
            raise storage_error(path, error)
        raise ConfigError(f"{path}: the folder {folder} cannot be written. Choose another place, or change its rights.")


def _check_name(path: Path) -> None:
    try:
        path.with_name(f"{partial_name(path)}.old").lstat()  # the longest name that is made of it
    except OSError as error:  # most likely there is no such file
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(f"{path}: its name is too long for the file system. Choose a shorter one.") from error


def _is_deepzoom(path: Path) -> bool:
    """Whether a folder holds a DeepZoom of its own name, and nothing else."""
    names = {f"{path.stem}.dzi", f"{path.stem}_files"}
    return path.is_dir() and names_in(path) <= names


def _is_ome_zarr(path: Path) -> bool:
    """Whether a folder holds levels of a pyramid, and nothing else."""
    return path.is_dir() and all(name == "zarr.json" or name.isdigit() for name in names_in(path))


@contextlib.contextmanager
def _libvips_files_in(folder: Path) -> Iterator[Callable[[], None]]:
    """A folder, removed behind, in which libvips makes its temporary files until the function that is given is called.

    It asks the environment, every time; by default they would be in /tmp, which may be small, or memory. Where the file
    system can, they have no names; else those that a killed process leaves go with the folder: see new_partial.
    os.environ, which Python's tempfile reads and worker processes inherit, stays as it is.
    """
    folder.mkdir(0o700)
    try:
        with contextlib.ExitStack() as changes:
            changes.enter_context(_ENVIRONMENT)
            changes.callback(_set_back, "TMPDIR")
            os.putenv("TMPDIR", folder)
            yield changes.close
    finally:
        with contextlib.suppress(OSError):
            remove(folder)


def _set_back(name: str) -> None:
    """Have the C library's environment say what os.environ says."""
    if name in os.environ:
        os.putenv(name, os.environ[name])
    else:
        os.unsetenv(name)


def _feed(
    source: RowSource,
    save: Callable[[], None],
    path: Path,
    read_rows: Callable[[int, int], Rows],
    on_progress: Callable[[float], None] | None,
    cancel: CancelToken,
) -> None:
    """Run the saver in a thread and give it bands from this one, so that signals and errors of the caller work."""
    failures: list[Exception] = []
    thread = threading.Thread(target=_run_saver, args=(source, save, failures), name=f"export {path.name}", daemon=True)
    thread.start()
    try:
        for y0 in range(0, source.height_px, source.band_px):
            while not source.wait_for_room(POLL_S):
                cancel.raise_if_set()
            if source.cancelled.is_set():
                break  # the saver has failed
            y1 = min(y0 + source.band_px, source.height_px)
            source.put(read_rows(y0, y1), y0, y1)
            if on_progress is not None:
                on_progress(0.99 * y1 / source.height_px)  # the rest is the pyramid, the sync and the rename
        while thread.is_alive():
            thread.join(POLL_S)
            cancel.raise_if_set()
    except BaseException:
        source.cancel()
        raise
    finally:
        thread.join()
    if failures:
        raise failures.pop()  # not [0]: a cycle would keep the removed file open, and its space taken


def _run_saver(source: RowSource, save: Callable[[], None], failures: list[Exception]) -> None:
    try:
        save()
    except Exception as error:  # raised again in the caller's thread
        failures.append(error)
    finally:
        source.cancel()


def _save(
    source: RowSource, partial: Path, path: Path, options: dict[str, Any], files_are_open: Callable[[], None]
) -> None:
    """One libvips saver from end to end. Progressive and optimised JPEG are off: they need the whole picture."""
    try:
        image = source.image()
        if _format_of(path).name == "DeepZoom":
            partial.mkdir()
            suffix = ".png" if source.kind.alpha else ".jpg"
            image.dzsave(str(partial / path.stem), suffix=suffix, Q=options["Q"], keep="icc")
            (partial / f"{path.stem}_files" / "vips-properties.xml").unlink(missing_ok=True)  # a date, no use
            return
        file = FileTarget(partial, source.cancelled, files_are_open)
        try:
            _save_file(image, file.target(), path, options)
        finally:
            file.close()
    except pyvips.Error as error:
        raise _saver_error(path, error) from error


def _save_file(image: Any, target: Any, path: Path, options: dict[str, Any]) -> None:
    match _format_of(path).name:
        case "TIFF":
            tiles = {"tile": True, "tile_width": 256, "tile_height": 256, "bigtiff": True}
            image.tiffsave_target(target, keep="icc", **tiles, **options)
        case "PNG":
            image.pngsave_target(target, keep="icc")
        case "JPEG":
            image.jpegsave_target(target, Q=options["Q"], keep="icc")
        case name:
            raise AssertionError(f"{name} is written elsewhere")


def _saver_error(path: Path, error: pyvips.Error) -> OSError:
    """What libvips says of a failed write, as a StorageError: of its own files it tells in words only."""
    words = str(error.detail or error).strip()
    number = next((number for number in errno.errorcode if os.strerror(number) in words), None)
    if number is None and shutil.disk_usage(path.parent).free < 2**20:
        number = errno.ENOSPC
    if number is not None:
        return storage_error(path, OSError(number, os.strerror(number)))
    return StorageError(f"{path}: cannot be written: {words}. Check the disk, and give the same command again.")


def _sync(partial: Path) -> None:
    """The new picture is on the disk before it gets its name."""
    if partial.is_dir():
        sync_file_system(partial)  # ten thousands of tiles
        return
    with partial.open("rb+") as file:
        os.fsync(file.fileno())


def put_in_place(partial: Path, path: Path, on_whole: Callable[[Path], None]) -> None:
    """Give a finished picture, file or folder, its name, once it is on the disk and `on_whole` has returned.

    A folder cannot be replaced at once: the old one steps aside until then.
    """
    _sync(partial)
    on_whole(partial)
    old = partial.with_name(f"{partial.name}.old")
    if partial.is_dir() and taken(path):
        path.rename(old)  # of a link the link, not what it leads to
    try:
        partial.replace(path)
    except OSError:
        if taken(old):
            old.rename(path)
        raise
    sync_folder(path.parent)
    remove(old)


def write_rows(
    bands: Iterator[NDArray[Any]],
    output: Path,
    size: Size,
    cancel: CancelToken,
    on_progress: Callable[[float], None] | None = None,
    on_whole: Callable[[Path], None] = lambda partial: None,
) -> None:
    """Write bands of rows, one below the other, whatever their heights, as a picture of `size`."""
    rest: list[NDArray[Any]] = []

    def read_rows(y0: int, y1: int) -> NDArray[Any]:
        while sum(map(len, rest)) < y1 - y0:
            rest.append(next(bands))
        found = np.concatenate(rest)
        rest[:] = [found[y1 - y0 :]]
        return found[: y1 - y0]

    write_image(output, size[1], size[0], read_rows, cancel=cancel, on_progress=on_progress, on_whole=on_whole)
