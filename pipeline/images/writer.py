"""Streaming export of finished images.

Axes in names: H rows, W columns, C channels. The caller supplies bands of rows, (h, W, C); libvips reads them as an
uncompressed TIFF, once from top to bottom, because its savers stream only from a file-like source:

    read_rows (caller's thread) ──► RowSource: TIFF header, then bands ──► tiffload ──► saver (its own thread)

The smaller levels of a TIFF follow the largest in the file, and libvips keeps them in temporary files until then. The
output's name is only ever nothing, the previous output, or the complete new one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
from numpy.typing import NDArray

from pipeline.core.cancel import NEVER, CancelToken
from pipeline.core.errors import StorageError, storage, storage_error
from pipeline.core.files import partial_beside, partial_name, remove, sync_file_system, sync_folder, taken
from pipeline.core.image_formats import RGB8, PixelKind
from pipeline.core.lengths import DEFAULT_DPI, MM_PER_INCH
from pipeline.core.tiling import Size
from pipeline.images import icc
from pipeline.images.color import with_profile
from pipeline.images.jfif import JfifFile
from pipeline.images.metadata import ImageMetadata, attach, attach_exif, tiff_tags
from pipeline.images.output_check import check_output, output_format
from pipeline.images.output_color import OutputColors
from pipeline.images.tiff_layout import TILES, TiffLayout, tiff_options
from pipeline.images.tiff_tags import add_tags
from pipeline.images.vips_streams import POLL_S, Rows, RowSource

# What is written is synced in steps of this many bytes of pixels, so that the last sync, which cannot be interrupted,
# is short.
_SYNC_BYTES = 256 * 2**20
# libvips takes the folder of its temporary files from TMPDIR of the process, so one export at a time may change it.
_ENVIRONMENT = threading.Lock()


@dataclass(frozen=True)
class ImageSpec:
    """An output image: `path`, whose suffix names the format, size, kind of pixels, and options of the format.

    `compression`: of TIFF. `quality`: of JPEG, 1 to 100. `pyramid`: a TIFF also has smaller levels, which take their
    own size on the disk a second time until it is complete. `layout`: how a TIFF is stored. `dpi`: the resolution on
    paper, where the format has a place for it. `colors`: the profile, None: sRGB. `metadata`: None
    writes none, not even the program's name. Alpha is written unassociated (not premultiplied).
    """

    path: Path
    width_px: int
    height_px: int
    kind: PixelKind = RGB8
    compression: str = "deflate"
    quality: int = 95
    pyramid: bool = True
    layout: TiffLayout = TILES
    dpi: float = DEFAULT_DPI
    colors: OutputColors | None = None
    metadata: ImageMetadata | None = None

    @property
    def rows_kind(self) -> PixelKind:
        """The pixels that the rows have."""
        return self.kind if self.colors is None else self.colors.rows_kind(self.kind)


def write_image(
    spec: ImageSpec,
    read_rows: Callable[[int, int], Rows],
    *,
    on_progress: Callable[[float], None] = lambda share: None,
    cancel: CancelToken = NEVER,
    on_whole: Callable[[Path], None] = lambda partial: None,
) -> None:
    """Write an image as TIFF, PNG, JPEG or DeepZoom.

    read_rows(y0, y1) returns rows [y0, y1), (y1 − y0, width_px, channels), of `spec.rows_kind`: uint8 or uint16; it is
    called in the calling thread, from top to bottom, each row once. A DeepZoom is a folder: ``name.dz/name.dzi`` beside
    ``name.dz/name_files/``, of JPEG tiles, with alpha of PNG tiles. `on_progress` receives the fraction done, at last
    1.0. `on_whole` is called with the file or folder when it is complete and synced, before it is renamed to its name.

    Raises Stopped soon after `cancel` is set, the errors of check_output, StorageError if the disk is full or fails,
    and what read_rows and on_progress raise; in all these cases a previous output stays as it was.
    """
    path = spec.path
    check_output(path, spec.width_px, spec.height_px, spec.kind.bits, spec.compression)
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        levels: contextlib.AbstractContextManager[Callable[[], None]] = contextlib.nullcontext(lambda: None)
        if spec.pyramid and output_format(path).name == "TIFF":
            levels = _libvips_files_in(path.with_name(partial_name(path)).absolute())
        with partial_beside(path) as partial:
            with levels as restore_environment:
                _Export(spec, partial, restore_environment).run(read_rows, on_progress, cancel)
            put_in_place(partial, path, on_whole)
    on_progress(1.0)


@contextlib.contextmanager
def _libvips_files_in(folder: Path) -> Iterator[Callable[[], None]]:
    """Create a folder for libvips' temporary files until the yielded function is called; delete it afterwards.

    The default, /tmp, may be small or in memory. On most file systems the temporary files have no names; elsewhere,
    new_partial deletes what a killed process left, with the folder. Only the C library's environment changes:
    os.environ, which Python's tempfile reads and worker processes inherit, does not.
    """
    folder.mkdir(0o700)
    try:
        with contextlib.ExitStack() as changes:
            changes.enter_context(_ENVIRONMENT)
            changes.callback(_restore_variable, "TMPDIR")
            os.putenv("TMPDIR", folder)
            yield changes.close
    finally:
        with contextlib.suppress(OSError):
            remove(folder)


def _restore_variable(name: str) -> None:
    if name in os.environ:
        os.putenv(name, os.environ[name])
    else:
        os.unsetenv(name)


class _Export:
    """Runs one libvips saver in a thread while the calling thread supplies rows.

    Rows are read in the calling thread, so that signals and the caller's own errors work as usual.
    """

    def __init__(self, spec: ImageSpec, partial: Path, restore_environment: Callable[[], None]) -> None:
        self._spec, self._partial, self._restore_environment = spec, partial, restore_environment
        self._source = RowSource(spec.width_px, spec.height_px, spec.rows_kind)
        self._failures: list[Exception] = []
        # what savers write of an image's fields; without metadata they would add EXIF of their own
        self._kept = "icc" if spec.metadata is None else "icc|exif|xmp|iptc"

    def run(
        self, read_rows: Callable[[int, int], Rows], on_progress: Callable[[float], None], cancel: CancelToken
    ) -> None:
        name = f"export {self._spec.path.name}"
        thread = threading.Thread(target=self._run_saver, name=name, daemon=True)
        thread.start()
        try:
            self._supply_rows(read_rows, on_progress, cancel)
            while thread.is_alive():
                thread.join(POLL_S)
                cancel.raise_if_set()
        except BaseException:
            self._source.cancel()
            raise
        finally:
            thread.join()
        if self._failures:
            raise self._failures.pop()  # not [0]: a reference cycle would keep the deleted file open on a full disk

    def _supply_rows(
        self, read_rows: Callable[[int, int], Rows], on_progress: Callable[[float], None], cancel: CancelToken
    ) -> None:
        source, unsynced = self._source, 0
        for y0 in range(0, source.height_px, source.band_px):
            while not source.wait_for_room(POLL_S):
                cancel.raise_if_set()
            if source.cancelled.is_set():
                break  # the saver has failed
            y1 = min(y0 + source.band_px, source.height_px)
            rows = read_rows(y0, y1)
            source.put(rows, y0, y1)
            unsynced += rows.nbytes
            if self._partial.is_file() and self._partial.stat().st_size:
                self._restore_environment()  # libvips opens the temporary files of all levels before it writes pixels
                if unsynced > _SYNC_BYTES:
                    _sync_file(self._partial)
                    unsynced = 0
            on_progress(0.99 * y1 / source.height_px)  # the rest is the pyramid, the sync and the rename

    def _run_saver(self) -> None:
        words = None
        try:
            self._save(self._with_metadata(self._with_dpi(self._with_colors(self._source.image()))))
            self._add_tags()
        except pyvips.Error as error:
            words = str(error.detail or error).strip()
        except Exception as error:  # raised again in the caller's thread
            self._failures.append(error)
        finally:
            self._source.cancel()
        if words is not None:  # not within `except`: the traceback would keep libvips' file open
            self._failures.append(_saver_error(self._spec.path, words))

    def _with_dpi(self, image: Any) -> Any:
        """The image with its resolution, which libvips counts in px per mm and writes in inches."""
        per_mm = self._spec.dpi / MM_PER_INCH
        image = image.copy(xres=per_mm, yres=per_mm)
        image.set_type(pyvips.GValue.gstr_type, "resolution-unit", "in")
        return image

    def _with_colors(self, image: Any) -> Any:
        """The image in the output's colours, with their profile."""
        colors = self._spec.colors
        profile = icc.builtin_profile("srgb") if colors is None else colors.profile
        return with_profile(image if colors is None else colors.through_tables(image, self._spec.kind), profile)

    def _with_metadata(self, image: Any) -> Any:
        """The image with the fields from which savers of JPEG and PNG make EXIF, IPTC and XMP."""
        metadata, form = self._spec.metadata, output_format(self._spec.path).name
        if metadata is not None and form in ("JPEG", "PNG"):
            attach(image, metadata)
        elif metadata is not None and form == "DeepZoom":  # whose tiles alone have a place, each a little
            attach_exif(image, metadata)
        return image

    def _add_tags(self) -> None:
        """The tags of a TIFF that libvips does not write."""
        metadata = self._spec.metadata
        if metadata is not None and output_format(self._spec.path).name == "TIFF":
            add_tags(self._partial, tiff_tags(metadata), metadata.gps)

    def _save(self, image: Any) -> None:
        """Run the saver. Progressive and optimised JPEG are off, because they keep the whole image in memory."""
        spec, name = self._spec, str(self._partial)
        match output_format(spec.path).name:
            case "TIFF":
                size, pixel_bytes = (image.height, image.width), image.bands * (1 if image.format == "uchar" else 2)
                layout = tiff_options(size, pixel_bytes, spec.compression, spec.pyramid, spec.layout)
                image.tiffsave(name, keep="icc", resunit="inch", Q=spec.quality, **layout)
            case "PNG":
                image.pngsave(name, keep=self._kept)
            case "JPEG":
                self._save_jpeg(image)
            case "DeepZoom":
                self._save_deepzoom(image)
            case other:
                raise AssertionError(f"{other} is written by another module")

    def _save_jpeg(self, image: Any) -> None:
        with JfifFile(self._partial, self._spec.dpi, self._spec.path) as file:
            target = pyvips.TargetCustom()
            target.on_write(file.write)
            image.jpegsave_target(target, Q=self._spec.quality, keep=self._kept)

    def _save_deepzoom(self, image: Any) -> None:
        """Write the folder under fixed names, then rename: dzsave reads options in brackets from its file name."""
        self._partial.mkdir()
        suffix = ".png" if self._spec.kind.alpha else ".jpg"
        image.dzsave(str(self._partial / "image"), suffix=suffix, Q=self._spec.quality, keep=self._kept)
        tiles, name = self._partial / "image_files", self._spec.path.stem
        # It contains the date, which would make two exports of one image differ.
        (tiles / "vips-properties.xml").unlink(missing_ok=True)
        tiles.rename(self._partial / f"{name}_files")
        (self._partial / "image.dzi").rename(self._partial / f"{name}.dzi")


