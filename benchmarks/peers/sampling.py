"""One round of sampling: G completions of every prompt, all of the same length, temperature 1.

    transformers   `generate`, which is what TRL calls; it keeps no log-probs
    nemo_jepo      the embedded sampler, with log-probs
    plain_loop     plain PyTorch, with log-probs: a cache of full length, fused projections, prompts computed once

P prompts, N = P * G sequences, T tokens, L layers, D size of a head. Log-probs are checked once against a forward pass
over the finished sequences.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from benchmarks.peers import workload
from benchmarks.peers.worker import Channel, Metrics

Drawn = tuple[list[list[int]], list[list[float]] | None]
"""Completions, and where the sampler reports them their log-probs (nats); ordered by (prompt, completion)."""


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both [P, T] int64."""
    longest = max(map(len, prompts))
    ids = [[*[0] * (longest - len(prompt)), *prompt] for prompt in prompts]
    mask = [[*[0] * (longest - len(prompt)), *[1] * len(prompt)] for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def with_transformers(work: workload.Workload, model: LlamaForCausalLM, max_tokens: int) -> Callable[[], Drawn]:
    """As TRL calls it: the prompt of every sample, padded on the left."""
    ids, mask = left_padded([prompt for prompt, _ in work.sequences])

    @torch.no_grad()
    def draw() -> Drawn:
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, **options)
        return found[:, ids.shape[1] :].tolist(), None

    return draw


