"""Used by all other packages: errors, events, tile geometry, the layer table, files and text."""
