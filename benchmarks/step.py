"""Useful tokens a second of one whole update, packed against padded, on GSM8K's spread of lengths.

    python -m benchmarks.step [--prompts 32] [--data train.jsonl] [--out FILE]

An update is what the loop does after sampling: scores under the policy and under the reference policy, weights, token
weights, forward and backward pass, optimizer step; nemo_jepo's own functions on a 5M-parameter Llama in one process.
Useful tokens are those of the sequences; padding counts for nothing.

    shared prompts  rows of up to --tokens-per-row tokens, a prompt computed once for its samples
    packed          the same, every sequence whole
    padded batch    the same row size, every sequence in a slot as long as the longest sequence of the batch
    padded          one sequence a row, every row as long as the longest sequence
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks import report
from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.config.schema import AnswerConfig, Config, DataConfig, ModelConfig, OptimConfig
from nemo_jepo.data.dataset import load_prompts, training_texts
from nemo_jepo.data.packing import RowShape, pack, padded_rows
from nemo_jepo.data.splice import Splicer
from nemo_jepo.data.tokenizer import train_tokenizer
from nemo_jepo.objective.records import Scored
from nemo_jepo.objective.tables import group_scores
from nemo_jepo.objective.update import sample_weights, token_weights
from nemo_jepo.setup import load_initial_weights, update_rule
from nemo_jepo.types import PackedRow, Spliced, SplicedBatch

VOCAB = 2048
SHAPE = {  # 5.0M parameters
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 704,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True)
class Batch:
    """How much one update reads."""

    prompts: int = 32
    generations: int = 4
    tokens_per_row: int = 4096
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of every prompt, chain of thought and reference answer that a batch may draw."""

    prompts: Sequence[int]
    chains: Sequence[int]
    answers: Sequence[int]


def gsm8k_like_lengths() -> Lengths:
    """Log-normal lengths with the moments of GSM8K's training file under a byte-level BPE of 2,048 tokens.

    Means 75 (prompt), 103 (solution and marker), 4.3 (answer) tokens; standard deviations of the logarithm 0.37, 0.45,
    0.22: what `lengths_of_file` finds there.
    """
    rng = random.Random(7)

    def draw(mean: float, sigma: float) -> list[int]:
        mu = torch.tensor(mean).log().item() - sigma**2 / 2
        return [max(1, round(rng.lognormvariate(mu, sigma))) for _ in range(7473)]

    return Lengths(draw(75, 0.37), draw(103, 0.45), draw(4.3, 0.22))


def lengths_of_file(path: str) -> Lengths:
    """The lengths of a GSM8K file's questions, solutions and answers, under a tokenizer trained on it."""
    config = DataConfig(name="gsm8k", train_path=path, on_bad_row="skip")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(training_texts(config), VOCAB, Path(folder) / "tokenizer")
    prompts = load_prompts(config, "warmup", tokenizer, AnswerConfig()).prompts
    golden = Splicer(tokenizer, AnswerConfig()).supervised(prompts, "chain_of_thought")
    return Lengths(
        [sequence.prompt_length for sequence in golden],
        [sequence.chain_length for sequence in golden],
        [sequence.answer_length for sequence in golden],
    )


def draw_sequences(batch: Batch, lengths: Lengths) -> list[Spliced]:
    """A batch of valid samples with random token ids: siblings share the prompt and the answer, not the chain."""
    rng = random.Random(11)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(VOCAB), k=count))

    sequences = []
    for group in range(batch.prompts):
        prompt, answer = tokens(rng.choice(lengths.prompts)), tokens(rng.choice(lengths.answers))
        for sample in range(batch.generations):
            chain = tokens(rng.choice(lengths.chains))
            sequence = Spliced(
                group=group,
                sample=sample,
                token_ids=prompt + chain + answer,
                prompt_length=len(prompt),
                chain_length=len(chain),
                answer_length=len(answer),
                valid=True,
                has_marker=True,
                generation_logprobs=(0.0,) * len(chain),
            )
            sequences.append(sequence)
    return sequences


def side_by_side(rows: Sequence[PackedRow]) -> PackedRow:
    """Several rows as one; every segment stays a segment."""
    ends = [torch.zeros(1, dtype=torch.int32)]
    for row in rows:
        ends.append(ends[-1][-1] + row.cu_seqlens[1:])
    return PackedRow(
        token_ids=torch.cat([row.token_ids for row in rows]),
        position_ids=torch.cat([row.position_ids for row in rows]),
        cu_seqlens=torch.cat(ends),
        prompt_segment=torch.cat([row.prompt_segment for row in rows]),  # none has one
        sequence_index=torch.cat([row.sequence_index for row in rows]),
        scored_mask=torch.cat([row.scored_mask for row in rows]),
    )


