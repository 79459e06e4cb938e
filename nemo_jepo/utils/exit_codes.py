"""What a command's exit code says; slurm/ and `nemo-jepo experiment` read it."""

DONE = 0
FAILED = 1
BAD_SETTINGS = 2
"""A setting or a file that the user must change; nothing was trained."""
INTERRUPTED = 75
"""Saved, or not begun, and goes on from there when the same command is started again (EX_TEMPFAIL)."""
ENDED_AT_ONCE = 130
"""By Ctrl-C, the second one where a run was saving; nothing more was saved (128 + SIGINT)."""
