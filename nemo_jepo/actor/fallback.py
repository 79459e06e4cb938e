"""What Megatron-core 0.16.1 takes from Transformer Engine or Apex, for a CPU and for GPUs without these libraries.

Its own substitutes do not serve here: torch.optim.AdamW keeps a step of its own for every parameter, of which the
distributed optimizer finds none before the first update and so cannot load a checkpoint; the gradient norm asks the
device for each parameter's; a router looks for a name that only Transformer Engine defines.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the step count in the parameter group, as Transformer Engine's and Apex's FusedAdam keep it."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), **settings: Any):
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": settings["eps"], "weight_decay": settings["weight_decay"]},
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One AdamW update (decoupled weight decay, bias-corrected moments); one kernel on a GPU."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param] = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
            if params:
                on_gpu = params[0].is_cuda
                # Every parameter's step before this one, which `adamw` counts up.
                steps = torch.full((len(params),), float(group["step"] - 1), device=params[0].device)
                adamw(
                    params,
                    [param.grad for param in params],
                    [self.state[param]["exp_avg"] for param in params],
                    [self.state[param]["exp_avg_sq"] for param in params],
                    [],
                    list(steps.unbind()),
                    fused=True if on_gpu else None,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )


def l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Norm [1] of all tensors together, computed where they are; a stand-in for amp_C.multi_tensor_l2norm."""
    norms = torch._foreach_norm(list(tensor_lists[0]))
    return torch.linalg.vector_norm(torch.stack(norms).float()).reshape(1), None


def install() -> None:
    """Patch Megatron-core on a CPU, and on a GPU where it found neither library."""
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_scale

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if torch.cuda.is_available() and not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    clip_grads.multi_tensor_applier, clip_grads.multi_tensor_scale_impl = (
        local_multi_tensor_applier,
        local_multi_tensor_scale,
    )
    clip_grads.l2_norm_impl = l2_norm
