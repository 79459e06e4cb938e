"""A trainer in a process of its own that stands still in the middle of a push, so that it can be killed there.

python -m tests.chaos.dying_trainer MODEL_FOLDER URL...
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.vllm.pool import Pool
from nemo_jepo.rollout.vllm.push import WeightTransfer
from tests.support.command_line import ENVIRONMENT, ROOT

HALF_WAY = "half of the weights are sent"


class DyingTrainer:
    """It has sent half of the weights when it is entered, and is dead when it is left."""

    def __init__(self, model_folder: Path, urls: list[str]) -> None:
        command = [sys.executable, "-m", "tests.chaos.dying_trainer", str(model_folder), *urls]
        self._process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "DyingTrainer":
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line == HALF_WAY, line
        return self

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def suspend(self) -> None:
        """SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Push weights that nobody shall ever sample with."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.support.pushes import stream
    from tests.support.serving import KEY, VOCAB

    folder, *urls = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder)
    named = [(name, torch.full_like(tensor, 0.01)) for name, tensor in stream(model)]
    shapes = [(name, tuple(tensor.shape)) for name, tensor in named]
    settings = VLLMConfig(weight_transfer="gloo")

    def half() -> Iterator[tuple[str, Tensor]]:
        for number, item in enumerate(named):
            if number == len(named) // 2:
                print(HALF_WAY, flush=True)
                signal.pause()
            yield item

    pool = Pool(urls, settings, KEY, VOCAB)
    WeightTransfer(pool.control, settings, shapes, torch.float32, Path(folder) / "weights").push(urls, half(), 10**6)


if __name__ == "__main__":
    main()
