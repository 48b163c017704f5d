"""Sizes of paper for proof sheets."""

from __future__ import annotations

# (width, height) in mm
PAPERS_MM = {"a4": (210.0, 297.0), "a3": (297.0, 420.0), "letter": (215.9, 279.4)}
# Below, letters of 2.4 mm are illegible; above, a sheet of A3 takes more than 0.3 GB.
MIN_PROOF_DPI, MAX_PROOF_DPI = 72.0, 720.0
# More parts of an image would be smaller than 9 cm on A4.
MAX_PARTS = 6
PROOF_SUFFIXES = (".pdf", ".tif", ".tiff")
