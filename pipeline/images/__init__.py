"""Image files: headers, streaming decode and resize, export. The only importer of pyvips and pikepdf."""

from pipeline.images.color import SRGB, Colors
from pipeline.images.header import ImageHeader, read_header
from pipeline.images.metadata import ImageMetadata, read_metadata
from pipeline.images.output_check import check_output, refuse_unheeded, tiff_compressions
from pipeline.images.output_color import (
    OutputColors,
    canvas_output,
    check_colors,
    output_profile,
    proof_profile,
    srgb_output,
    wanted_space,
)
from pipeline.images.proof_sheet import ProofSheet, write_proof
from pipeline.images.reader import stream_rgb, vips_settings, vips_version
from pipeline.images.resize import resize_window, smoothed, source_window
from pipeline.images.sheet import ContactSheet, Label, Row, SheetImage
from pipeline.images.tiff_layout import TiffLayout
from pipeline.images.writer import write_rows
