"""What the commands do: one file per command, without arguments or printing."""
