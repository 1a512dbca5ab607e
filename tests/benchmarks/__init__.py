"""Benchmarks: ``python -m tests.benchmarks`` prints every table, each row measured beside its reference in one run."""
