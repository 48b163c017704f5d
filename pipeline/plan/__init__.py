"""What a run will do and need, computed before it starts."""
