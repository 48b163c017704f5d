"""Neural style transfer at print size."""
