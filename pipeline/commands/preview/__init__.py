"""Previews: sweeps over settings, contact sheets, crops at full size."""
