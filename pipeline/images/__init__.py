"""Image files: headers, streaming decode and resize, export. The only importer of pyvips."""

from pipeline.images.reader import stream_rgb, vips_settings, vips_version
from pipeline.images.resize import resize_window, source_window

__all__ = ["resize_window", "source_window", "stream_rgb", "vips_settings", "vips_version"]
