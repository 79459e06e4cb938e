"""Trainer -> sampler: the weights after every update, and the proof that they arrived.

    weight stream -> every sampler -> probe: completions of each sampler, scored again by the trainer

    parity = mean over probe tokens of |log pi_sampler - log pi_trainer|, nats

Probes are drawn at temperature 1 whatever the run's is, because only then both log-probs are of one distribution.

A sampler with other weights than the trainer's makes every advantage wrong without any error: a tied head that was not
reloaded, a stale prefix cache, a server that came back with its old weights. So each sync ends with the comparison.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.scoring import score
from nemo_jepo.actor.weights.stream import weight_stream
from nemo_jepo.rollout.queue import RolloutQueue
from nemo_jepo.rollout.sampler import GenerationRequest, SamplerMismatch
from nemo_jepo.setup import Trainer
from nemo_jepo.types import Prompt, Rollout, Spliced, SplicedBatch

PROBE_PROMPTS, PROBE_TOKENS = 4, 32
PARITY_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""trainer.precision -> largest parity, nats, where rollout.vllm.parity_tolerance is null."""


def sync_for_training(t: Trainer) -> None:
    """Give the samplers the weights that they train on: those of this update, or of the last sync before it.

    With rollout.sync_interval = s the samplers have the weights of step 0, s, 2s, ..; with null those of step 0. All
    ranks call. Raises as `sync_weights` does.
    """
    interval, actor = t.config.rollout.sync_interval, t.actor
    if interval == 1:
        sync_weights(t)
        return
    is_due = interval is not None and actor.num_steps % interval == 0
    step = actor.sampler_policy_step
    if step is None or (is_due and step != actor.num_steps):
        actor.keep_sampler_policy()
        step = actor.num_steps
    if step == actor.num_steps:
        sync_weights(t)
    elif t.rollouts.version != step:
        with actor.with_sampler_policy():
            _push(t, step)


def sync_weights(t: Trainer) -> None:
    """Give the samplers the trainer's weights if they have older ones, and check that they have them. All ranks call.

    Raises:
        SamplerMismatch: on every rank, where a sampler's log-probs are not the trainer's.
    """
    if t.rollouts.version != t.actor.num_steps:
        _push(t, t.actor.num_steps)


def _push(t: Trainer, step: int) -> None:
    """The weights that the model holds, those of so many optimizer steps."""
    stream = partial(weight_stream, t.actor.chunks, t.actor.hf_config, t.layout)
    t.rollouts.load_weights(stream, step)
    prompts, max_tokens = t.stream.upcoming()[:PROBE_PROMPTS], min(PROBE_TOKENS, t.config.rollout.max_tokens)
    tolerance = t.config.rollout.vllm.parity_tolerance
    if tolerance is None:
        tolerance = PARITY_TOLERANCE[t.config.trainer.precision]
    check_parity(t.actor, t.rollouts, prompts, max_tokens, tolerance)


def check_parity(
    actor: MegatronJEPOActor, rollouts: RolloutQueue, prompts: Sequence[Prompt], max_tokens: int, tolerance: float
) -> None:
    """Compare each sampler's log-probs with the trainer's on completions of these prompts; all ranks call.

    Args:
        max_tokens: of each completion.
        tolerance: largest parity, nats.
    Raises:
        SamplerMismatch: on every rank; on the rank that saw it with the sampler, its parity and what may be wrong.
    """
    request = GenerationRequest(
        num_generations_per_prompt=1, max_tokens=max_tokens, stop_at_marker=False, temperature=1.0, seed=0
    )
    probes = rollouts.probe(prompts, request)
    worst = parity(actor, prompts, probes) if probes else {}
    wrong = {name: difference for name, difference in worst.items() if not difference <= tolerance}
    if actor.layout.any_over_world(bool(wrong)):
        seen = ", ".join(f"{name}: {difference:.2g}" for name, difference in wrong.items()) or "on another replica"
        raise SamplerMismatch(
            f"after the weight sync of step {rollouts.version} a sampler's log-probs are not the trainer's: mean "
            f"absolute difference {seen} nats, tolerance rollout.vllm.parity_tolerance={tolerance:g}. Either it "
            "kept old weights (tied output head, prefix cache, another model folder: restart it), or computes in "
            "another precision than trainer.precision (start it with the same --dtype)."
        )


def parity(
    actor: MegatronJEPOActor, prompts: Sequence[Prompt], probes: Mapping[str, Sequence[Rollout]]
) -> dict[str, float]:
    """Each sampler's mean absolute difference in nats, by its name; the same on every rank of the replica."""
    rollouts = [(name, rollout) for name, drawn in probes.items() for rollout in drawn if rollout.token_ids]
    sequences = [whole_generation(prompts[rollout.group], rollout) for _, rollout in rollouts]
    if not sequences:
        return {}
    scored = score(actor, SplicedBatch(sequences=sequences, group_size=1), read_reference=False)
    differences: dict[str, list[torch.Tensor]] = {}
    for (name, rollout), logprobs in zip(rollouts, scored.policy.policy_logprobs, strict=True):
        differences.setdefault(name, []).append((torch.tensor(rollout.generation_logprobs) - logprobs).abs())
    return {name: torch.cat(parts).mean().item() for name, parts in differences.items()}


def whole_generation(prompt: Prompt, rollout: Rollout) -> Spliced:
    """A rollout with every sampled token scored and nothing appended."""
    return Spliced(
        group=rollout.group,
        sample=rollout.sample,
        token_ids=prompt.token_ids + rollout.token_ids,
        prompt_length=len(prompt.token_ids),
        chain_length=len(rollout.token_ids),
        answer_length=0,
        valid=False,
        has_marker=False,
        generation_logprobs=rollout.generation_logprobs,
    )
