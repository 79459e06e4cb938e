"""What every worker reads: a model's shape and the token ids of one batch. Standard library alone: TRL's environment
has no nemo_jepo.

P prompts, G completions of each, N = P * G sequences ordered by (prompt, completion).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TokenIds = list[int]
FIRST_TOKEN = 3
"""Ids below are special tokens of TRL's tokenizer; no sequence holds one."""


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with its reference answer, and the chains of thought that were sampled for it."""

    prompt: TokenIds
    chains: list[TokenIds]
    answer: TokenIds

    @property
    def completions(self) -> list[TokenIds]:
        """Chain and answer, side by side."""
        return [chain + self.answer for chain in self.chains]


@dataclass(frozen=True, slots=True)
class Workload:
    """One batch, its model, and how a worker is to run it."""

    shape: dict[str, Any]
    """Hugging Face config."""
    groups: list[Group]
    rule: dict[str, Any]
    """Of nemo_jepo's update: the fields of its `UpdateRule`."""
    sequences_per_micro_batch: int
    """Of TRL and of plain PyTorch; nemo_jepo has rows instead."""
    threads: int

    @property
    def sequences(self) -> Iterator[tuple[TokenIds, TokenIds]]:
        """N pairs of prompt and completion."""
        return ((group.prompt, completion) for group in self.groups for completion in group.completions)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences: what an update is useful for."""
        return sum(len(prompt) + len(completion) for prompt, completion in self.sequences)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of all completions, which a sampler draws."""
        return sum(len(completion) for _, completion in self.sequences)

    @property
    def group_size(self) -> int:
        """G."""
        return len(self.groups[0].chains)

    def write(self, folder: Path) -> None:
        """Put it where `read` finds it."""
        (folder / "workload.json").write_text(json.dumps(asdict(self)))


def read(folder: Path) -> Workload:
    """The workload of a folder, which also holds policy/ and reference/, two models as Hugging Face folders."""
    found = json.loads((folder / "workload.json").read_text())
    return Workload(**found | {"groups": [Group(**group) for group in found["groups"]]})
