"""The same update in plain PyTorch: transformers' Llama, SDPA, micro-batches by length, the head at scored tokens.

    three_passes     log-probs of the policy and of the reference policy, then forward and backward pass
    one_forward      log-probs of the reference policy, one forward pass that keeps its graph, backward pass
    shared_prompts   one_forward, and every prompt is computed once: its keys and values are repeated for its siblings

P prompts, G samples, N = P * G sequences ordered by (prompt, sample), B sequences of a micro-batch, S scored tokens of
all sequences in their order, T tokens, H hidden size. A sequence's last token predicts nothing: no pass computes it.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.peers import workload
from benchmarks.peers.worker import Channel, Metrics
from nemo_jepo.config.schema import OptimConfig
from nemo_jepo.objective.kl import KL_GRADIENTS
from nemo_jepo.objective.records import GroupScores, UpdateRule
from nemo_jepo.objective.update import sample_weights


def padded(lists: Sequence[Sequence[int]]) -> Tensor:
    """[B, T] int64, padded on the right."""
    longest = max(map(len, lists))
    return torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in lists])


def positions_below(lengths: Tensor, longest: int) -> Tensor:
    """[B, longest] bool: the first lengths[b] of each row."""
    return torch.arange(longest) < lengths.unsqueeze(-1)


def token_logprobs(model: LlamaForCausalLM, states: Tensor, targets: Tensor) -> Tensor:
    """[S] log-probs (nats) of the targets [S], from the hidden states [S, H] that predict them."""
    return -functional.cross_entropy(model.lm_head(states), targets, reduction="none")


class WholeSequences:
    """A forward pass in which every sequence has its own prompt."""

    def __init__(self, work: workload.Workload) -> None:
        self._sequences = list(work.sequences)
        self.parts = micro_batches([len(p) + len(c) for p, c in self._sequences], work.sequences_per_micro_batch)

    def run(self, model: LlamaForCausalLM) -> Iterator[Tensor]:
        """Log-probs of the scored tokens of one micro-batch after the other."""
        for part in self.parts:
            prompts, completions = zip(*(self._sequences[index] for index in part), strict=True)
            ids = padded([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
            starts, ends = (torch.tensor([len(prompt) for prompt in prompts]), (ids >= workload.FIRST_TOKEN).sum(-1))
            scored = positions_below(ends, ids.shape[1]) & ~positions_below(starts, ids.shape[1])
            hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            yield token_logprobs(model, hidden[scored[:, 1:]], ids[scored])

    @property
    def num_computed(self) -> int:
        """Tokens of one pass, padding included."""
        lengths = [len(prompt) + len(completion) - 1 for prompt, completion in self._sequences]
        return sum(len(part) * max(lengths[index] for index in part) for part in self.parts)


class SharedPrompts:
    """A forward pass over every prompt once, then over the completions, which see their prompt's keys and values."""

    def __init__(self, work: workload.Workload) -> None:
        self._prompts = [group.prompt for group in work.groups]
        self._completions = [completion for group in work.groups for completion in group.completions]
        self._group_size = work.group_size
        self.parts = micro_batches([len(c) for c in self._completions], work.sequences_per_micro_batch)

    def run(self, model: LlamaForCausalLM) -> Iterator[Tensor]:
        """Log-probs of the scored tokens of one micro-batch after the other."""
        lengths = torch.tensor([len(prompt) for prompt in self._prompts])
        cache = DynamicCache(config=model.config)
        hidden = model.model(input_ids=padded(self._prompts), past_key_values=cache).last_hidden_state
        ends = hidden[torch.arange(len(lengths)), lengths - 1]  # [P, H]: predict the completions' first tokens
        for part in self.parts:
            groups = torch.tensor(part) // self._group_size
            ids = padded([self._completions[index] for index in part])
            longest = int(lengths[groups].max())
            repeated = [(layer.keys[groups, :, :longest], layer.values[groups, :, :longest]) for layer in cache.layers]
            computed = ids.shape[1] - 1
            hidden = model.model(
                input_ids=ids[:, :-1],
                position_ids=lengths[groups].unsqueeze(-1) + torch.arange(computed),
                attention_mask=torch.cat(
                    [
                        positions_below(lengths[groups], longest).unsqueeze(1).expand(-1, computed, -1),
                        torch.ones(computed, computed, dtype=torch.bool).tril().expand(len(part), -1, -1),
                    ],
                    dim=-1,
                ).unsqueeze(1),
                past_key_values=DynamicCache(repeated),
            ).last_hidden_state
            scored = ids >= workload.FIRST_TOKEN
            states = torch.cat([ends[groups].unsqueeze(1), hidden], dim=1)
            yield token_logprobs(model, states[scored], ids[scored])

    @property
    def num_computed(self) -> int:
        """Tokens of one pass, padding included."""
        prompts = len(self._prompts) * max(map(len, self._prompts))
        longest = [max(len(self._completions[index]) for index in part) for part in self.parts]
        return prompts + sum(len(part) * (length - 1) for part, length in zip(self.parts, longest, strict=True))


