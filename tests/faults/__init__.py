"""A fault harness: kills, damaged files, several processes, power cuts. ``python -m tests.faults`` prints a table."""
