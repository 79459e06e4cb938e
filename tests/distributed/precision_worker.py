"""Gradients and one update of a bf16 model on Megatron's local layers. Run by test_precision, once a rank.

python -m tests.distributed.precision_worker OUT      rank 0 writes OUT.safetensors (tensors) and OUT.json (a refusal)
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from nemo_jepo.actor import parallel

parallel.init_distributed()

from nemo_jepo.actor.actor import MegatronJEPOActor  # noqa: E402
from nemo_jepo.actor.model import load_hf_config  # noqa: E402
from nemo_jepo.actor.precision import assert_fp8_is_used  # noqa: E402
from nemo_jepo.config.errors import ConfigError  # noqa: E402
from nemo_jepo.config.schema import ModelConfig, OptimConfig  # noqa: E402
from nemo_jepo.data.packing import pack  # noqa: E402
from tests.distributed.batch import TINY, sequences  # noqa: E402


def refusal(model: torch.nn.Module) -> str:
    try:
        assert_fp8_is_used(model)
    except ConfigError as error:
        return str(error)
    return ""


def main(out: Path) -> None:
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
    rows = pack(batch, 64)
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
    if torch.distributed.get_rank() == 0:
        save_file(tensors, f"{out}.safetensors")
        Path(f"{out}.json").write_text(json.dumps(refusal(torch.nn.ModuleList(optimizer.model_chunks))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
