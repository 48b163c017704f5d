"""The mathematics of the losses: no store, no files."""
