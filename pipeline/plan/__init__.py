"""The plan of a run: its work, memory and disk, computed before it starts."""
