"""FP8 on a CPU: local layers round what they multiply to e4m3 wherever Megatron would enter an FP8 context.

    python -m tests.distributed.fp8_stand_in train ...        the command line of nemo-jepo with it

Transformer Engine does the same to its inputs, with one scale a tensor; products and everything else stay as they are.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_block, transformer_config
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max

_active = [False]


def rounded(values: Tensor) -> Tensor:
    """The nearest e4m3 numbers under one scale; the gradient passes as if nothing had happened."""
    if not values.numel():  # an expert that no token chose
        return values
    scale = values.detach().abs().max().clamp_min(1e-12) / LARGEST
    return values + ((values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale - values).detach()


@contextmanager
def _rounding() -> Iterator[None]:
    before, _active[0] = _active[0], True
    try:
        yield
    finally:
        _active[0] = before


@contextmanager
def installed() -> Iterator[None]:
    """Models that are built in this block compute so."""
    from nemo_jepo.actor import actor, model

    def context(config: Any, layer: int = -1, is_init: bool = False) -> Any:
        return _rounding() if config.fp8 and not is_init else nullcontext()

    def rounding(plain: Any) -> Any:
        def forward(self: Any, values: Tensor, *args: Any, **more: Any) -> Any:
            return plain(self, rounded(values) if _active[0] else values, *args, **more)

        return forward

    with ExitStack() as patches:
        for place, name, value in (
            (transformer_block, "get_fp8_context", context),
            (transformer_config, "is_te_min_version", lambda *_, **__: True),  # asked where experts meet fp8
            (actor, "check_fp8", lambda *_: None),
            (model, "assert_fp8_is_used", lambda *_: None),
            (ColumnParallelLinear, "forward", rounding(ColumnParallelLinear.forward)),
            (RowParallelLinear, "forward", rounding(RowParallelLinear.forward)),
        ):
            patches.enter_context(mock.patch.object(place, name, value))
        yield


if __name__ == "__main__":
    from nemo_jepo import cli
    from nemo_jepo.actor import parallel

    parallel.init_distributed()
    with installed():
        sys.exit(cli.main())
