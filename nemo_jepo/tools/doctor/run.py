"""A run's own settings: the model's shape, tokenizer and marker, data, batch arithmetic."""

import tempfile
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.load import hf_shapes, open_source
from nemo_jepo.config.check import check
from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.config.hub import is_hub_name
from nemo_jepo.config.schema import Config
from nemo_jepo.config.sources import with_folders
from nemo_jepo.data.dataset import has_split, load_prompts, training_texts
from nemo_jepo.data.splice import Splicer
from nemo_jepo.data.tokenizer import load_tokenizer, train_tokenizer
from nemo_jepo.tools.doctor.findings import BLOCKER, OK, WARNING, Finding
from nemo_jepo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER_PROBES = 64
SEPARATORS = (" ", ": ", "\n", "")
"""What stands between marker and answer."""


def blocker(subject: str, error: Exception) -> Finding:
    """What a run would stop with."""
    rule, _, fix = str(error).rpartition(". ")
    return Finding(BLOCKER, subject, rule or str(error), fix.rstrip(".") or "See the message")


def check_settings(config: Config, world_size: int) -> Iterator[Finding]:
    """Every rule between settings, as train checks them."""
    try:
        check(config, world_size)
    except (ConfigError, DataError) as error:
        yield blocker("settings", error)
    else:
        yield Finding(OK, "settings", f"hold together for {world_size} trainer rank{'s' * (world_size > 1)}")


def look_up(config: Config, weights: bool = False) -> tuple[Config | None, list[Finding]]:
    """The settings with folders in the place of hub names; None where one has none.

    Args:
        weights: download them too; else they stay on the hub.
    """
    try:
        local = with_folders(config, weights)
    except ConfigError as error:
        return None, [blocker("hub", error)]
    if local == config:
        return config, []
    where = "is in the cache" if weights else "exists; a run that starts downloads the weights that the cache lacks"
    return local, [Finding(OK, "hub", f"the model {where}")]


def count_parameters(config: Config, has_weights: bool = True) -> tuple[int | None, list[Finding]]:
    """Parameters of the whole model, and whether the weights it starts from are there.

    Args:
        has_weights: False for a folder of the hub's cache, which a run completes.
    """
    path = config.pretrained_checkpoint.restore_from_path
    source = config.model.hf_config or config.model.hf_config_path or path
    if source is None or source == path and is_hub_name(path):
        return None, []  # the first rank looks names up
    try:
        hf_config = load_hf_config(source)
        count = 0
        for shape in hf_shapes(hf_config).values():
            size = 1
            for length in shape:
                size *= length
            count += size
        if path is not None and has_weights and not (Path(path) / "complete.json").exists():
            open_source(hf_config, path, 0)  # reads headers only
    except (ConfigError, OSError, ValueError) as error:
        return None, [blocker("model", error)]
    begins = f"from {path}" if path else "random initial weights"
    return count, [Finding(OK, "model", f"{hf_config.model_type}, {count / 1e6:,.1f}M parameters, {begins}")]


def find_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """As a run finds it; one that the run would train is trained into a temporary folder."""
    path = config.tokenizer.path or config.pretrained_checkpoint.restore_from_path
    if path is not None:
        return load_tokenizer(path, config.data.use_chat_template)
    texts = [config.answer.marker.capitalize(), *training_texts(config.data)]
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer(texts, config.tokenizer.train_vocab_size, Path(folder) / "tokenizer")


