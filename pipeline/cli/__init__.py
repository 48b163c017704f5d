"""The command line: arguments to calls, exit codes, progress display, signals."""
