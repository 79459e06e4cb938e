"""Gradients and one update of a bf16 model on Megatron's local layers."""

import torch

from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.precision import assert_fp8_is_used
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import ModelConfig, OptimConfig
from nemo_jepo.data.packing import pack
from tests.distributed.batch import TINY, sequences


def refusal(model: torch.nn.Module) -> str:
    try:
        assert_fp8_is_used(model)
    except ConfigError as error:
        return str(error)
    return ""


def bf16_update() -> tuple[dict[str, torch.Tensor], str]:
    """Tensors by name, and why these layers are refused in FP8."""
    world_size = torch.distributed.get_world_size()
    model = ModelConfig(tokens_per_micro_batch=64, tensor_model_parallel_size=world_size)
    parallel.init_model_parallel(model)
    hf_config = load_hf_config(TINY | {"model_type": "llama"})
    actor = MegatronJEPOActor(hf_config, model, "bf16", parallel.Layout())
    actor.start_training(OptimConfig(lr=1e-6), 1.0, 10)
    (optimizer,) = getattr(actor._optimizer, "chained_optimizers", [actor._optimizer])
    weights = [weight for group in optimizer.model_float16_groups for weight in group]
    mains = [main for group in optimizer.shard_fp32_from_float16_groups for main in group]
    assert not any(optimizer.model_fp32_groups), "every weight is bf16"

    batch = sequences()
    rows = pack(batch, actor.row_shape)
    draw = torch.Generator().manual_seed(1)
    token_weights = [torch.randn(s.chain_length + s.answer_length, generator=draw) for s in batch]
    tensors = {f"weight/{number}": weight.detach().clone() for number, weight in enumerate(weights)}
    for name, some in {"the first": rows[:1], "the second": rows[1:2], "two micro-batches": rows[:2]}.items():
        actor.prepare_for_training_step()
        actor.get_loss_and_metrics(some, token_weights)
        tensors[f"gradient/of {name}"] = torch.cat([weight.main_grad.flatten() for weight in weights]).clone()
    tensors["main/before"] = torch.cat([main.flatten() for main in mains]).clone()
    actor.finish_training_step()
    tensors["main/after"] = torch.cat([main.flatten() for main in mains]).clone()
    for number, main_weight in enumerate(mains):
        for name, moment in optimizer.optimizer.state[main_weight].items():
            tensors[f"{name}/{number}"] = moment
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors, refusal(torch.nn.ModuleList(optimizer.model_chunks))
