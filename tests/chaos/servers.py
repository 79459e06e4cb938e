"""Faults of vLLM servers and of the trainer that feeds them, with real servers; after each all is well again.

    python -m tests.chaos.servers --rounds 20 --seed 0

A round begins with two servers that have the current weights and requests in flight. One fault happens, or two; weights
are pushed until both servers have the newest ones again. Then every sample must be there once, each server must sample
with those weights and no others, and nothing may be left of what has died.
"""

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
from torch import Tensor

from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.sampler import SamplersLost
from nemo_jepo.rollout.vllm import pool as pool_module
from nemo_jepo.rollout.vllm.pool import Pool
from nemo_jepo.rollout.vllm.push import WeightTransfer
from nemo_jepo.rollout.vllm.sampler import VLLMSampler
from nemo_jepo.types import Rollout
from tests.chaos.dying_trainer import DyingTrainer
from tests.support.pushes import PROMPTS, differences, request, stream
from tests.support.serving import KEY, VOCAB, Server, start_server, tiny_model, wait_for
from tests.support.vllm_processes import alive, descendants, named, orphaned_memory, wait_until

IMPATIENT = (
    "import sys; from nemo_jepo.rollout.vllm import supervisor; supervisor.MAX_SILENCES = 3; "
    "from nemo_jepo.cli import main; sys.exit(main())"
)
"""`nemo-jepo` with a supervisor that waits 15 s for an answer where it would wait a minute."""
SETTINGS = VLLMConfig(weight_transfer="gloo", sync_timeout_s=45.0, request_timeout_s=90.0)
RECOVERY_S = 900.0
"""Of a machine that does much else; a server starts in 25 s where it does nothing else."""
ROUNDING = 1e-4
"""Nats, in fp32, of a machine that is busy with servers that start."""
BUCKETS = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 6, "initializer_range": 0.06}
"""A model of 40 MB, which is three messages, so that a push can break off between two."""
MOMENT = 40
"""Tensors of a push that have been read when a fault in mid-push happens, of 56."""


@dataclass
class Round:
    """One fault and what became of it."""

    kind: str
    seconds: float
    problems: list[str] = field(default_factory=list)


Fault = Callable[["Field", list[Server]], None]
"""Does something to servers, the first of which is the victim."""


def kill(part: str) -> Fault:
    """SIGKILL to the processes of the victim that bear this name."""
    return lambda _, servers: [process.kill() for process in named(servers[0].process.pid, part)] and None


def stop(part: str) -> Fault:
    """SIGSTOP to them."""
    return lambda _, servers: [process.suspend() for process in named(servers[0].process.pid, part)] and None


def kill_supervisor(_: "Field", servers: list[Server]) -> None:
    servers[0].process.kill()


def refuse(field: "Field", servers: list[Server]) -> None:
    """The victim's worker loses its model: it refuses every update, and /health says that all is well."""
    field.pool.control(servers[0].url, "POST", "/collective_rpc", {"method": "shutdown"})


def kill_trainer(field: "Field", servers: list[Server]) -> None:
    """Another trainer pushes to both, and dies half-way."""
    with DyingTrainer(field.folders[0], [server.url for server in servers]) as trainer:
        trainer.kill()


def stop_trainer(field: "Field", servers: list[Server]) -> None:
    """It hangs half-way, while this one wants to push; then it dies."""
    with DyingTrainer(field.folders[0], [server.url for server in servers]) as trainer:
        trainer.suspend()
        field.push(field.version + 1)
        trainer.kill()


def both(first: Fault, second: Fault) -> Fault:
    """One fault for each server, at once."""

    def happen(field: "Field", servers: list[Server]) -> None:
        first(field, servers)
        second(field, servers[::-1])

    return happen


