"""nemo-jepo demo [key=value ...]

Train the demo recipe on this machine's CPU, then show what it learned; key=value are overrides of conf/demo.yaml. Run
it again to see the result again.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_jepo.config import compose
from nemo_jepo.utils.exit_codes import DONE

ROWS = (
    ("accuracy", "accuracy of own answers", "{:.3f}"),
    ("proxy_nll", "proxy NLL of the reference answer, nats", "{:.3f}"),
    ("marker_rate", "generations with the answer marker", "{:.3f}"),
    ("cot_tokens_mean", "tokens in a chain of thought", "{:.1f}"),
)
NEXT = """Next, on your own questions and answers (JSONL or Parquet), with a Hugging Face model:

    .venv/bin/nemo-jepo train pretrained_checkpoint.restore_from_path=HF_FOLDER exp_manager.name=mine \\
        data.train_path=train.jsonl data.validation_path=held_out.jsonl data.prompt_key=question data.answer_key=answer
"""


def validations(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that hold held-out metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val_rollouts/proxy_nll" in line]


def table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Held-out metrics before and after JEPO."""
    lines = [f"{'held-out problems':<42}{'warm-up':>10}{'JEPO':>10}"]
    for key, label, form in ROWS:
        lines.append(f"{label:<42}" + "".join(f"{form.format(m[f'val_rollouts/{key}']):>10}" for m in (before, after)))
    return "\n".join(lines)


def chains(folder: Path, step: int, count: int) -> list[dict[str, Any]]:
    """One rollout of each of the first held-out prompts at a validation."""
    file = folder / "rollouts" / f"validation_{step:06d}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()][:count]


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracy and proxy NLL over steps, as a PNG."""
    from matplotlib.figure import Figure

    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    curves = (("accuracy", "accuracy of own answers"), ("proxy_nll", "proxy NLL of the reference answer (nats)"))
    for axes, (key, label), color in zip(figure.subplots(1, 2), curves, ("tab:blue", "tab:red"), strict=True):
        axes.plot(steps, [line[f"val_rollouts/{key}"] for line in lines], marker="o", color=color)
        axes.set(xlabel="JEPO updates", title=label, ylim=(0, 1 if key == "accuracy" else None))
        axes.grid(alpha=0.3)
    figure.suptitle("Held-out arithmetic: no verifier in the reward, only the likelihood of the reference answer")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> int:
    """Train (or find the finished run), print the table, three chains before and after, and draw the curves.

    Raises:
        ConfigError: a setting to change.
    """
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return DONE
    folder = compose.resolve(compose.compose("demo", argv)).run_folder
    command = [sys.executable, "-m", "nemo_jepo.cli", "train", "--config-name", "demo", *argv]
    code = subprocess.run(command, env={"OMP_NUM_THREADS": str(os.cpu_count())} | os.environ).returncode
    if code:
        return code
    lines = validations(folder)
    first, last = lines[0], lines[-1]
    draw(lines, folder / "curves.png")
    print(f"\n{table(first, last)}\n")
    for before, after in zip(chains(folder, first["step"], 3), chains(folder, last["step"], 3), strict=True):
        print(f"{before['prompt']}  (reference answer {before['reference_answer']})")
        for name, rollout in (("warm-up", before), ("JEPO", after)):
            print(f"    {name:<8} {' '.join(rollout['text'].split())}")
    print(f"\nCurves: {folder / 'curves.png'}    Everything else: {folder}\n\n{NEXT}")
    return DONE
