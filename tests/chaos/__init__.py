"""Real runs that are killed, signalled and stopped at random moments: `python -m tests.chaos`, `make chaos`."""