def check_data(config: Config, world_size: int) -> Iterator[Finding]:
    """Tokenizer, data files, marker, and what a step consists of."""
    try:
        tokenizer = find_tokenizer(config)
        yield Finding(OK, "tokenizer", f"{len(tokenizer)} tokens, end of text {tokenizer.eos_token!r}")
        dataset = load_prompts(config.data, "train", tokenizer, config.answer)
        yield from _rows("training data", len(dataset.prompts), [str(row) for row in dataset.bad_rows])
        if has_split(config.data, "validation"):
            held_out = load_prompts(config.data, "validation", tokenizer, config.answer)
            yield from _rows("held-out data", len(held_out.prompts), [str(row) for row in held_out.bad_rows])
        splicer = Splicer(tokenizer, config.answer)
    except (ConfigError, DataError) as error:
        yield blocker("data", error)
        return
    yield check_marker(splicer, tokenizer, config.answer.marker, dataset.prompts)
    yield from batch_arithmetic(config, dataset.prompts, world_size)


def _rows(subject: str, num_used: int, bad: Sequence[str]) -> Iterator[Finding]:
    text = f"{num_used:,} usable rows"
    if bad:
        yield Finding(WARNING, subject, f"{text}, {len(bad):,} skipped, the first: {bad[0]}", "Repair or remove them")
    else:
        yield Finding(OK, subject, text)


def check_marker(
    splicer: Splicer, tokenizer: "PreTrainedTokenizerBase", marker: str, prompts: Sequence[Prompt]
) -> Finding:
    """Whether the marker's last letter ends a token, whatever a model writes between marker and answer.

    A generation whose marker ends inside a token cannot be cut there: it is not valid and earns nothing.
    """
    probes = prompts[:MARKER_PROBES]
    split: dict[str, int] = {}
    for separator in SEPARATORS:
        for prompt in probes:
            text = f"So {marker}{separator}{prompt.answer.strip()}"
            end = splicer.marker_end(tokenizer.encode(text, add_special_tokens=False))
            split[separator] = split.get(separator, 0) + (end is None or not end.aligned)
    if not any(split.values()):
        return Finding(OK, "marker", f"{marker!r} ends a token before every one of {len(probes)} reference answers")
    where = ", ".join(
        f"{count} of {len(probes)} answers after {separator!r}" for separator, count in split.items() if count
    )
    fix = "Choose an answer.marker that ends in a letter, or watch train_rollouts/misaligned_rate"
    return Finding(WARNING, "marker", f"{marker!r} ends inside a token before {where}", fix)


def batch_arithmetic(config: Config, prompts: Sequence[Prompt], world_size: int) -> Iterator[Finding]:
    """prompts x samples -> rows -> micro-batches -> steps, for the longest generations that are allowed."""
    loop, tokens = config.trainer.jepo, config.model.tokens_per_micro_batch
    try:
        replicas = config.model.data_parallel_size(world_size)
    except ConfigError:
        return  # said by check_settings
    samples = 1 if config.objective.kind.supervised else loop.num_generations_per_prompt
    sequences = loop.num_prompts_per_step * samples
    mean_prompt = sum(len(prompt.token_ids) for prompt in prompts) / max(1, len(prompts))
    longest = mean_prompt + config.rollout.max_tokens + config.data.max_answer_tokens
    rows = ceil(sequences / replicas * longest / tokens)
    steps = len(prompts) // loop.num_prompts_per_step
    parts = (
        f"{loop.num_prompts_per_step} prompts x {samples} samples = {sequences} sequences",
        f"{sequences // replicas} for each of {replicas} replicas, at most about {longest:,.0f} tokens long",
        f"{rows} rows of {tokens} = {rows} micro-batches",
        f"{steps:,} steps an epoch, {loop.max_steps:,} in the run",
    )
    yield Finding(OK, "a step", " -> ".join(parts))
    if steps == 0:
        fix = "Lower trainer.jepo.num_prompts_per_step, or give more data"
        yield Finding(BLOCKER, "a step", f"{len(prompts)} training prompts do not fill one step", fix)
    stages = config.model.pipeline_model_parallel_size
    if rows < stages:
        fix = "Lower model.tokens_per_micro_batch, or the pipeline size"
        yield Finding(
            WARNING, "a step", f"{rows} micro-batches for {stages} pipeline stages leave most of them idle", fix
        )
