"""nemo-jepo doctor: what would stop or slow a run on this machine, found before it starts.

versions.py   installed packages against what they ask of each other
machine.py    GPUs, disk, file system, ports
run.py        a run's settings, tokenizer, marker, data and batch arithmetic
groups.py     all ranks together: process groups, a shared file system
command.py    the command line
"""
