"""`nemo-jepo train` with vLLM servers that are fakes, on GPUs of their own or on the trainers'."""

import asyncio
import json
import random
import signal
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from nemo_jepo import train
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.config import compose
from nemo_jepo.config.check import check
from nemo_jepo.rollout import build
from nemo_jepo.rollout.vllm.local import ServedModel
from tests.support.command_line import TINY
from tests.support.fake_vllm import KEY, Body, FakeVLLM


class Server(FakeVLLM):
    """Draws what the prompt, the request and the number of equal requests since the last push say: of all servers, for
    which of them gets a request is a matter of time."""

    equal: Counter[str] = Counter()
    lock = threading.Lock()

    def __init__(self) -> None:
        super().__init__()
        self.answer = self._draw

    async def _generate(self, request: Any) -> Any:
        """Some prompts take longer, so that one replica has its batch when another still waits for a server."""
        await asyncio.sleep(0.05 * (sum((await request.json())["token_ids"]) % 2))
        return await super()._generate(request)

    async def _done(self, request: Any) -> Any:
        self.equal.clear()
        return await super()._done(request)

    def _draw(self, request: Body) -> Body:
        wanted = request["sampling_params"]
        asked = f"{request['token_ids']} {wanted['max_tokens']} {wanted['temperature']}"
        with self.lock:
            self.equal[asked] += 1
            draw = random.Random(f"{asked} {self.equal[asked]}")
        tokens = [draw.randrange(3, 200) for _ in range(draw.randrange(5, 25))]
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "token_ids": tokens,
            "logprobs": {"content": [{"token_id": token, "logprob": -1.0} for token in tokens]},
            "weight_versions": [{"version": self.version, "start": 0, "end": len(tokens)}],
        }
        return {"prompt_token_ids": request["token_ids"], "choices": [choice]}


class Servers:
    """In place of LocalServers."""

    fakes: list[Server] = []
    given: tuple[dict[str, Any], int] = ({}, -1)

    def __init__(self, model: ServedModel, settings: Any, key: str, folder: Path, first_gpu: int) -> None:
        type(self).given = settings.engine_args, first_gpu
        self._number = settings.num_servers

    def start(self) -> None:
        type(self).fakes = [Server().__enter__() for _ in range(self._number)]
        self.urls = [fake.url for fake in self.fakes]

    def ended(self) -> dict[str, str]:
        return {}

    def restart_dead(self) -> list[str]:
        return []

    def stop(self, urls: list[str]) -> None:
        assert not urls

    def close(self) -> None:
        for fake in self.fakes:
            fake.__exit__()


def only_asleep(work: Any) -> Any:
    """A method of the actor that needs its memory: every server sleeps meanwhile."""

    def method(self: MegatronJEPOActor, *arguments: Any, **named: Any) -> Any:
        assert all(fake.asleep == {"weights", "kv_cache"} for fake in Servers.fakes)
        return work(self, *arguments, **named)

    return method


def trained(job: dict[str, Any]) -> dict[str, Any]:
    """Runs to each of job["ends"] in turn: exit codes, metrics, what the first servers were given and asked."""
    overrides = [*TINY[1:], *job["overrides"], f"exp_manager.exp_dir={job['folder']}", "exp_manager.name=run"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    codes, logs = [], []
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(build, "LocalServers", Servers))
        stack.enter_context(mock.patch.object(build, "vllm_distribution", lambda: ("vllm", "0.32.0")))
        stack.enter_context(mock.patch.object(build.secrets, "token_urlsafe", lambda size: KEY))
        if "rollout=vllm_colocated" in overrides:
            for name in ("start_training", "train_step", "sharded_state_dict", "get_init_policy_logprobs"):
                whole = only_asleep(getattr(MegatronJEPOActor, name))
                stack.enter_context(mock.patch.object(MegatronJEPOActor, name, whole))
        for end in job["ends"]:
            config = compose.resolve(compose.compose("demo", [*overrides, f"trainer.jepo.max_steps={end}"]))
            check(config, dist.get_world_size())
            codes.append(train.main(config))
            logs.append([event for fake in Servers.fakes for event in fake.log])
            given = Servers.given
    for number, handler in handlers.items():
        signal.signal(number, handler)
    folder = Path(job["folder"]) / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"codes": codes, "metrics": lines, "given": given, "logs": logs}
