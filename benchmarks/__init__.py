"""Measurements of one claim each; docs/performance.md holds their figures. `python -m benchmarks.NAME --help`."""
