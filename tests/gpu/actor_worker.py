"""An actor on one GPU: packing, FP8 and memory. Run by test_actor; every case also runs on a CPU without FP8.

python -m tests.gpu.actor_worker CASE OUT.json
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_jepo.actor import parallel

parallel.init_distributed()

from benchmarks.step import Batch, Lengths, draw_sequences  # noqa: E402
from nemo_jepo.actor.actor import GPU_TILE, MegatronJEPOActor  # noqa: E402
from nemo_jepo.actor.fp8_guard import guard_fp8  # noqa: E402
from nemo_jepo.actor.model import load_hf_config  # noqa: E402
from nemo_jepo.actor.precision import assert_fp8_is_used  # noqa: E402
from nemo_jepo.actor.scoring import score  # noqa: E402
from nemo_jepo.actor.weights.load import load_stage, open_source  # noqa: E402
from nemo_jepo.config.schema import ModelConfig, OptimConfig  # noqa: E402
from nemo_jepo.data.packing import RowShape, pack, padded_rows  # noqa: E402
from nemo_jepo.types import PackedRow, SplicedBatch  # noqa: E402

SHAPE = {  # every side a multiple of 128, as block scaling wants it
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
TOKENS, GENERATIONS, UPDATES = 256, 4, 4
SEQUENCES = draw_sequences(
    Batch(prompts=8, generations=GENERATIONS), Lengths(range(5, 20), range(10, 120), range(3, 10))
)
ROWS = pack(SEQUENCES, RowShape(TOKENS, row_multiple=GPU_TILE))
SHARED = pack(SEQUENCES, RowShape(TOKENS, share_prompts=True, row_multiple=GPU_TILE))
COUNTS = [s.chain_length + s.answer_length for s in SEQUENCES]
MEAN_NLL = [torch.full((count,), 1 / sum(COUNTS)) for count in COUNTS]


def build(lr: float = 3e-4, **settings: Any) -> MegatronJEPOActor:
    model = ModelConfig(tokens_per_micro_batch=TOKENS, **settings)
    layout, hf_config = parallel.Layout(), load_hf_config(SHAPE)
    actor = MegatronJEPOActor(hf_config, model, "bf16", layout)
    load_stage(actor.chunks, hf_config, open_source(hf_config, None, seed=7), layout)
    actor.start_training(OptimConfig(lr=lr), 1.0, 100)
    return actor


def logprobs(actor: MegatronJEPOActor, rows: list[PackedRow] = ROWS) -> list[float]:
    return torch.cat(actor.get_inference_log_probs(rows, len(SEQUENCES)).policy_logprobs).tolist()


def gradient(actor: MegatronJEPOActor, rows: list[PackedRow]) -> dict[str, Any]:
    actor.prepare_for_training_step()
    loss, _ = actor.get_loss_and_metrics(rows, MEAN_NLL)
    return {"loss": loss, "grad_norm": actor.finish_training_step()["grad_norm"]}


def packing() -> dict[str, Any]:
    """The same sequences, packed with their prompts and with one for all samples, and one a row."""
    actor = build(lr=0.0)
    padded = padded_rows(SEQUENCES, TOKENS)
    return {
        name: {"rows": len(rows), "logprobs": logprobs(actor, rows), **gradient(actor, rows)}
        for name, rows in {"packed": ROWS, "shared": SHARED, "padded": padded}.items()
    }


def precision() -> dict[str, Any]:
    """Log-probs and losses in BF16 and, where there is a GPU, in every FP8 recipe."""
    recipes = ("tensorwise", "blockwise") if torch.cuda.is_available() else ()
    variants = {"bf16": build()} | {r: build(fp8="hybrid", fp8_recipe=r, fp8_guard_ratio=0.0) for r in recipes}
    found: dict[str, Any] = {}
    for name, actor in variants.items():
        found[name] = {"logprobs": logprobs(actor)}
        with actor.in_bf16():
            found[name]["in_bf16"] = logprobs(actor)
        found[name]["again"] = logprobs(actor)
        if name != "bf16":
            assert_fp8_is_used(torch.nn.ModuleList(actor.chunks))
            said: list[str] = []
            scored = score(actor, SplicedBatch(sequences=SEQUENCES, group_size=GENERATIONS))
            found[name] |= {"guard": guard_fp8(actor, scored, 0, said.append), "said": said}
        found[name]["losses"] = [actor.train_step(ROWS, MEAN_NLL)["surrogate_loss"] for _ in range(UPDATES)]
    return found


def memory() -> dict[str, Any]:
    """Where the reference policy is, in bytes of GPU memory."""
    found: dict[str, Any] = {}
    for place in ("cpu", "gpu"):
        actor = build(lr=0.05, reference_policy=place)
        initial, held = logprobs(actor), torch.cuda.memory_allocated()
        actor.keep_reference_policy()
        found[f"bytes of a reference on {place}"] = torch.cuda.memory_allocated() - held
        actor.train_step(ROWS, MEAN_NLL)
        own = logprobs(actor)
        reference = actor.get_init_policy_logprobs(ROWS, len(SEQUENCES))
        assert reference is not None
        found[place] = {
            "initial": initial,
            "own": own,
            "reference": torch.cat(reference.policy_logprobs).tolist(),
            "own again": logprobs(actor),
        }
    found["bytes of the weights"] = sum(p.numel() * p.element_size() for c in actor.chunks for p in c.parameters())
    return found


CASES: dict[str, Callable[[], dict[str, Any]]] = {"packing": packing, "precision": precision, "memory": memory}

if __name__ == "__main__":
    parallel.init_model_parallel(ModelConfig())  # once: several actors live side by side
    Path(sys.argv[2]).write_text(json.dumps(CASES[sys.argv[1]]()))
