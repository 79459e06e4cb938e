"""The worker process of a task's scorer, started by `nemo_jepo.rewards.task` alone.

request   {"task", "arguments", "entry": the package's own item, pickled by the trainer, "answer": text of a model}
answer    the score, from 0 to 1; a fault where the package failed
"""

import base64
import json
import logging
import pickle
import sys
from functools import lru_cache
from typing import Any

import reasoning_gym

from nemo_jepo.rewards.process import serve


def score(request: dict[str, Any]) -> float:
    """The package's score of the answer."""
    dataset = _dataset(request["task"], json.dumps(request["arguments"]))
    return float(dataset.score_answer(request["answer"], _entry(request["entry"])))


@lru_cache(maxsize=1)
def _dataset(task: str, arguments: str) -> Any:
    return reasoning_gym.create_dataset(task, seed=0, size=1, **json.loads(arguments))


@lru_cache(maxsize=16)
def _entry(pickled: str) -> dict[str, Any]:
    """Made by this project's own process, which nobody else can write to."""
    return pickle.loads(base64.b64decode(pickled))


def main() -> None:
    """Answers until standard input ends."""
    sys.set_int_max_str_digits(0)
    logging.disable()
    serve(score)


if __name__ == "__main__":
    main()
