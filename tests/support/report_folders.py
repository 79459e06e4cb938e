"""Small run folders for the report, written by the project's own Tracker from hand-made rollouts."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_jepo.config.schema import ExpManagerConfig
from nemo_jepo.metrics import rollout_records
from nemo_jepo.tracking import Tracker
from nemo_jepo.types import Prompt, Scores, Spliced

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">'\"{{ 7*7 }}"
"""Closes tags, quotes and templates, wherever it may stand."""
REVERSED = "\u202etxt\u0007"
"""Would turn the text after it around and rings a bell."""
VOCABULARY = ["2+2=", "First ", "two", "\n", "the final answer is", " 4", "<|end|>", HOSTILE, REVERSED]
MARKER = 4
SETTINGS = {"objective": {"name": "jepo"}, "trainer": {"jepo": {"max_steps": 3}}, "kl": {"beta": 0.001}}

VALID = Spliced(0, 0, (0, 1, 2, 3, 4, 5, 6), 1, 4, 2, True, True, generation_logprobs=(-0.5, -2.5, -0.1, -12.0))
INVALID = Spliced(0, 1, (0, 1, 7, 8), 1, 3, 0, False, False, generation_logprobs=(-0.5, -1.0, -4.0))
POLICY = ((-0.5, -3.0, 0.0, -12.0, -1.0, -0.25), (-0.5, -1.0, -4.0))


def decode(ids: Any) -> str:
    return "".join(VOCABULARY[token_id] for token_id in ids)


def marker_span(ids: Any) -> tuple[int, int] | None:
    return (ids.index(MARKER), ids.index(MARKER) + 1) if MARKER in ids else None


def records(question: str = "2+2=", advantage: float = 0.75) -> list[dict[str, Any]]:
    """A valid sample and one without marker, as a step writes them."""
    prompt = Prompt(prompt_id=41, token_ids=(0,), question=question, answer="4")
    logprobs = tuple(map(torch.tensor, POLICY))
    table = torch.tensor([[advantage, -1.0]], dtype=torch.float64)
    tables = {"advantage": table, "policy_weight": table / 8, "answer_weight": torch.tensor([[0.125, 0.0]])}
    return rollout_records([prompt], [VALID, INVALID], Scores(logprobs, logprobs), tables, decode, marker_span)


def write_run(
    folder: Path, settings: dict[str, Any] = SETTINGS, num_steps: int = 3, question: str = "2+2=", shift: float = 0.0
) -> Path:
    """A run of some steps: the bound rises by 1 a step, validation at every second one."""
    loggers = ExpManagerConfig(exp_dir=str(folder.parent), name=folder.name, create_tensorboard_logger=False)
    with Tracker(folder, loggers, num_steps, num_samples=2) as tracker:
        tracker.save_config(yaml.safe_dump(settings))
        for step in range(1, num_steps + 1):
            metrics = {"train_rollouts/bound": step - 4.0 + shift, "train_rollouts/kl": 0.1 * step}
            metrics |= {"timers/step_time": 2.0 + step, "timers/generate": 1.0, "timers/train_time": float(step)}
            tracker.log_rollouts(step, records(question, advantage=step / 4))
            if step % 2 == 0:
                metrics |= {"val_rollouts/accuracy": step / 10, "val_rollouts/proxy_nll": 4.0 - step}
                own = [record | {"text": f"own text of step {step}"} for record in records(question)[:1]]
                tracker.log_rollouts(step, own, "validation")
            tracker.log(metrics, step)
    return folder


def change_line(file: Path, number: int, **fields: Any) -> None:
    """Set fields of one line (from 1) of a JSONL file; a field of `...` is removed."""
    lines = file.read_text().splitlines()
    record = json.loads(lines[number - 1]) | fields
    lines[number - 1] = json.dumps({name: value for name, value in record.items() if value is not ...})
    file.write_text("\n".join(lines) + "\n")
