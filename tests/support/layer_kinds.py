"""Models of either kind of layers in one process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


@contextmanager
def attention_chosen_anew() -> Iterator[None]:
    """Megatron keeps its choice of attention kernels in the environment and refuses another; this one ends here."""
    with mock.patch.dict(os.environ):
        for name in ATTENTION_VARIABLES:
            os.environ.pop(name, None)
        yield


@contextmanager
def local_layers() -> Iterator[None]:
    """Without Transformer Engine, also where it is installed."""
    from nemo_jepo.actor import model

    with attention_chosen_anew(), mock.patch.object(model, "has_transformer_engine", lambda: False):
        yield
