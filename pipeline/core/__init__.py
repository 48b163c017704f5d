"""What every room may use: errors, events, tiles, the layer table, files and text."""
