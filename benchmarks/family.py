"""What a member of the likelihood family costs: seconds of one update, and what it adds to `jepo`.

    python -m benchmarks.family [--prompts 16] [--repetitions 5] [--long-answers] [--out FILE]

An update is what the loop does after sampling, by nemo_jepo's own functions on the 5M-parameter Llama of
`benchmarks.step`: the reference policy's scores, the policy's with its graph, advantages, token weights, backward pass,
optimizer step. Every objective updates on the same samples; rlpr, nrt, vr_cli and jepo_no_chain (jepo with
objective.no_chain=current) score one more sequence a prompt, the reference answer behind no chain.

    lengths         of GSM8K: prompt 75, chain 103, answer 4 tokens on average
    --long-answers  the answer is as long as a chain, as a proof is: the dearest case

Seconds are of processor time on one thread, so that a neighbour on the machine falls out; objectives take turns in
every repetition.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import torch

from benchmarks import report
from benchmarks.step import SHAPE, Batch, draw_sequences, gsm8k_like_lengths
from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.scoring import score
from nemo_jepo.config import compose
from nemo_jepo.config.schema import Config, ModelConfig, OptimConfig
from nemo_jepo.objective.update import sample_weights, token_weights
from nemo_jepo.setup import load_initial_weights, update_rule
from nemo_jepo.types import Spliced, SplicedBatch

ARMS = {
    "jepo": [],
    "jepo_no_chain": ["objective.no_chain=current"],
    **{name: [f"objective={name}"] for name in ("avg_logprob", "gm", "rlpr", "r3", "nrt", "vr_cli", "verifree")},
}


def without_chains(sequences: Sequence[Spliced], generations: int) -> list[Spliced]:
    """Prompt and answer of every group; no marker, as the chains of `draw_sequences` have none of their own."""
    firsts = sequences[::generations]
    return [
        replace(
            one,
            token_ids=one.token_ids[: one.prompt_length] + one.token_ids[one.prompt_length + one.chain_length :],
            chain_length=0,
            generation_logprobs=(),
        )
        for one in firsts
    ]


def build(tokens_per_row: int) -> Callable[[Config, SplicedBatch], None]:
    """One update of a randomly initialised policy beside its reference policy."""
    settings = ModelConfig(hf_config=SHAPE, tokens_per_micro_batch=tokens_per_row)
    parallel.init_distributed()
    parallel.init_model_parallel(settings)
    layout = parallel.Layout()
    actor = MegatronJEPOActor(load_hf_config(SHAPE), settings, "fp32", layout)
    load_initial_weights(actor, None, settings.seed, verify="none")
    actor.keep_reference_policy()
    actor.start_training(OptimConfig(lr=1e-4), 1.0, 1000)

    def update(config: Config, batch: SplicedBatch) -> None:
        rule = update_rule(config.objective, config.advantage, config.kl)
        scored = score(actor, batch, for_update=True)
        coefficients = sample_weights(rule, scored.groups, layout.sum_over_data_parallel, layout.max_over_data_parallel)
        actor.train_step(scored.rows, token_weights(rule, scored, coefficients), scored.graph)

    return update


def seconds(call: Callable[[], None]) -> report.Metrics:
    """Processor seconds of one call."""
    begin = process_time()
    call()
    return {"seconds": process_time() - begin}


def run(size: Batch, long_answers: bool, repetitions: int) -> dict[str, Any]:
    """The whole report."""
    torch.set_num_threads(1)
    before = report.machine()
    lengths = gsm8k_like_lengths()
    if long_answers:
        lengths = replace(lengths, answers=lengths.chains)
    sequences = draw_sequences(size, lengths)
    alone = without_chains(sequences, size.generations)
    update = build(size.tokens_per_row)
    calls = {}
    for arm, overrides in ARMS.items():
        config = compose.resolve(compose.compose("mini_verifiable", overrides))
        batch = SplicedBatch(
            sequences=sequences,
            group_size=size.generations,
            no_chain=alone if config.objective.no_chain != "none" else None,
            by_token=config.objective.kind.reads_tokens,
        )
        calls[arm] = partial(update, config, batch)
        calls[arm]()  # libraries load, optimizer states appear
    rounds = [{arm: seconds(call) for arm, call in calls.items()} for _ in range(repetitions)]
    ratios = {arm: sorted(it[arm]["seconds"] / it["jepo"]["seconds"] for it in rounds) for arm in calls}
    return {
        "benchmark": "family",
        "machine": before | {"load_after": report.machine()["load"]},
        "prompts": size.prompts,
        "generations": size.generations,
        "answers": "as long as chains" if long_answers else "of GSM8K",
        "useful_tokens": sum(sequence.length for sequence in sequences),
        "no_chain_tokens": sum(sequence.answer_length for sequence in alone),
        "rounds": rounds,
        "medians": report.medians(rounds),
        "times_jepo": {
            arm: {"median": report.paired_ratio(rounds, "seconds", arm, "jepo"), "range": [found[0], found[-1]]}
            for arm, found in ratios.items()
        },
    }


def show(found: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [["", "s an update", "times jepo", "smallest", "largest"]]
    for arm, metrics in found["medians"].items():
        ratio = found["times_jepo"][arm]
        rows.append([arm, f"{metrics['seconds']:.2f}", *(f"{it:.3f}" for it in (ratio["median"], *ratio["range"]))])
    return report.table(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--long-answers", action="store_true")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    size = Batch(prompts=options.prompts, generations=options.generations)
    found = run(size, options.long_answers, options.repetitions)
    report.write(found, options.out)
    print(show(found))


if __name__ == "__main__":
    main()
