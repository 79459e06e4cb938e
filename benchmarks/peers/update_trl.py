"""TRL's GRPO update over the given token ids, in TRL's own environment.

TRL's own defaults, but for what makes the work comparable: fp32, KL weight 1e-3, the workload's micro-batch, no
gradient checkpointing (its default computes activations twice). Completions come by `rollout_func`: nothing is sampled.
"""

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers import workload
from benchmarks.peers.worker import Channel, Stopwatch

SPECIAL = ["<pad>", "<eos>", "<unk>"]
FIRST_CHARACTER = 0x4E00
"""Token id i is the character FIRST_CHARACTER + i, so that a prompt's text has the wanted token ids."""


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A character a token."""
    characters = [chr(FIRST_CHARACTER + token) for token in range(len(SPECIAL), vocab_size)]
    words = {word: token for token, word in enumerate(SPECIAL + characters)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


class Steps(TrainerCallback):
    """Before every optimizer step the driver is waited for; after it the step is reported."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._computed = 0

    def count_tokens(self, module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        """A forward pre-hook of the policy: padded tokens that it computes."""
        self._computed += keywords["input_ids"].numel()

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if not self._channel.told_to_go():
            sys.exit()
        self._computed, self._watch = 0, Stopwatch()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._channel.say(self._watch.stop() | {"computed_tokens": self._computed})


def main(folder: Path) -> None:
    channel, work = Channel(), workload.read(folder)
    texts = ["".join(chr(FIRST_CHARACTER + token) for token in group.prompt) for group in work.groups]
    groups = dict(zip(texts, work.groups, strict=True))

    def given_completions(prompts: list[str], trainer: Any) -> dict[str, Any]:
        """The workload's completions, each once."""
        used: Counter[str] = Counter()
        completions = []
        for prompt in prompts:
            completions.append(groups[prompt].completions[used[prompt]])
            used[prompt] += 1
        return {
            "prompt_ids": [list(groups[prompt].prompt) for prompt in prompts],
            "completion_ids": completions,
            "logprobs": None,
        }

    def reward(completions: list[str], **others: Any) -> list[float]:
        return [random.random() for _ in completions]

    num_sequences = len(work.groups) * work.group_size
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=work.sequences_per_micro_batch,
        gradient_accumulation_steps=num_sequences // work.sequences_per_micro_batch,
        num_generations=work.group_size,
        max_completion_length=max(len(completion) for _, completion in work.sequences),
        beta=1e-3,
        max_steps=1_000_000,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    steps = Steps(channel)
    trainer = GRPOTrainer(
        model=str(folder / "policy"),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=build_tokenizer(work.shape["vocab_size"]),
        rollout_func=given_completions,
        callbacks=[steps],
    )
    assert trainer.ref_model is not None, "the KL needs one"
    trainer.model.register_forward_pre_hook(steps.count_tokens, with_kwargs=True)
    channel.say({})
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
