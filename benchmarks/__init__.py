"""Measurements of one claim each; docs/results/performance.md has the numbers. `python -m benchmarks.NAME --help`."""
