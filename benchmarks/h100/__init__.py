"""Updates on one H100, BF16 against FP8: `python -m benchmarks.h100 --help`."""
