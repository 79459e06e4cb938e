"""The settings of what is read: `data`, `tokenizer` and `answer`. Part of the schema, see `config.schema`."""

from dataclasses import dataclass, field, replace
from typing import Any

from nemo_jepo.config.conf_files import examples_file, shipped_examples
from nemo_jepo.config.hub import is_model
from nemo_jepo.config.rules import Rule, setting

WORKED_TASKS = ("chain_sum", "letter_counting")
"""Tasks of reasoning_gym with golden chains of thought, which `nemo_jepo.data.worked` writes."""

ASKS_THE_QUESTION = Rule("a text that contains {question}", lambda text: "{question}" in text, "Add it")
EXAMPLES = Rule(
    f"a .jsonl or .parquet file, or one of {', '.join(shipped_examples())}",
    lambda name: examples_file(name).is_file(),
    "Give the path of a file of solved examples",
)
IS_MODEL = Rule(
    "a folder that exists, or owner/name[@revision] of the Hugging Face hub",
    is_model,
    "Give one (`make smollm2` writes a small one); a .gguf file goes through `nemo-jepo import` first",
)
TRIMMED = Rule(
    "a text that starts and ends with a visible character", lambda text: text != "" and text == text.strip(), "Trim it"
)


@dataclass(kw_only=True, slots=True)
class ArithmeticConfig:
    """Generated chains such as 7+5*3-2, evaluated left to right mod 10: the demo's data."""

    num_steps: int = setting(4, ge=1)
    """Operations in a chain."""
    min_steps: int | None = setting(None, ge=1)
    """Every chain has from so many operations to num_steps, each number as likely as another. Null: all have
    num_steps."""
    num_train: int = setting(20000, ge=1)
    """Problems to train on."""
    num_validation: int = setting(256, ge=0)
    """Problems to validate on; none of them is among those to train on."""
    right_share: float = setting(0.4, ge=0, le=1)
    """Share of the warm-up corpus whose chain of thought is right."""
    corrupted_share: float = setting(0.4, ge=0, le=1)
    """Share whose chain of thought has wrong intermediate results."""
    corrupted_steps: int = setting(1, ge=1)
    """Wrong intermediate results of such a chain; what comes after one follows from it."""
    corrupted_answer: str = setting("right", choices=("right", "follows"))
    """The answer behind such a chain: right all the same, or the one that follows from the chain's own steps."""
    answers: str = setting("short", choices=("short", "mixed", "derivation", "judgement"))
    """How reference answers are written: short (a digit), mixed (some problems in words, answered by a phrase that no
    verifier reads) or derivation (sentences that no verifier reads). judgement: each problem becomes two prompts that
    ask whether an answer written as in mixed is correct (docs/results/judge.md)."""
    in_words_share: float = setting(0.4, ge=0, le=1)
    """With answers=mixed and judgement: share of the problems that are in words."""

    @property
    def shortest(self) -> int:
        """Operations in the shortest chain."""
        return self.num_steps if self.min_steps is None else self.min_steps


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where prompts and reference answers come from (config group `data=`)."""

    name: str = setting("jsonl", choices=("jsonl", "gsm8k", "arithmetic", "reasoning_gym"))
    """jsonl (JSONL or Parquet by key names), gsm8k (as published), arithmetic (generated) or reasoning_gym (generated
    by that package)."""
    train_path: str | None = setting(None, exists=True, fix="Give the path of a .jsonl or .parquet file")
    """The training file, .jsonl or .parquet."""
    validation_path: str | None = setting(None, exists=True, fix="Give the path of a .jsonl or .parquet file")
    """The validation file; null for none."""
    prompt_key: str = "question"
    """Field of a row that holds the question."""
    answer_key: str = "answer"
    """Field of a row that holds the reference answer."""
    chain_of_thought_key: str | None = None
    """Field with a golden chain of thought, for objective=sft with objective.sft_target=chain_of_thought."""
    verifiable_key: str | None = "verifiable"
    """Field that says true or false: whether a verifier can grade the row's answer. A row without it is verifiable.
    Null: all are."""
    prompt_template: str = setting("{question}\n", ASKS_THE_QUESTION)
    """The plain prompt, in which {question} is replaced. With use_chat_template: the user's turn."""
    use_chat_template: bool = False
    """Write prompts by the tokenizer's own chat template, up to its generation prompt. Answers end as its turns do."""
    system_prompt: str | None = None
    """System turn of the chat template."""
    examples: str | None = setting(None, EXAMPLES)
    """Solved examples in front of every question: a file whose rows have question, chain_of_thought and answer, or the
    name of a shipped one (conf/examples). Turns of the chat with use_chat_template, else plain text."""
    on_bad_row: str = setting("error", choices=("error", "skip"))
    """error (the message names file, line and field) or skip (bad rows are counted and listed)."""
    max_prompt_tokens: int = setting(1024, ge=1)
    """Longest prompt. A longer row is a bad row."""
    max_answer_tokens: int = setting(1024, ge=1)
    """Longest reference answer, end-of-turn included. A longer row is a bad row."""
    shuffle: bool = True
    """Another order of the rows in every epoch."""
    seed: int = setting(1234, ge=0)
    """Seed of the order of rows, of generated data and of sampling."""
    drop_easy: float | None = setting(None, gt=0, le=1)
    """Leave a prompt out of the epochs to come when its pass rate is at least so much: the share of right own answers
    where the objective has them verified, else the mean of exp(l_i / answer tokens). The hardest num_prompts_per_step
    always stay. Null: none is left out."""
    sampler: str = setting("uniform", choices=("uniform", "learning_progress"))
    """uniform: every prompt once an epoch. learning_progress: prompts are drawn, likelier where the reward's std over a
    prompt's samples has been large."""
    cluster_key: str | None = None
    """Field of a row whose equal values make a cluster, which the sampler learning_progress measures as one; with
    data=arithmetic num_steps, the operations in a chain. Null: each prompt by itself."""
    group_key: str | None = None
    """Field of a row whose equal values tie rows together: those of a group are in one batch and on one replica. All
    groups have one size. Null: no row is tied to another."""
    sampler_floor: float = setting(0.1, gt=0, le=1)
    """Share of the draws of learning_progress that is uniform over all prompts."""
    sampler_exponential_mean: float = setting(0.5, ge=0, le=1)
    """What a new std leaves of the mean of the earlier ones, for learning_progress; 0: the last alone."""
    num_validation_prompts: int = setting(128, ge=1)
    """Validation uses the first so many rows."""
    task: str | None = None
    """reasoning_gym: the name of one of the package's tasks, such as chain_sum."""
    task_args: dict[str, Any] = field(default_factory=dict)
    """reasoning_gym: the task's own arguments, {min_terms: 2, max_terms: 3}; seed and size are the run's."""
    num_train_prompts: int = setting(2000, ge=1)
    """reasoning_gym: different questions to train on; none of them is among those to validate on."""
    verifier: str = setting("math", choices=("math", "task", "judgement"))
    """What grades own answers, for accuracy and as the reward of rloo and jepo_rl: math (math-verify), task
    (reasoning_gym's own scorer) or judgement (both orders of a pair together; docs/guides/train-a-judge.md)."""
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)

    @property
    def learns(self) -> bool:
        """Which prompts come next depends on what earlier ones have shown."""
        return self.drop_easy is not None or self.sampler != "uniform"

    def without_curriculum(self) -> "DataConfig":
        """The same rows, every one once an epoch."""
        return replace(self, drop_easy=None, sampler="uniform")

    @property
    def reads_files(self) -> bool:
        """False: the rows are generated, and no file is needed."""
        return self.name not in ("arithmetic", "reasoning_gym")


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """The tokenizer: a folder, or one that is trained on the training data (small models from scratch)."""

    path: str | None = setting(None, IS_MODEL)
    """A Hugging Face tokenizer folder or a name of the hub; null: that of pretrained_checkpoint.restore_from_path."""
    train_vocab_size: int = setting(512, ge=260)
    """Without a folder: train a byte-level BPE of this size on the training file, into the run folder."""


@dataclass(kw_only=True, slots=True)
class AnswerConfig:
    """How a generation's chain of thought ends and how the reference answer joins it."""

    marker: str = setting("the final answer is", TRIMMED)
    """Searched without regard to case in the decoded generation; the chain of thought ends right after it."""
    append_eos: bool = True
    """The reference answer ends with the end-of-turn id."""
    min_cot_tokens: int = setting(0, ge=0)
    """A shorter chain of thought (marker not counted) is not valid."""

    def up_to_answer(self, chain_of_thought: str | None) -> str:
        """What supervised targets and solved examples write before an answer: the chain of thought, if there is one,
        and the marker as the beginning of a sentence on a line of its own."""
        marker = self.marker[0].upper() + self.marker[1:]
        return f"{chain_of_thought}\n{marker}" if chain_of_thought else marker
