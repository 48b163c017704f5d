"""What independent readers find in an image file: geometry, pages, resolution, profile and metadata."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.text import count

# Tags of metadata, by what they are called in the table.
_TEXTS = {315: "Artist", 33432: "Copyright", 270: "ImageDescription", 305: "Software"}
_TIFF_TAGS = _TEXTS | {33723: "IPTC", 700: "XMP", 34853: "GPS"}
_EXIF_TAGS = _TEXTS | {34853: "GPS"}
# Pillow calls the XMP of a PNG by the name of its chunk.
_PILLOW_BLOCKS = {"xmp": "XMP", "XML:com.adobe.xmp": "XMP", "photoshop": "IPTC"}


class Finding(NamedTuple):
    """The columns of the table."""

    geometry: str
    pages: str
    dpi: str
    profile: str
    metadata: str


class Reader(NamedTuple):
    """A reader, the ends of the names that it opens, and what has to be installed for it."""

    open: Callable[[Path], Finding]
    suffixes: tuple[str, ...]
    needs: str


def missing(name: str) -> str:
    """What has to be installed for a reader; empty if it is there."""
    needs = READERS[name].needs
    present = shutil.which(needs) or importlib.util.find_spec(needs.replace("-", "_"))
    return "" if present else needs


def _tile_of(path: Path) -> Path:
    """The file itself, or the first tile of a DeepZoom's largest level."""
    if not path.is_dir():
        return path
    levels = next(path.glob("*_files")).iterdir()
    return sorted(max(levels, key=lambda level: int(level.name)).iterdir())[0]


def _profile(data: bytes | None) -> str:
    if not data:
        return "none"
    from io import BytesIO  # noqa: PLC0415

    from PIL import ImageCms  # noqa: PLC0415 - an optional package

    return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(BytesIO(data))).strip()


