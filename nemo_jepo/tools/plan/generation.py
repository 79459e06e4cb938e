"""Seconds of sampling and of the weight sync.

A server with t GPUs holds C sequences at a time: as many as wait, as fit in its cache, as it is sent. A decoding step
with b sequences of mean length s takes

    max( (weights / t + b s token bytes / t) / (efficiency * memory bandwidth),  2 b active / t / (efficiency * peak) )
    + 2 L all-reduces + a fixed time

While sequences wait, the batch stays full: (n - C) mean / C steps. Then it drains: at token u it holds C P(length > u),
and the step goes on while any of all N sequences does, with probability 1 - (1 - P(length > u))^N. A group's prompt is
computed once. Experts are read as far as the batch visits them, E (1 - (1 - A / E)^b) of E.

Sources: Pope et al., arXiv 2211.05102, section 2 (decoding reads weights and cache); Yu et al., Orca, OSDI 2022, and
Kwon et al., arXiv 2309.06180 (continuous batching, cache of a token).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from nemo_jepo.tools.plan.calibration import (
    ALL_REDUCE_SECONDS,
    DECODE_STEP_SECONDS,
    HOST_COPY_EFFICIENCY,
    LINK_EFFICIENCY,
    MATMUL_EFFICIENCY,
    MEMORY_EFFICIENCY,
    SYNC_BANDWIDTH,
    SYNC_SECONDS,
)
from nemo_jepo.tools.plan.hardware import GPU
from nemo_jepo.tools.plan.shape import ModelShape
from nemo_jepo.tools.plan.workload import Workload

_POINTS = 128
"""Of the numerical integral over a generation."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """Servers that sample, all alike."""

    shape: ModelShape
    gpu: GPU
    num_servers: int
    tensor_parallel_size: int
    cached_tokens: float
    """Tokens that the key-value cache of one server holds."""
    most_sequences: int
    """That one server is sent at a time."""
    step_seconds: float = DECODE_STEP_SECONDS
    dtype_bytes: int = 2

    def batch(self, work: Workload) -> float:
        """Sequences that a server decodes together at the most."""
        waiting = -(-work.num_sequences // self.num_servers)
        mean = work.prompt + work.generations.mean_square / (2 * work.generations.mean)
        return max(1.0, min(waiting, self.most_sequences, self.cached_tokens / mean))

    def seconds(self, work: Workload) -> dict[str, float]:
        """Seconds of a step's sampling on the slowest server, by what it spends them on."""
        return dict(_sampling_seconds(self, work))

    def integrate(self, work: Workload) -> dict[str, float]:
        """The same, computed: full batches, then the integral over the draining one."""
        batch, lengths = self.batch(work), work.generations
        waiting = max(0.0, work.num_sequences / self.num_servers - batch)
        middle = work.prompt + lengths.mean_square / (2 * lengths.mean)
        full, drain = self._decode(batch, middle), dict.fromkeys(self._decode(1, 1), 0.0)
        width = lengths.longest / _POINTS
        for point in range(_POINTS):
            token = (point + 0.5) * width
            alive = lengths.longer_than(token)
            running = 1 - (1 - alive) ** work.num_sequences
            for name, value in self._decode(max(1.0, batch * alive), work.prompt + token).items():
                drain[name] += running * width * value
        steps = waiting * lengths.mean / batch
        return {name: value + steps * full[name] for name, value in drain.items()} | {"prompts": self._prefill(work)}

    def _decode(self, batch: float, context: float) -> dict[str, float]:
        """Seconds of one decoding step."""
        shape, ranks = self.shape, self.tensor_parallel_size
        bandwidth = self.gpu.memory_bandwidth * MEMORY_EFFICIENCY
        weights = self._weights_read(batch) * self.dtype_bytes / ranks / bandwidth
        shards = min(ranks, shape.num_kv_heads)
        cache = batch * context * shape.key_value_bytes(self.dtype_bytes) / shards / bandwidth
        compute = batch * shape.forward_flops(context) / ranks / (self.gpu.bf16_flops * MATMUL_EFFICIENCY["bf16"])
        reduced = (
            2 * 2 * batch * shape.hidden_size * (ranks - 1) / ranks / (self.gpu.nvlink_bandwidth * LINK_EFFICIENCY)
        )
        transfers = 2 * shape.num_layers * (reduced + ALL_REDUCE_SECONDS) if ranks > 1 else 0.0
        return {
            "reading weights": weights,
            "reading key-value cache": cache,
            "computing": max(0.0, compute - weights - cache),
            "transfers": transfers,
            "step overhead": self.step_seconds,
        }

    def _weights_read(self, batch: float) -> float:
        """Parameters that a decoding step reads."""
        shape = self.shape
        if not shape.num_experts:
            return shape.num_parameters - (0 if shape.tied else shape.embedding)
        visited = 1 - (1 - shape.experts_per_token / shape.num_experts) ** batch
        experts = shape.num_layers * shape.num_experts * shape.expert_matrices
        return shape.num_parameters - experts * (1 - visited) - (0 if shape.tied else shape.embedding)

    def _prefill(self, work: Workload) -> float:
        prompts = -(-work.num_prompts // self.num_servers) * work.prompt
        rate = self.gpu.bf16_flops * MATMUL_EFFICIENCY["bf16"] * self.tensor_parallel_size
        return prompts * self.shape.forward_flops(work.prompt, scored=0) / rate

    def sync_seconds(self, replicas: int) -> float:
        """Seconds of a weight sync: each replica's first rank feeds its share of the servers, side by side.

        fixed + bytes / min(SYNC_BANDWIDTH, network bandwidth / servers of a replica)
        """
        servers = -(-self.num_servers // replicas)
        bandwidth = min(SYNC_BANDWIDTH, self.gpu.network_bandwidth * LINK_EFFICIENCY / servers)
        return SYNC_SECONDS + self.shape.num_parameters * self.dtype_bytes / bandwidth

    def host_sync_seconds(self) -> float:
        """The same through host memory, which servers on the trainers' GPUs share: every GPU has a bus of its own."""
        bandwidth = min(SYNC_BANDWIDTH, self.gpu.host_bandwidth * HOST_COPY_EFFICIENCY)
        return SYNC_SECONDS + self.shape.num_parameters * self.dtype_bytes / bandwidth


@lru_cache(maxsize=1024)
def _sampling_seconds(sampler: Sampler, work: Workload) -> Mapping[str, float]:
    """A search asks for the same servers again and again."""
    return sampler.integrate(work)
