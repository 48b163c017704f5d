"""The web page of a run: reads the run directory, never writes into it. The only importer of tornado."""

from pipeline.viewer.server import Viewer, ViewerOptions

__all__ = ["Viewer", "ViewerOptions"]
