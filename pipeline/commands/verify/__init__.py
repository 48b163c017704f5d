"""Verification and repair of a run directory."""
