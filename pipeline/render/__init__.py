"""Rendering a stage: tile tasks, the Adam update, ingest and export."""
