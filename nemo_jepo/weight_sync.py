"""Trainer -> sampler: the weights after every update, and the proof that they arrived.

    weight stream -> every sampler -> probe: completions of each sampler, scored again by the trainer

    parity = mean over probe tokens of |log pi_sampler - log pi_trainer|, nats

A sampler with other weights than the trainer's makes every advantage wrong without any error: a tied head that was not
reloaded, a stale prefix cache, a server that came back with its old weights. So each sync ends with the comparison.
"""

from collections.abc import Mapping, Sequence

import torch

from nemo_jepo.actor.weights.stream import weight_stream
from nemo_jepo.data.packing import pack
from nemo_jepo.rollout.sampler import GenerationRequest, SamplerMismatch
from nemo_jepo.setup import Rooms
from nemo_jepo.types import Prompt, Rollout, Spliced

PROBE_PROMPTS, PROBE_TOKENS = 4, 32
PARITY_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""trainer.precision -> largest parity, nats, where rollout.vllm.parity_tolerance is null."""


def sync_weights(rooms: Rooms) -> None:
    """Give the samplers the trainer's weights if they have older ones, and check that they have them. All ranks call.

    Raises:
        SamplerMismatch: on every rank, where a sampler's log-probs are not the trainer's.
    """
    version = rooms.actor.num_steps
    if rooms.sampler_version == version:
        return
    stream = weight_stream(rooms.actor.chunks, rooms.actor.hf_config, rooms.layout)
    if rooms.sampler is not None:
        rooms.sampler.load_weights(stream, version)
    else:
        for _ in stream:
            pass
    rooms.layout.barrier()  # a sampler that another replica fed is complete as well
    rooms.sampler_version = version
    check_parity(rooms, rooms.stream.upcoming()[:PROBE_PROMPTS])


def check_parity(rooms: Rooms, prompts: Sequence[Prompt]) -> None:
    """Compare each sampler's log-probs with the trainer's on completions of these prompts; all ranks call.

    Raises:
        SamplerMismatch: on every rank; on the rank that saw it with the sampler, the figures and what may be wrong.
    """
    request = GenerationRequest(
        num_generations_per_prompt=1,
        max_tokens=min(PROBE_TOKENS, rooms.config.rollout.max_tokens),
        stop_at_marker=False,
        temperature=1.0,
        seed=0,
    )
    probes = rooms.layout.share_in_replica(rooms.sampler.probe(prompts, request) if rooms.sampler else None)
    tolerance = rooms.config.rollout.vllm.parity_tolerance
    if tolerance is None:
        tolerance = PARITY_TOLERANCE[rooms.config.trainer.precision]
    worst = _differences(rooms, prompts, probes) if probes else {}
    wrong = {name: parity for name, parity in worst.items() if not parity <= tolerance}
    if rooms.layout.any_over_world(bool(wrong)):
        seen = ", ".join(f"{name}: {parity:.2g}" for name, parity in wrong.items()) or "on another replica"
        raise SamplerMismatch(
            f"after the weight sync of step {rooms.sampler_version} a sampler's log-probs are not the trainer's: mean "
            f"absolute difference {seen} nats, tolerance rollout.vllm.parity_tolerance={tolerance:g}. Either it "
            "kept old weights (tied output head, prefix cache, another model folder: restart it), or computes in "
            "another precision than trainer.precision (start it with the same --dtype)."
        )


def _differences(rooms: Rooms, prompts: Sequence[Prompt], probes: Mapping[str, Sequence[Rollout]]) -> dict[str, float]:
    """Each sampler's parity in nats; the same on every rank of the replica."""
    rollouts = [(name, rollout) for name, drawn in probes.items() for rollout in drawn if rollout.token_ids]
    sequences = [whole_generation(prompts[rollout.group], rollout) for _, rollout in rollouts]
    if not sequences:
        return {}
    rows = pack(sequences, rooms.config.model.tokens_per_micro_batch, rooms.config.model.segment_multiple)
    scores = rooms.actor.get_inference_log_probs(rows, len(sequences))
    differences: dict[str, list[torch.Tensor]] = {}
    for (name, rollout), logprobs in zip(rollouts, scores.policy_logprobs, strict=True):
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
