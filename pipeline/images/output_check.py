"""Checks of an output before the run: its format, size, compression and place."""

from __future__ import annotations

import errno
import functools
from collections.abc import Mapping
from pathlib import Path

import pyvips

from pipeline.core.errors import ConfigError, storage_error
from pipeline.core.files import names_in, partial_name, unwritable
from pipeline.core.image_formats import COMPRESSIONS, FORMATS, OUTPUT_SUFFIXES, Format, format_of, unsupported_options


def check_output(path: Path, width_px: int, height_px: int, bits: int, compression: str) -> None:
    """Refuse an output that would fail at the end of a run. `compression` applies to TIFF only.

    Raises ConfigError: unknown suffix, image too large or too deep for the format, a compression that is unknown,
    unsuitable or not in this libvips, a name that is taken by something else, a folder that cannot be written to;
    StorageError for a read-only disk.
    """
    form = output_format(path)
    side_px = max(width_px, height_px)
    if side_px > form.max_side_px:
        other = [f for f in FORMATS if f.max_side_px >= side_px]
        limit = f"{form.name} is limited to {form.max_side_px:,} px a side, not {side_px:,}"
        raise ConfigError(f"{path}: {limit}.{_suggest(other)}")
    if bits not in form.bits:
        other = [f for f in FORMATS if bits in f.bits]
        raise ConfigError(f"{path}: {form.name} is not written with {bits} bits a channel.{_suggest(other)}")
    _check_compression(path, form, bits, compression)
    _check_place(path, form)


def refuse_unheeded(path: Path, options: Mapping[str, object], alpha: bool = False) -> None:
    """Raise ConfigError for export options that the format would ignore; see image_formats.unsupported_options."""
    if wrong := [f"{option}: {why}" for option, why in unsupported_options(path, options, alpha)]:
        raise ConfigError(f"{path}: {'. '.join(wrong)}.")


def output_format(path: Path) -> Format:
    """The format that the suffix names. Raises ConfigError if there is none."""
    if (form := format_of(path)) is not None:
        return form
    suffixes = ", ".join(OUTPUT_SUFFIXES)
    raise ConfigError(f"{path}: the suffix '{path.suffix}' names no output format; use one of {suffixes}.")


def _suggest(formats: list[Format]) -> str:
    return " Use " + " or ".join(form.suffixes[0] for form in formats) + "." if formats else ""


def _check_compression(path: Path, form: Format, bits: int, compression: str) -> None:
    if compression not in COMPRESSIONS:
        usable = ", ".join(tiff_compressions())
        raise ConfigError(f"{path}: unknown compression '{compression}'; allowed: {usable}.")
    if form.name != "TIFF":
        return
    if compression == "jpeg" and bits != 8:
        raise ConfigError(f"{path}: JPEG compression in TIFF has 8 bits a channel, not {bits}. Use deflate.")
    if not _can_compress(compression):
        usable = ", ".join(tiff_compressions())
        raise ConfigError(f"{path}: this build of libvips cannot write {compression} in TIFF; it can: {usable}.")


def tiff_compressions() -> tuple[str, ...]:
    """The compressions that this build of libvips can write into a TIFF."""
    return tuple(name for name in COMPRESSIONS if _can_compress(name))


@functools.cache
def _can_compress(compression: str) -> bool:
    # The codecs of libvips differ between wheels, so this build is asked.
    try:
        pyvips.Image.black(16, 16).tiffsave_buffer(compression=compression)
    except pyvips.Error:
        return False
    return True


def _check_place(path: Path, form: Format) -> None:
    """Refuse a path that cannot be written, or that would overwrite anything but an older output."""
    _check_name(path)
    if form.name == "DeepZoom":
        names = {f"{path.stem}.dzi", f"{path.stem}_files"}
        if path.exists() and not (path.is_dir() and names_in(path) <= names):
            raise ConfigError(f"{path}: exists and is not a DeepZoom folder; it would be lost. Choose another name.")
    elif form.name == "OME-Zarr":
        levels = all(name == "zarr.json" or name.isdigit() for name in names_in(path))
        if path.exists() and not (path.is_dir() and levels):
            raise ConfigError(f"{path}: exists and is not an OME-Zarr of ours; it would be lost. Choose another name.")
    elif path.is_dir():
        raise ConfigError(f"{path}: is a folder. Choose the name of a file.")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(f"{path}: {folder} is a file, not a folder. Choose another place.")
    if (error := unwritable(folder)) is not None:
        if error.errno == errno.EROFS:  # a disk becomes read-only by failing, so this may not be the config's fault
            raise storage_error(path, error)
        raise ConfigError(
            f"{path}: the folder {folder} cannot be written to. Choose another place, or change its permissions."
        )


def _check_name(path: Path) -> None:
    try:
        path.with_name(f"{partial_name(path)}.old").lstat()  # the longest name that is derived from it
    except OSError as error:  # usually FileNotFoundError
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(f"{path}: its name is too long for the file system. Choose a shorter one.") from error
