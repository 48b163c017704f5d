"""The VGG network and its weights."""