ENGINE, API = "EngineCor", "api_server"
SAMPLING: dict[str, Fault] = {
    "kill -9 engine": kill(ENGINE),
    "kill -9 API server": kill(API),
    "kill -9 supervisor": kill_supervisor,
    "SIGSTOP engine": stop(ENGINE),
    "SIGSTOP API server": stop(API),
    "refused updates": refuse,
    "trainer killed in mid-push": kill_trainer,
    "trainer stopped, then killed in mid-push": stop_trainer,
    "kill -9 engine + SIGSTOP API server": both(kill(ENGINE), stop(API)),
    "kill -9 API server + SIGSTOP engine": both(kill(API), stop(ENGINE)),
}
"""Faults while requests are in flight."""
PUSHING: dict[str, Fault] = {
    "kill -9 engine in mid-push": kill(ENGINE),
    "kill -9 API server in mid-push": kill(API),
    "kill -9 supervisor in mid-push": kill_supervisor,
    "SIGSTOP engine in mid-push": stop(ENGINE),
    "SIGSTOP API server in mid-push": stop(API),
    "kill -9 API server + SIGSTOP engine in mid-push": both(kill(API), stop(ENGINE)),
    "SIGSTOP both engines in mid-push": both(stop(ENGINE), stop(ENGINE)),
}
"""Faults when a part of the weights has come."""


