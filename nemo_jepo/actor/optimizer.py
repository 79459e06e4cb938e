"""Megatron's optimizer and schedule over model chunks: AdamW, fp32 main weights under bf16, sharded over DP."""

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import OptimConfig


def wrap_data_parallel(chunks: Sequence[torch.nn.Module], distributed_optimizer: bool) -> list[DistributedDataParallel]:
    """Megatron's DDP with fp32 gradients that are SUMMED over micro-batches and data-parallel ranks.

    Token weights already hold the global denominators, so `finalize_model_grads` gets no token count to divide by.
    """
    config = get_model_config(chunks[0])
    reduction = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=False,
    )
    wrapped = [
        DistributedDataParallel(config, reduction, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        _add_gradients_in_products(chunk)
    if distributed_optimizer:
        for chunk in wrapped:
            _count_padding_as_parameters(chunk)
    config.finalize_model_grads_func = lambda chunks, num_tokens=None, **groups: finalize_model_grads(chunks, **groups)
    config.grad_scale_func = None
    return wrapped


def _add_gradients_in_products(wrapped: DistributedDataParallel) -> None:
    """Let Transformer Engine's matrix products add weight gradients to DDP's fp32 sums, without a bf16 tensor between.

    Megatron's own setting, gradient_accumulation_fusion, asks for Apex in the output layer. Experts stay as they are:
    their grouped products have not been run like this.
    """
    for name, module in wrapped.named_modules():
        if hasattr(module, "fuse_wgrad_accumulation") and ".experts." not in name:
            module.fuse_wgrad_accumulation = True


def _count_padding_as_parameters(wrapped: DistributedDataParallel) -> None:
    """Keep the optimizer state of several buckets where its readers look for it.

    DistributedOptimizer.get_parameter_state_dp_zero (megatron-core 0.16.1) drops the padding between buckets, but
    sharded_param_state_fully_reshardable goes on with offsets that count it. A tied embedding on the last pipeline
    stage is a bucket of its own, so every later parameter would be saved from a shifted place.
    """
    for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers):
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], optim: OptimConfig, clip: float, max_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW over the chunks' parameters, and its learning-rate schedule in optimizer steps.

    Args:
        clip: largest global gradient norm (all model-parallel ranks together); 0 for none.
        max_steps: end of the cosine decay.
    """
    config = get_model_config(chunks[0])
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.sched.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=clip,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=optim.distributed,
        ),
        list(chunks),
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.sched.min_lr if optim.sched.name == "cosine" else optim.lr,
        lr_warmup_steps=optim.sched.warmup_steps,
        lr_decay_steps=max(max_steps, optim.sched.warmup_steps + 1),
        lr_decay_style=optim.sched.name,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=max_steps,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def optimizer_kind(optim: OptimConfig, precision: str) -> str:
    """The form in which a checkpoint holds the optimizer's state: `distributed`, or `plain` and the precision.

    Megatron's distributed optimizer keeps fp32 main weights in either precision; the others are classes of their own.
    """
    return "distributed" if optim.distributed else f"plain {precision}"


def require_same_kind(checkpoint: Path, saved: str | None, wanted: str) -> None:
    """Raise ConfigError where a checkpoint's optimizer state is of a kind that this run's optimizer cannot read.

    Args:
        saved: `optimizer_kind` of the run that wrote it; None in a checkpoint that does not say.
        wanted: that of this run.
    """
    if saved in (None, wanted):
        return
    rule = f"{checkpoint} holds the state of a {saved} optimizer, and this one is {wanted}"
    fix = "Change it back, or start a new run with pretrained_checkpoint.restore_from_path set to that folder"
    if "distributed" in (saved, wanted):
        raise ConfigError("model.optim.distributed", wanted == "distributed", rule, fix)
    raise ConfigError("trainer.precision", wanted.removeprefix("plain "), rule, fix)
