"""What the run's model writes before any training: does it reach the marker, and how does it sound."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nemo_jepo.actor.actor import DTYPES
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.load import hf_shapes, open_source
from nemo_jepo.checkpoint.format import is_checkpoint
from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.config.schema import Config
from nemo_jepo.data.dataset import load_prompts
from nemo_jepo.data.splice import Splicer
from nemo_jepo.tools.doctor.findings import OK, WARNING, Finding
from nemo_jepo.tools.doctor.run import blocker, find_tokenizer
from nemo_jepo.types import Prompt, Rollout

NUM_COMPLETIONS = 16
LOW_MARKER_RATE = 0.6
"""With 4 completions of a prompt, 2.6% of the prompts have no valid one at this rate, and 24% at half of it."""


def check_samples(config: Config) -> Iterator[Finding]:
    """Completions of the first training prompts, one each, at the settings of a training step; one process."""
    path = config.pretrained_checkpoint.restore_from_path
    if path is not None and is_checkpoint(Path(path)):
        fix = "Export it first (nemo-jepo export), and give the folder"
        yield Finding(WARNING, "samples", f"{path} is a checkpoint, and this reads Hugging Face folders", fix)
        return
    try:
        tokenizer = find_tokenizer(config)
        prompts = load_prompts(config.data, "train", tokenizer, config.answer).prompts[:NUM_COMPLETIONS]
        splicer = Splicer(tokenizer, config.answer)
        rollouts = _sampled(config, prompts, splicer, tokenizer.eos_token_id)
    except (ConfigError, DataError, OSError) as error:
        yield blocker("samples", error)
        return
    yield marker_rate([splicer.marker_end(one.token_ids) is not None for one in rollouts], rollouts)
    yield Finding(OK, "a completion", tokenizer.decode(list(rollouts[0].token_ids)))


def marker_rate(has_marker: Sequence[bool], rollouts: Sequence[Rollout]) -> Finding:
    """How many completions have the marker, how long they are and how many were cut off; what to do if few have it."""
    number = len(rollouts)
    tokens = sum(len(one.token_ids) for one in rollouts) / number
    cut = sum(one.finish_reason == "length" for one in rollouts)
    found = f"{sum(has_marker)} of {number} completions have the marker; {tokens:.0f} tokens on average"
    text = f"{found}, {cut} cut off at rollout.max_tokens"
    if sum(has_marker) >= LOW_MARKER_RATE * number:
        return Finding(OK, "samples", text)
    ways = ["show solved examples (data.examples)", "use the chat template (data.use_chat_template=true)"]
    ways.append("warm up (warmup.max_steps)")
    if 2 * cut > number:
        ways.insert(0, "raise rollout.max_tokens")
    return Finding(WARNING, "samples", text, f"A completion without it earns nothing: {', '.join(ways)}")


def _sampled(config: Config, prompts: Sequence[Prompt], splicer: Splicer, eos_token_id: int) -> list[Rollout]:
    from nemo_jepo.rollout.build import training_request
    from nemo_jepo.rollout.embedded import EmbeddedSampler  # transformers' generation: seconds to import

    path = config.pretrained_checkpoint.restore_from_path
    source = config.model.hf_config or config.model.hf_config_path or path
    assert source is not None, "config.check asks for one"
    hf_config = load_hf_config(source)
    weights = open_source(hf_config, path, config.model.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[config.trainer.precision]
    sampler = EmbeddedSampler(hf_config, config.rollout, eos_token_id, splicer.stop_after, device, dtype)
    sampler.load_weights(((name, weights.read(name)) for name in hf_shapes(hf_config)), 0)
    return sampler.generate(prompts, training_request(config.rollout, 1, seed=config.data.seed))