def with_nemo_jepo(work: workload.Workload, model: LlamaForCausalLM, max_tokens: int) -> Callable[[], Drawn]:
    """The sampler of one process."""
    from nemo_jepo.config.schema import RolloutConfig
    from nemo_jepo.rollout.embedded import EmbeddedSampler
    from nemo_jepo.rollout.sampler import GenerationRequest
    from nemo_jepo.types import Prompt

    sampler = EmbeddedSampler(
        model.config, RolloutConfig(), -1, lambda token_ids: False, torch.device("cpu"), torch.float32
    )
    sampler.load_weights(model.named_parameters(), 0)
    prompts = [Prompt(number, tuple(group.prompt), "", "") for number, group in enumerate(work.groups)]
    request = GenerationRequest(
        num_generations_per_prompt=work.group_size, max_tokens=max_tokens, stop_at_marker=False, temperature=1.0, seed=0
    )

    def draw() -> Drawn:
        found = sampler.generate(prompts, request)
        return [list(one.token_ids) for one in found], [list(one.generation_logprobs) for one in found]

    return draw


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [N, heads, T, D], in the halves that Llama rotates together."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class PlainLlama:
    """A Llama's weights, with the projections of the same input side by side, and a cache of full length."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        config, layers = model.config, model.model.layers
        self._model = model
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._size = config.hidden_size // self._heads
        self._eps = config.rms_norm_eps
        self._frequencies = model.model.rotary_emb.inv_freq
        attentions, mlps = [layer.self_attn for layer in layers], [layer.mlp for layer in layers]
        self._qkv = [torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]) for a in attentions]
        self._gate_up = [torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) for mlp in mlps]

    def new_cache(self, rows: int, columns: int) -> Tensor:
        """[L, 2, rows, KV heads, columns, D]: keys and values."""
        return torch.empty(len(self._qkv), 2, rows, self._kv_heads, columns, self._size)

    def next_logprobs(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Tensor, known: int) -> Tensor:
        """[N, V] log-probs of what follows the last of the ids [N, T]; their keys and values enter the cache.

        Args:
            positions: [N, T], of the rotary embedding.
            mask: [N, 1, T, known + T] bool.
            known: columns of the cache that hold something.
        """
        rows, tokens = ids.shape
        end, heads = known + tokens, self._heads
        angles = (positions.unsqueeze(-1) * self._frequencies).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        states = functional.embedding(ids, self._model.model.embed_tokens.weight)
        for number, layer in enumerate(self._model.model.layers):
            inner = functional.linear(self._norm(states, layer.input_layernorm), self._qkv[number])
            inner = inner.view(rows, tokens, -1, self._size).transpose(1, 2)
            query, key, value = inner.split([heads, self._kv_heads, self._kv_heads], dim=1)
            query, (keys, values) = rotated(query, cos, sin), cache[number, ..., :end, :]
            keys[:, :, known:], values[:, :, known:] = rotated(key, cos, sin), value
            if tokens == 1:  # the queries that share a key are rows of one product
                grouped = query.reshape(rows, self._kv_heads, -1, self._size)
                found = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
                found = found.reshape(rows, 1, -1)
            else:
                found = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
                found = found.transpose(1, 2).flatten(2)
            states = states + functional.linear(found, layer.self_attn.o_proj.weight)
            inner = functional.linear(self._norm(states, layer.post_attention_layernorm), self._gate_up[number])
            gate, up = inner.chunk(2, dim=-1)
            states = states + functional.linear(functional.silu(gate) * up, layer.mlp.down_proj.weight)
        last = self._norm(states[:, -1], self._model.model.norm)
        return functional.linear(last, self._model.lm_head.weight).log_softmax(-1)

    def _norm(self, states: Tensor, norm: torch.nn.Module) -> Tensor:
        return functional.rms_norm(states, states.shape[-1:], norm.weight, self._eps)


def with_plain_loop(work: workload.Workload, model: LlamaForCausalLM, max_tokens: int) -> Callable[[], Drawn]:
    """Prompts once, their cache repeated for their samples, then a token of every sample at a time."""
    plain = PlainLlama(model)
    ids, prompt_mask = left_padded([group.prompt for group in work.groups])
    columns, group_size = ids.shape[1], work.group_size
    first = (prompt_mask == 0).sum(-1)  # padding of each prompt

    @torch.inference_mode()
    def draw() -> Drawn:
        # The prompts
        positions = (torch.arange(columns) - first.unsqueeze(-1)).clamp(min=0)
        causal = torch.ones(columns, columns, dtype=torch.bool).tril()
        seen = causal & prompt_mask.bool().unsqueeze(1) | torch.eye(columns, dtype=torch.bool)
        of_prompts = plain.new_cache(len(ids), columns)
        logprobs = plain.next_logprobs(ids, positions, seen.unsqueeze(1), of_prompts, 0)

        # Their samples
        padding = first.repeat_interleave(group_size).unsqueeze(-1)
        cache = plain.new_cache(len(padding), columns + max_tokens)
        cache[..., :columns, :] = of_prompts.repeat_interleave(group_size, dim=2)
        visible = (torch.arange(columns + max_tokens) >= padding)[:, None, None]
        logprobs, drawn, found = logprobs.repeat_interleave(group_size, dim=0), [], []
        for end in range(columns, columns + max_tokens):
            # argmax(log p - log e) with e exponential draws from p
            drawn.append((logprobs - torch.empty_like(logprobs).exponential_().log_()).argmax(-1, keepdim=True))
            found.append(logprobs.gather(1, drawn[-1]))
            if end < columns + max_tokens - 1:
                logprobs = plain.next_logprobs(drawn[-1], end - padding, visible[..., : end + 1], cache, end)
        return torch.cat(drawn, dim=1).tolist(), torch.cat(found, dim=1).tolist()

    return draw


SAMPLERS = {"transformers": with_transformers, "nemo_jepo": with_nemo_jepo, "plain_loop": with_plain_loop}


@torch.no_grad()
def check(work: workload.Workload, model: LlamaForCausalLM, drawn: Drawn, max_tokens: int) -> None:
    """Every sampler drew as many tokens; the log-probs are the model's. Raises ValueError."""
    completions, logprobs = drawn
    if any(len(completion) != max_tokens for completion in completions):
        raise ValueError("a completion is too short")
    if logprobs is None:
        return
    for (prompt, _), completion, reported in zip(work.sequences, completions, logprobs, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(-1))[:, 0]
        torch.testing.assert_close(torch.tensor(reported), expected, atol=1e-4, rtol=1e-4, check_dtype=False)


def main(folder: Path, variant: str) -> None:
    channel, work = Channel(), workload.read(folder)
    torch.set_num_threads(work.threads)
    model = LlamaForCausalLM.from_pretrained(folder / "policy").requires_grad_(False).eval()
    max_tokens = max(len(completion) for _, completion in work.sequences)
    draw = SAMPLERS[variant](work, model, max_tokens)
    check(work, model, draw(), max_tokens)

    def measured() -> Metrics:
        completions, _ = draw()
        return {"drawn_tokens": sum(map(len, completions))}

    channel.serve(measured)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
