"""An image as a PDF of one page, at its size on paper and with its colour profile."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pikepdf
import pyvips
from numpy.typing import NDArray

_PT_PER_INCH = 72
_PT_PER_MM = _PT_PER_INCH / 25.4


def write_pdf(pixels_HWC: NDArray[np.uint8], path: Path, dpi: float, page_mm: tuple[float, float], title: str) -> None:
    """Write sRGB pixels, without loss, at `dpi` in the upper left corner of a page of (width, height) in mm."""
    height_px, width_px, _ = pixels_HWC.shape
    page_pt = page_mm[0] * _PT_PER_MM, page_mm[1] * _PT_PER_MM
    width_pt, height_pt = width_px * _PT_PER_INCH / dpi, height_px * _PT_PER_INCH / dpi
    with pikepdf.new() as pdf:
        profile = pdf.make_stream(pyvips.Operation.call("profile_load", "srgb"), N=3, Alternate=pikepdf.Name.DeviceRGB)
        image: Any = pikepdf.Stream(pdf, zlib.compress(pixels_HWC.tobytes()))
        image.Type, image.Subtype = pikepdf.Name.XObject, pikepdf.Name.Image
        image.Width, image.Height, image.BitsPerComponent = width_px, height_px, 8
        image.ColorSpace = pikepdf.Array([pikepdf.Name.ICCBased, profile])
        image.Filter = pikepdf.Name.FlateDecode
        page = pdf.add_blank_page(page_size=page_pt)
        page.Resources = pikepdf.Dictionary(XObject=pikepdf.Dictionary(Sheet=image))
        placed = f"q {width_pt:.4f} 0 0 {height_pt:.4f} 0 {page_pt[1] - height_pt:.4f} cm /Sheet Do Q"
        page.Contents = pdf.make_stream(placed.encode())
        pdf.docinfo["/Title"] = title
        # Without it, programs that print shrink the page into the printer's margins, and the scale is lost.
        pdf.Root.ViewerPreferences = pikepdf.Dictionary(PrintScaling=pikepdf.Name("/None"))
        pdf.save(path, deterministic_id=True)