def _named(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "none"


def _dpi(horizontal: float, vertical: float) -> str:
    return f"{horizontal:.4g}" if abs(horizontal - vertical) < 0.01 else f"{horizontal:.4g} × {vertical:.4g}"


def by_tifffile(path: Path) -> Finding:
    import tifffile  # noqa: PLC0415

    with tifffile.TiffFile(path) as file:
        page: Any = file.pages[0]
        page.asarray()  # raises for pixels that it cannot decode
        tags = {tag.name: tag.value for tag in page.tags.values()}
        blocks = f"tiles of {page.tilewidth} px" if page.is_tiled else f"strips of {page.rowsperstrip} rows"
        kind = "BigTIFF" if file.is_bigtiff else "classic"
        geometry = f"{page.imagewidth}×{page.imagelength} {page.dtype}, {kind}, {blocks}, {page.compression.name}"
        subifds = f", {len(page.subifds)} SubIFDs" if page.subifds else ""
        pages = f"{len(file.pages)}{subifds}; {count(len(file.series[0].levels), 'level')}"
        per = {2: 1.0, 3: 2.54}.get(int(tags.get("ResolutionUnit", 1)))
        values = [tags[name][0] / tags[name][1] * per for name in ("XResolution", "YResolution")] if per else []
        found = [name for number, name in _TIFF_TAGS.items() if number in page.tags]
        return Finding(
            geometry, pages, _dpi(*values) if values else "none", _profile(tags.get("InterColorProfile")), _named(found)
        )


def by_pillow(path: Path) -> Finding:
    from PIL import Image  # noqa: PLC0415

    with Image.open(_tile_of(path)) as image:
        image.load()
        where = "a tile: " if path.is_dir() else ""
        geometry = f"{where}{image.size[0]}×{image.size[1]} {image.mode}"
        exif = image.getexif()
        found = [name for number, name in _EXIF_TAGS.items() if number in exif]
        found += [name for key, name in _PILLOW_BLOCKS.items() if image.info.get(key)]
        dpi = image.info.get("dpi")
        shown = _dpi(*map(float, dpi)) if dpi else "none"
        return Finding(
            geometry, str(getattr(image, "n_frames", 1)), shown, _profile(image.info.get("icc_profile")), _named(found)
        )


def by_exiftool(path: Path) -> Finding:
    command = ["exiftool", "-j", "-G1", "-a", str(_tile_of(path))]
    (tags,) = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    plain = {name.rpartition(":")[2]: value for name, value in reversed(tags.items())}
    wanted = (*_TEXTS.values(), "Caption-Abstract", "Keywords", "Title", "GPSLatitude")
    found = [f"{name} {plain[name]}" for name in wanted if name in plain]
    found += sorted({name.partition(":")[0] for name in tags if name.startswith("XMP-")})
    unit = {"cm": 2.54, "inches": 1.0}.get(plain.get("ResolutionUnit", ""), 0)
    if "PixelsPerUnitX" in plain:
        dpi = (
            _dpi(*(plain[f"PixelsPerUnit{axis}"] * 0.0254 for axis in "XY"))
            if plain.get("PixelUnits") == "meters"
            else "none"
        )
    else:
        dpi = (
            _dpi(*(float(plain[f"{axis}Resolution"]) * unit for axis in "XY"))
            if unit and "XResolution" in plain
            else "none"
        )
    size = plain.get("ImageSize") or plain.get("MediaBox", "")
    pages = str(plain.get("PageCount", ""))
    return Finding(str(size).replace("x", "×"), pages, dpi, str(plain.get("ProfileDescription", "none")), _named(found))


def by_openslide(path: Path) -> Finding:
    import openslide  # noqa: PLC0415

    with openslide.OpenSlide(path) as slide:
        for level in range(slide.level_count):
            slide.read_region((0, 0), level, (64, 64))  # raises for tiles that it cannot decode
        levels = ", ".join(f"{width}×{height}" for width, height in slide.level_dimensions)
        mpp = slide.properties.get("openslide.mpp-x")
        profile = slide.color_profile
        description = "none"
        if profile is not None:
            from PIL import ImageCms  # noqa: PLC0415

            description = ImageCms.getProfileDescription(profile).strip()
        found = [name for name in _TEXTS.values() if f"tiff.{name}" in slide.properties]
        dpi = f"{25400 / float(mpp):.4g}" if mpp else "none"
        return Finding(levels, count(slide.level_count, "level"), dpi, description, _named(found))


def by_ome_zarr_models(path: Path) -> Finding:
    import zarr  # noqa: PLC0415
    from ome_zarr_models import open_ome_zarr  # noqa: PLC0415

    stored = zarr.open_group(path, mode="r")
    group = open_ome_zarr(stored)
    (image,) = group.ome_attributes.multiscales
    shapes = [group.members[dataset.path].shape for dataset in image.datasets]
    scales = [dataset.coordinateTransformations[0].scale for dataset in image.datasets]
    units = {axis.unit for axis in image.axes if axis.type == "space" and axis.unit}
    scale = f"{scales[0][-1]:.4g} {units.pop()}" if units else "none"
    geometry = ", ".join(f"{width}×{height}×{channels}" for channels, height, width in shapes)
    version = group.ome_attributes.version
    found = ["omero"] if getattr(group.ome_attributes, "omero", None) else []
    texts: Any = stored.attrs.get("xmp", {})  # beside what OME-Zarr knows
    found += [f"{name} {', '.join(values)}" for name, values in texts.items() if name.startswith("dc:")]
    return Finding(geometry, f"{count(len(shapes), 'level')}, version {version}", scale, "none", _named(found))


def by_pdfinfo(path: Path) -> Finding:
    text = subprocess.run(["pdfinfo", str(path)], capture_output=True, text=True, check=True).stdout
    facts = dict(re.findall(r"^(.*?): +(.*)$", text, re.MULTILINE))
    listed = subprocess.run(["pdfimages", "-list", str(path)], capture_output=True, text=True, check=True).stdout
    *_, image = listed.splitlines()
    fields = image.split()  # page num type width height color comp bpc enc interp object ID x-ppi y-ppi size ratio
    geometry = f"{facts['Page size']}; an image of {fields[3]}×{fields[4]} px"
    names = [name for name in ("Title", "Author", "Producer") if name in facts]
    return Finding(geometry, facts["Pages"], _dpi(float(fields[12]), float(fields[13])), fields[5], _named(names))


READERS = {
    "tifffile": Reader(by_tifffile, (".tif",), "tifffile"),
    "Pillow": Reader(by_pillow, (".tif", ".png", ".jpg", ".dz"), "PIL"),
    "exiftool": Reader(by_exiftool, (".tif", ".png", ".jpg", ".dz", ".pdf"), "exiftool"),
    "OpenSlide": Reader(by_openslide, (".tif",), "openslide"),
    "ome-zarr-models": Reader(by_ome_zarr_models, (".zarr",), "ome-zarr-models"),
    "pdfinfo": Reader(by_pdfinfo, (".pdf",), "pdfinfo"),
}
