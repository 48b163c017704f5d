"""The command line: options, exit codes, progress display, reports and signals."""
