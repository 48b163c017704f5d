"""Image files: headers, streaming decode and resize, export. The only importer of pyvips."""

from pipeline.images.reader import resize_window, source_window, stream_rgb, vips_settings

__all__ = ["resize_window", "source_window", "stream_rgb", "vips_settings"]
