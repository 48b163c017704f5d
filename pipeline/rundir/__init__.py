"""The run directory: paths, lock, journal, manifest, resume position."""
