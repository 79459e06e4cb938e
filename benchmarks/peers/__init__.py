"""One update and one round of sampling beside TRL's and beside plain PyTorch: `python -m benchmarks.peers --help`."""
