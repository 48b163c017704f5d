"""The configuration: its fields, its YAML reader and its error messages."""
