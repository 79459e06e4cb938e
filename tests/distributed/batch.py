"""A batch with everything in it that a real one has: ragged lengths; invalid, misaligned and failed samples."""

import dataclasses
import random
from typing import Any

from nemo_jepo.types import Spliced

VOCAB = 101
GROUP_SIZE = 3
NUM_PROMPTS = 4

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "vocab_size": VOCAB,  # odd: needs padding under tensor parallelism
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def sequences() -> list[Spliced]:
    rng = random.Random(5)
    batch = []
    for group in range(NUM_PROMPTS):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
        for sample in range(GROUP_SIZE):
            chain, answer = rng.randint(1, 12), rng.randint(1, 5)
            ids = [*prompt, *(rng.randrange(VOCAB) for _ in range(chain + answer))]
            batch.append(
                Spliced(
                    group=group,
                    sample=sample,
                    token_ids=tuple(ids),
                    prompt_length=len(prompt),
                    chain_length=chain,
                    answer_length=answer,
                    valid=True,
                    has_marker=True,
                    ends=sample > 0,
                    generation_logprobs=tuple(-rng.random() * 5 for _ in range(chain)),
                )
            )
    batch[1] = _without_answer(batch[1], has_marker=False)
    batch[5] = _without_answer(batch[5], has_marker=True, misaligned=True)
    failed = batch[7]
    batch[7] = dataclasses.replace(
        _without_answer(failed, has_marker=False),
        token_ids=failed.token_ids[: failed.prompt_length],
        chain_length=0,
        failed=True,
        generation_logprobs=(),
    )
    return batch


def with_no_chain(batch: list[Spliced]) -> tuple[list[Spliced], list[Spliced]]:
    """The batch where a prompt's samples share its answer, and that answer behind a marker of two tokens."""
    rng = random.Random(6)
    shared, no_chain = [], []
    for group in range(NUM_PROMPTS):
        samples = batch[group * GROUP_SIZE : (group + 1) * GROUP_SIZE]
        prompt = samples[0].token_ids[: samples[0].prompt_length]
        answer = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 5)))
        for sample in samples:
            chain = sample.token_ids[: sample.prompt_length + sample.chain_length]
            if sample.valid:
                sample = dataclasses.replace(sample, token_ids=chain + answer, answer_length=len(answer))
            shared.append(sample)
        marker = (rng.randrange(VOCAB), rng.randrange(VOCAB))
        behind_none = Spliced(
            group=group,
            sample=0,
            token_ids=prompt + marker + answer,
            prompt_length=len(prompt),
            chain_length=2,
            answer_length=len(answer),
            valid=True,
            has_marker=True,
        )
        no_chain.append(behind_none)
    return shared, no_chain


def _without_answer(sequence: Spliced, has_marker: bool, misaligned: bool = False) -> Spliced:
    return dataclasses.replace(
        sequence,
        token_ids=sequence.token_ids[: sequence.prompt_length + sequence.chain_length],
        answer_length=0,
        valid=False,
        ends=False,
        has_marker=has_marker,
        misaligned=misaligned,
    )


def rule(**changes: Any) -> dict[str, Any]:
    settings = {
        "name": "jepo",
        "beta_sup": 1.0,
        "rl_reduction": "mean",
        "reward_normalization": "none",
        "loss_normalization": "none",
        "no_chain": "none",
        "format_loss": "marker_and_end",
        "format_weight": 1.0,
        "importance_sampling": "token_truncated",
        "importance_cap": 2.0,
        "normalize": True,
        "clip": 1.0,
        "std_scope": "batch",
        "prompt_mean": "all",
        "kl_beta": 0.1,
        "kl_estimator": "k2_sequence",
    }
    return settings | changes