def micro_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which sequences are computed together: those of a similar length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


class TokenWeights:
    """nemo_jepo's objective over all scored tokens at once."""

    def __init__(self, work: workload.Workload) -> None:
        self._rule = UpdateRule(**work.rule)
        self._shape = len(work.groups), work.group_size
        answers = torch.tensor([len(group.answer) for group in work.groups for _ in group.chains])
        lengths = torch.tensor([len(completion) for _, completion in work.sequences])
        self._chain_length, self._answer_length = lengths - answers, answers
        self._owner = torch.arange(len(lengths)).repeat_interleave(lengths)  # [S]
        place = torch.arange(len(self._owner)) - (lengths.cumsum(0) - lengths)[self._owner]
        self._in_answer = place >= self._chain_length[self._owner]  # [S]

    def __call__(self, policy: Tensor, reference: Tensor) -> Tensor:
        """[S] weights from log-probs [S] under both models.

        `nemo_jepo.objective.update.token_weights` says which; every sample is valid here.
        """
        policy, log_ratio = policy.detach().double(), policy.detach().double() - reference.double()
        every = torch.ones(self._shape, dtype=torch.bool)
        scores = GroupScores(
            answer_logprob=self._sums(policy * self._in_answer),
            valid_mask=every,
            arrived_mask=every,
            has_marker=every,
            chain_length=self._chain_length.view(self._shape),
            answer_length=self._answer_length.view(self._shape),
            chain_log_ratio=self._sums(log_ratio * ~self._in_answer),
        )
        found = sample_weights(self._rule, scores)
        tables = (found.policy_weight, found.answer_weight, found.kl_weight)
        of_policy, of_answer, of_kl = (table.flatten()[self._owner] for table in tables)
        of_chain = of_policy - of_kl * KL_GRADIENTS[self._rule.kl_estimator](log_ratio)
        return torch.where(self._in_answer, of_answer, of_chain).float()

    def _sums(self, values: Tensor) -> Tensor:
        """[P, G] from [S]."""
        sums = torch.zeros(len(self._chain_length), dtype=values.dtype)
        return sums.index_add(0, self._owner, values).view(self._shape)


def main(folder: Path, variant: str) -> None:
    channel, work = Channel(), workload.read(folder)
    torch.set_num_threads(work.threads)
    policy, reference = (LlamaForCausalLM.from_pretrained(folder / name) for name in ("policy", "reference"))
    settings = OptimConfig(lr=0.0)
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=settings.lr,
        betas=tuple(settings.betas),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    passes = SharedPrompts(work) if variant == "shared_prompts" else WholeSequences(work)
    weights_of = TokenWeights(work)

    # S in the order of the micro-batches, and back
    lengths = torch.tensor([len(completion) for _, completion in work.sequences])
    starts = lengths.cumsum(0) - lengths
    of_part = [torch.cat([starts[index] + torch.arange(lengths[index]) for index in part]) for part in passes.parts]
    back = torch.cat(of_part).argsort()

    def logprobs(model: LlamaForCausalLM) -> Tensor:
        return torch.cat(list(passes.run(model)))[back]

    def update() -> Metrics:
        with torch.no_grad():
            under_reference = logprobs(reference)
        optimizer.zero_grad()
        if variant == "three_passes":
            with torch.no_grad():
                weights = weights_of(logprobs(policy), under_reference)
            for found, where in zip(passes.run(policy), of_part, strict=True):
                (-torch.dot(weights[where], found)).backward()
        else:
            found = logprobs(policy)
            (-torch.dot(weights_of(found, under_reference), found)).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        return {"grad_norm": norm.item(), "computed_tokens": passes.num_computed}

    channel.serve(update)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
