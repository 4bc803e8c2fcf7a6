"""Benchmarks: run them as modules, `python -m bench.step_overhead --help`."""