def _saver_error(path: Path, words: str) -> OSError:
    """A libvips error as a StorageError; libvips gives the system's error as text only."""
    number = next((number for number in errno.errorcode if os.strerror(number) in words), None)
    if number is None and shutil.disk_usage(path.parent).free < 2**20:
        number = errno.ENOSPC
    if number is not None:
        return storage_error(path, OSError(number, os.strerror(number)))
    return StorageError(f"{path}: cannot be written: {words}. Check the disk, and run the same command again.")


def _sync_file(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def put_in_place(partial: Path, path: Path, on_whole: Callable[[Path], None]) -> None:
    """Sync a complete file or folder, call `on_whole` and rename it to its name.

    A folder cannot be replaced in one step, so an old one is renamed first, and deleted afterwards.
    """
    if partial.is_dir():
        sync_file_system(partial)  # faster than one sync for each of tens of thousands of tiles
    else:
        _sync_file(partial)
    on_whole(partial)
    old = partial.with_name(f"{partial.name}.old")
    if partial.is_dir() and taken(path):
        path.rename(old)  # of a link the link itself, not its target
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
    on_progress: Callable[[float], None] = lambda share: None,
    on_whole: Callable[[Path], None] = lambda partial: None,
    colors: OutputColors | None = None,
) -> None:
    """Write bands of uint8 rows of any heights, (h, W, 3), one below the other, as an image of `size` (H, W)."""
    pending: list[NDArray[Any]] = []

    def read_rows(y0: int, y1: int) -> NDArray[Any]:
        while sum(map(len, pending)) < y1 - y0:
            pending.append(next(bands))
        rows = np.concatenate(pending)
        pending[:] = [rows[y1 - y0 :]]
        return rows[: y1 - y0]

    spec = ImageSpec(output, width_px=size[1], height_px=size[0], colors=colors)
    write_image(spec, read_rows, cancel=cancel, on_progress=on_progress, on_whole=on_whole)