def layouts(sequences: Sequence[Spliced], tokens_per_row: int) -> dict[str, list[PackedRow]]:
    """The same sequences in rows of four kinds."""
    longest = max(sequence.length for sequence in sequences)
    padded = padded_rows(sequences, longest)
    slots = max(1, tokens_per_row // longest)
    return {
        "shared prompts": pack(sequences, RowShape(tokens_per_row, share_prompts=True)),
        "packed": pack(sequences, RowShape(tokens_per_row)),
        "padded batch": [side_by_side(padded[start : start + slots]) for start in range(0, len(padded), slots)],
        "padded": padded,
    }


def build_update(tokens_per_row: int) -> Callable[[Sequence[Spliced], Sequence[PackedRow]], None]:
    """One update of a randomly initialised policy beside its reference policy, under the default objective."""
    config = Config(model=ModelConfig(hf_config=SHAPE, tokens_per_micro_batch=tokens_per_row))
    parallel.init_distributed()
    parallel.init_model_parallel(config.model)
    layout, rule = parallel.Layout(), update_rule(config.objective, config.advantage, config.kl)
    actor = MegatronJEPOActor(load_hf_config(SHAPE), config.model, "fp32", layout)
    load_initial_weights(actor, None, config.model.seed, verify="none")
    actor.keep_reference_policy()
    actor.start_training(OptimConfig(lr=1e-4), 1.0, 1000)

    def update(sequences: Sequence[Spliced], rows: Sequence[PackedRow]) -> None:
        count = len(sequences)
        reference = actor.get_init_policy_logprobs(rows, count)
        scores, graph = actor.get_log_probs_with_graph(rows, count, actor.keeps_graph(rows))
        group_size = count // (1 + sequences[-1].group)
        batch = SplicedBatch(sequences=sequences, group_size=group_size)
        groups = group_scores(batch, scores, reference)
        coefficients = sample_weights(rule, groups, layout.sum_over_data_parallel, layout.max_over_data_parallel)
        scored = Scored(batch=batch, rows=rows, policy=scores, reference=reference, groups=groups)
        actor.train_step(rows, token_weights(rule, scored, coefficients), graph)

    return update


def timed(update: Callable[[], None], useful_tokens: int) -> report.Metrics:
    """Seconds of one update, and useful tokens a second."""
    begin = perf_counter()
    update()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = perf_counter() - begin
    return {"seconds": seconds, "useful_tokens_per_second": useful_tokens / seconds}


def run(batch: Batch, data: str | None, repetitions: int) -> dict[str, Any]:
    """The whole report."""
    if batch.threads:
        torch.set_num_threads(batch.threads)
    before = report.machine()
    lengths = lengths_of_file(data) if data else gsm8k_like_lengths()
    update = build_update(batch.tokens_per_row)
    few = draw_sequences(replace(batch, prompts=1), lengths)
    for rows in layouts(few, batch.tokens_per_row).values():
        update(few, rows)  # libraries load, optimizer states appear
    sequences = draw_sequences(batch, lengths)
    useful = sum(sequence.length for sequence in sequences)
    rows_of = layouts(sequences, batch.tokens_per_row)
    rounds = [
        {name: timed(partial(update, sequences, rows), useful) for name, rows in rows_of.items()}
        for _ in range(repetitions)
    ]
    return {
        "benchmark": "step",
        "machine": before | {"load_after": report.machine()["load"]},
        "batch": asdict(batch),
        "lengths": "file" if data else "log-normal",
        "useful_tokens": useful,
        "longest_sequence": max(sequence.length for sequence in sequences),
        "rows": {name: len(rows) for name, rows in rows_of.items()},
        "computed_tokens": {name: sum(len(row.token_ids) for row in rows) for name, rows in rows_of.items()},
        "rounds": rounds,
        "medians": report.medians(rounds),
        "speedup": {
            name: report.paired_ratio(rounds, "useful_tokens_per_second", "shared prompts", name) for name in rows_of
        },
    }


def show(found: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [
        ["", "rows", "tokens computed", "useful / computed", "s an update", "useful tokens/s", "shared is faster by"]
    ]
    for name, metrics in found["medians"].items():
        computed = found["computed_tokens"][name]
        rows.append(
            [
                name,
                str(found["rows"][name]),
                str(computed),
                f"{found['useful_tokens'] / computed:.0%}",
                f"{metrics['seconds']:.2f}",
                f"{metrics['useful_tokens_per_second']:.0f}",
                f"{found['speedup'][name]:.2f}",
            ]
        )
    return report.table(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Batch()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--data", help="a GSM8K .jsonl file: its own lengths, under a tokenizer trained on it")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = vars(parser.parse_args(arguments))
    data, repetitions, out = (options.pop(name) for name in ("data", "repetitions", "out"))
    found = run(Batch(**options), data, repetitions)
    report.write(found, out)
    print(show(found))


if __name__ == "__main__":
    main()