class Field:
    """Two servers, and the sampler of a trainer that lives.

    Args:
        folder: for models, logs and keys.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._temporary = folder, folder / "tmp"  # others on this machine use the common one
        self._temporary.mkdir()
        self.folders = [folder / "one", folder / "two"]
        self._models = [tiny_model(path, "llama", True, seed, **BUCKETS) for seed, path in enumerate(self.folders)]
        self.version = 0
        self.servers = [self._start(number) for number in range(2)]
        self.pool = Pool([server.url for server in self.servers], SETTINGS, KEY, VOCAB)
        shapes = [(name, tuple(tensor.shape)) for name, tensor in stream(self._models[0])]
        transfer = WeightTransfer(self.pool.control, SETTINGS, shapes, self._models[0].dtype, folder / "weights")
        urls = [server.url for server in self.servers]
        self._sampler = VLLMSampler(self.pool, transfer, urls, "Answer:", 900.0, None)
        self._families: list[list[psutil.Process]] = []
        self._dead: list[psutil.Process] = []
        """All that ever ran and may have died."""
        self._memory = orphaned_memory()

    def _start(self, number: int, port: int | None = None) -> Server:
        log, options = self._folder / f"server_{number}.log", ("--load-format", "dummy")
        environment = {"TMPDIR": str(self._temporary)}
        program = ("-c", IMPATIENT)
        return start_server(self.folders[0], *options, log=log, environment=environment, port=port, program=program)

    def push(self, version: int, fault: Callable[[], None] | None = None) -> None:
        """One weight sync; a fault happens while the weights are read for the first time."""
        self.version = version
        faults = iter([fault] if fault else [])
        while self._sampler.load_weights(self._weights(next(faults, None)), version):
            pass

    def _weights(self, fault: Callable[[], None] | None) -> Iterator[tuple[str, Tensor]]:
        for number, item in enumerate(stream(self._models[self.version % 2])):
            if fault is not None and number == MOMENT:
                fault()
            yield item

    def settle(self) -> list[str]:
        """Push until both servers have the weights, as the steps of a run do; what is wrong where they never do."""
        deadline = time.monotonic() + RECOVERY_S
        while len(self.pool.ready()) < 2:
            if time.monotonic() > deadline:
                return [f"not well after {RECOVERY_S:g} s: {self.pool.out()}"]
            for number, server in enumerate(self.servers):
                if server.process.poll() is not None:  # nobody but its own starter can do that
                    wait_until(partial(_ended, self._families[number]), RECOVERY_S)
                    self.servers[number] = self._start(number, int(server.url.rpartition(":")[2]))
            time.sleep(1.0)
            self.push(self.version + 1)
        return []

    def round(self, kind: str, victim: int) -> Round:
        """One fault."""
        began_s = time.monotonic()
        self._families = [descendants(server.process.pid) for server in self.servers]
        self._dead += itertools.chain.from_iterable(self._families)
        ordered = self.servers[victim:] + self.servers[:victim]
        batch = partial(self._sampler.submit, PROMPTS * 4, request(max_tokens=100))
        future = batch()
        if kind in SAMPLING:
            SAMPLING[kind](self, ordered)
        self.push(self.version + 1, partial(PUSHING[kind], self, ordered) if kind in PUSHING else None)
        problems, rollouts = self._settle_and_collect(future, batch)
        if not problems:
            problems = self._lost_or_doubled(rollouts) + self._sampled_with_other_weights() + self._left_behind()
        return Round(kind, time.monotonic() - began_s, problems)

    def _settle_and_collect(self, future, batch) -> tuple[list[str], list[Rollout]]:  # type: ignore[no-untyped-def]
        """Where all servers were lost the run ends, and the next one draws the batch again."""
        try:
            rollouts = future.result(RECOVERY_S)
        except SamplersLost:
            problems = self.settle()
            return problems, [] if problems else batch().result(RECOVERY_S)
        except TimeoutError:
            return ["the batch never ended"], []
        return self.settle(), rollouts

    def _lost_or_doubled(self, rollouts: list[Rollout]) -> list[str]:
        drawn = [(rollout.group, rollout.sample) for rollout in rollouts]
        failed = sum(rollout.finish_reason == "failed" for rollout in rollouts)
        expected = list(itertools.product(range(len(PROMPTS) * 4), range(2)))
        return [] if drawn == expected and not failed else [f"{failed} samples failed, drawn: {len(set(drawn))}"]

    def _sampled_with_other_weights(self) -> list[str]:
        """What each server samples now, against transformers; and its own account of its version."""
        problems = []
        for server in self.servers:
            told = self.pool.control(server.url, "GET", "/weight_info")["weight_version"]
            rollouts = self.pool.submit(PROMPTS, request(), (), only=server.url).result(RECOVERY_S)
            worst = max(differences(self._models[self.version % 2], rollout).max().item() for rollout in rollouts)
            versions = {rollout.policy_version for rollout in rollouts}
            if worst > ROUNDING or versions != {self.version} or told != str(self.version):
                problems.append(f"{server.url}: {worst:.2g} nats off, versions {versions}, {told}, not {self.version}")
        return problems

    def _left_behind(self) -> list[str]:
        """Processes, sockets and shared memory of servers that are no more."""
        living = {process.pid for server in self.servers for process in descendants(server.process.pid)}
        problems = [f"still runs: {process}" for process in alive(self._dead) if process.pid not in living]
        self._dead = [process for process in self._dead if process.pid in living]
        left = [place.name for place in self._temporary.iterdir()]
        if len(left) != len(self.servers):
            problems.append(f"temporary files: {left}")
        return problems + [f"in /dev/shm: {name}" for name in orphaned_memory() - self._memory]

    def close(self) -> None:
        """End the servers."""
        self._sampler.close()
        for server in self.servers:
            server.end()


def _ended(processes: list[psutil.Process]) -> bool:
    return not alive(processes)


def rounds(seed: int, number: int) -> Iterator[Round]:
    """So many rounds, every kind once before any comes again."""
    chance = random.Random(seed)
    kinds: list[str] = []
    pool_module.ENGINE_TIMEOUT_S = 10.0
    with tempfile.TemporaryDirectory(prefix="servers_") as folder:
        with closing(Field(Path(folder))) as field:
            wait_for(field.servers)
            field.push(1)
            for _ in range(number):
                kinds = kinds or chance.sample([*SAMPLING, *PUSHING], len(SAMPLING) + len(PUSHING))
                yield field.round(kinds.pop(), chance.randrange(2))


def main() -> int:
    """Print the table; 1 where a round has problems."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.servers")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    bad = 0
    for number, done in enumerate(rounds(args.seed, args.rounds), 1):
        bad += bool(done.problems)
        print(f"{number:3}  {done.kind:48} {done.seconds:6.0f} s  {'; '.join(done.problems) or 'ok'}", flush=True)
    print(f"{bad} rounds with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
