"""The reference policy swapped in and out around training steps."""

from collections.abc import Mapping

import torch

from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.kept_policy import KeptPolicy
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.load import load_stage, open_source
from nemo_jepo.config.schema import ModelConfig, OptimConfig
from nemo_jepo.data.packing import pack
from nemo_jepo.types import Scores
from tests.distributed.batch import TINY, sequences


def weights_of(actor: MegatronJEPOActor) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in actor.chunks[0].named_parameters()}


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left | right)


def difference(left: Scores | None, right: Scores) -> float:
    assert left is not None
    pairs = zip(left.policy_logprobs, right.policy_logprobs, strict=True)
    return max((a - b).abs().max().item() for a, b in pairs if len(a))


def raised_inside(reference: KeptPolicy) -> bool:
    try:
        with reference.in_place():
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return True
    return False


def swapped(precision: str, place: str) -> dict[str, float | bool]:
    model = ModelConfig(pipeline_model_parallel_size=2, tokens_per_micro_batch=64, reference_policy=place)
    parallel.init_model_parallel(model)
    layout = parallel.Layout()
    hf_config = load_hf_config(TINY | {"model_type": "llama", "tie_word_embeddings": True})
    actor = MegatronJEPOActor(hf_config, model, precision, layout)
    load_stage(actor.chunks, hf_config, open_source(hf_config, None, seed=7), layout)
    batch = sequences()
    rows = pack(batch, actor.row_shape)
    without = actor.get_init_policy_logprobs(rows, len(batch))
    actor.keep_reference_policy()
    actor.start_training(OptimConfig(lr=0.05), 0.0, 10)

    initial, initial_weights = actor.get_inference_log_probs(rows, len(batch)), weights_of(actor)
    facts: dict[str, float | bool] = {"none_kept_is_none": without is None}
    for _ in range(2):
        actor.train_step(rows, [torch.ones(s.chain_length + s.answer_length) for s in batch])
        own_weights = weights_of(actor)
        own = actor.get_inference_log_probs(rows, len(batch))
        reference = actor.get_init_policy_logprobs(rows, len(batch))
        facts |= {
            "moved": difference(own, initial),
            "reference_scores_differ": difference(reference, initial),
            "restored": same(weights_of(actor), own_weights),
            "own_scores_differ": difference(actor.get_inference_log_probs(rows, len(batch)), own),
        }
    swap = actor._reference
    assert swap is not None
    with swap.in_place():
        facts["inside_is_initial"] = same(weights_of(actor), initial_weights)
    facts["restored_after_exception"] = raised_inside(swap) and same(weights_of(actor), own_weights)
    with swap.in_place():
        facts["reference_survives_exception"] = same(weights_of(actor), initial_weights)
    return facts
