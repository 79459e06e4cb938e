"""What every test runs under: one thread, no network, the same hypothesis examples each time."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")
