"""The mathematics of the losses, without store and files."""
