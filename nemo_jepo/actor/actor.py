"""The actor: a megatron-core model that scores and trains packed rows, under NeMo-Aligner's method names.

One update is: prepare_for_training_step, get_loss_and_metrics, finish_training_step. `train_step` runs the three.
docs/decisions/0009 says which names are NeMo-Aligner's.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from transformers import PretrainedConfig

from nemo_jepo.actor.activations import activation_bytes_per_token
from nemo_jepo.actor.forward import TokenHead, go_backward, num_micro_batches, run_rows, score_rows, scores_of, to_rows
from nemo_jepo.actor.kept_policy import KeptPolicy
from nemo_jepo.actor.model import HiddenStateGPTModel, build_chunks, unwrap
from nemo_jepo.actor.offload import Offload
from nemo_jepo.actor.optimizer import build_optimizer, wrap_data_parallel
from nemo_jepo.actor.parallel import Layout
from nemo_jepo.actor.precision import check_fp8, without_fp8
from nemo_jepo.actor.weights.families import Shape
from nemo_jepo.config.layouts import fp8_tokens
from nemo_jepo.config.schema import ModelConfig, OptimConfig
from nemo_jepo.data.packing import RowShape, idle_row
from nemo_jepo.types import PackedRow, Scores

GPU_TILE = 128
"""Tokens: what block-scaled FP8 quantises together, and a tile of a matrix product."""
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def row_shape(model: ModelConfig) -> RowShape:
    """Rows that the layout can cut into equal shards, and that suit FP8 and a GPU's matrix products."""
    multiple = math.lcm(model.segment_multiple, model.row_shards * fp8_tokens(model))
    return RowShape(
        max_tokens=model.tokens_per_micro_batch,
        share_prompts=model.share_prompts and model.context_parallel_size == 1,
        segment_multiple=model.segment_multiple,
        row_multiple=math.lcm(multiple, GPU_TILE) if torch.cuda.is_available() else multiple,
        one_length=model.pipeline_model_parallel_size > 1,
    )


class MegatronJEPOActor:
    """The policy on this rank: its part of the weights and of the optimizer state, and what can be asked of them."""

    def __init__(self, hf_config: PretrainedConfig, model: ModelConfig, precision: str, layout: Layout) -> None:
        """Build the model; weights/ then sets its weights through `chunks`.

        Raises:
            ConfigError: FP8 is asked for and cannot run here as it is set.
        """
        check_fp8(model, precision)
        self.hf_config = hf_config
        self.layout = layout
        self.model_config = model
        self._modules = build_chunks(hf_config, model, DTYPES[precision])
        self.scores_in_bf16 = False
        """True: scoring leaves FP8 out from now on (fp8_guard); training does not."""
        self.row_shape = row_shape(model)
        self._bytes_per_token = activation_bytes_per_token(Shape.of(hf_config), model, DTYPES[precision].itemsize)
        self._head = TokenHead(hf_config.vocab_size, model.logprob_chunk_tokens)
        self._reference: KeptPolicy | None = None
        self._sampler_policy: KeptPolicy | None = None
        self.sampler_policy_step: int | None = None
        """Optimizer steps in the weights that `keep_sampler_policy` kept; None where none are."""
        self._offload: Offload | None = None
        self.num_steps = 0

    @property
    def chunks(self) -> list[HiddenStateGPTModel]:
        """This rank's GPTModels, unwrapped: what weights/ reads and writes. One, but for virtual pipeline stages."""
        return [unwrap(module) for module in self._modules]

    def start_training(self, optim: OptimConfig, gradient_clip: float, max_steps: int) -> None:
        """An optimizer and schedule over the current weights. Once, after the weights are set."""
        assert not isinstance(self._modules[0], DistributedDataParallel), "already training"
        self._data_parallel = wrap_data_parallel(self._modules, optim.distributed)
        self._modules = list(self._data_parallel)
        self._optimizer, self._scheduler = build_optimizer(self._data_parallel, optim, gradient_clip, max_steps)
        self._offload = Offload(self._data_parallel, self._optimizer)

    def keep_reference_policy(self, *, samplers: bool = False) -> None:
        """Freeze the current weights as pi_ref; with `samplers` it is from now on what `keep_sampler_policy` kept."""
        self._reference = (
            self._sampler_policy if samplers else KeptPolicy(self._modules, self.model_config.reference_policy)
        )

    def keep_sampler_policy(self) -> None:
        """Keep the current weights as those that the samplers have from now on."""
        if self._sampler_policy is None:
            self._sampler_policy = KeptPolicy(self._modules, self.model_config.reference_policy)
        else:
            self._sampler_policy.keep()
        self.sampler_policy_step = self.num_steps

    def with_sampler_policy(self) -> AbstractContextManager[None]:
        """Inside the block the model holds what `keep_sampler_policy` kept; nothing may be trained."""
        assert self._sampler_policy is not None, "keep_sampler_policy comes first"
        return self._sampler_policy.in_place()

    # ---- scoring ----------------------------------------------------------------------------------------------

    def get_inference_log_probs(
        self, rows: Sequence[PackedRow], num_sequences: int, *, with_entropy: bool = True
    ) -> Scores:
        """Log-probs under the current weights, of every scored token, on every rank of the replica."""
        return self.get_log_probs_with_graph(rows, num_sequences, keep=False, with_entropy=with_entropy)[0]

    def get_log_probs_with_graph(
        self, rows: Sequence[PackedRow], num_sequences: int, keep: bool = True, *, with_entropy: bool = True
    ) -> tuple[Scores, list[Tensor]]:
        """The same, and what `get_loss_and_metrics` goes backward from; [] unless keep, where `keeps_graph` allows."""
        rows = self._micro_batches(rows)
        if not rows:
            nothing = (torch.zeros(0),) * num_sequences
            return Scores(policy_logprobs=nothing, entropies=nothing), []
        with self.in_bf16() if self.scores_in_bf16 else nullcontext():
            values, graph = score_rows(
                self._modules, rows, self._head, self.layout, with_entropy=with_entropy, keep_graph=keep
            )
        return scores_of(rows, values, num_sequences), graph

    def in_bf16(self) -> AbstractContextManager[None]:
        """Inside the block nothing is computed in FP8."""
        return without_fp8(self._modules)

    def get_init_policy_logprobs(self, rows: Sequence[PackedRow], num_sequences: int) -> Scores | None:
        """The same under the reference policy; None when none is kept (beta = 0)."""
        if self._reference is None:
            return None
        with self._reference.in_place():
            return self.get_inference_log_probs(rows, num_sequences, with_entropy=False)

    def keeps_graph(self, rows: Sequence[PackedRow]) -> bool:
        """Whether the scoring pass of these rows is to keep its graph for the update (model.update_passes).

        Auto compares the activations of all rows with half of `Layout.free_bytes`, on every rank; all ranks call.
        """
        passes = self.model_config.update_passes
        if passes == "two" or self.scores_in_bf16 or self.model_config.pipeline_model_parallel_size > 1:
            return False
        if passes == "one":
            return True
        tokens = sum(len(row.token_ids) for row in rows) / self.model_config.context_parallel_size
        return not self.layout.any_over_world(tokens * self._bytes_per_token > 0.5 * self.layout.free_bytes())

    # ---- training ---------------------------------------------------------------------------------------------

    def prepare_for_training_step(self) -> None:
        """Zero the gradients."""
        for module in self._data_parallel:
            module.zero_grad_buffer()
        self._optimizer.zero_grad()

    def get_loss_and_metrics(
        self, rows: Sequence[PackedRow], token_weights: Sequence[Tensor], graph: Sequence[Tensor] = ()
    ) -> tuple[float, dict[str, float]]:
        """The loss over this batch, and its gradients.

            loss = - sum_t weight_t log pi(token_t)     over the global batch

        A surrogate: its gradient is the update, its value measures nothing, but for supervised targets their mean NLL.

        Args:
            rows: this replica's packed rows; an empty list takes part with zero gradients.
            token_weights: N tensors [chain_length + answer_length], detached, global denominators included.
            graph: of the same rows, from `get_log_probs_with_graph`: no second forward pass is made. It is used up.
        Returns:
            (loss summed over data-parallel ranks, metrics); the same on every rank.
        """
        rows = self._micro_batches(list(rows) or [self._idle_row(rows)])
        weights = to_rows(rows, token_weights)
        if graph:
            reports = go_backward(self._modules, graph, weights, self.layout)
        else:
            reports = run_rows(self._modules, rows, self._head, self.layout, weights)
        loss = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        if self.layout.is_last_stage:
            loss += sum(report["loss"].double() for report in reports)
        loss = self.layout.sum_over_context(self.layout.from_last_stage(loss))
        total = self.layout.sum_over_data_parallel(loss).item()
        return total, {"surrogate_loss": total}

    def _micro_batches(self, rows: Sequence[PackedRow]) -> list[PackedRow]:
        """The rows, and idle ones where the layout needs more of them; all ranks of the data-parallel group call."""
        missing = num_micro_batches(len(rows), len(self._modules), self.layout) - len(rows)
        return [*rows, *[self._idle_row(rows)] * missing]

    def _idle_row(self, rows: Sequence[PackedRow]) -> PackedRow:
        shape = self.row_shape
        return idle_row(len(rows[0].token_ids) if rows and shape.one_length else shape.row_multiple, shape)

    def finish_training_step(self) -> dict[str, float]:
        """Clip, step, schedule. A non-finite gradient norm skips the step and says so in the metrics."""
        lr = self._optimizer.param_groups[0]["lr"]
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        finite = math.isfinite(grad_norm)
        if finite:
            self._optimizer.step()
        self._scheduler.step(1)
        self.num_steps += 1
        return {"grad_norm": grad_norm, "lr": float(lr), "skipped_step": float(not finite)}

    def train_step(
        self, rows: Sequence[PackedRow], token_weights: Sequence[Tensor], graph: Sequence[Tensor] = ()
    ) -> dict[str, float]:
        """One optimizer step; arguments as in `get_loss_and_metrics`."""
        self.prepare_for_training_step()
        _, metrics = self.get_loss_and_metrics(rows, token_weights, graph)
        return metrics | self.finish_training_step()

    # ---- a GPU that is shared -----------------------------------------------------------------------------------

    def release_memory(self) -> None:
        """Leave the GPU to others but for the weights: they can be streamed and scored with, not trained or saved."""
        if self._offload is not None:
            self._offload.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def take_back_memory(self) -> None:
        """Train again after `release_memory`, bit for bit as without it."""
        if self._offload is not None:
            self._offload.take_back()

    # ---- state ------------------------------------------------------------------------------------------------

    def sharded_weights(self) -> dict[str, Any]:
        """The weights as dist_checkpointing shards, independent of the layout."""
        shards = [chunk.sharded_state_dict(metadata=dict(_SHARDING)) for chunk in self.chunks]
        return {f"chunk_{number}": of_chunk for number, of_chunk in enumerate(shards)}

    @torch.no_grad()
    def load_weights(self, state: dict[str, Any]) -> None:
        """Take back what a checkpoint of sharded_weights holds.

        Transformer Engine's layers have extra state beside their weights, local ones have none; either loads the other.
        """
        for number, chunk in enumerate(self.chunks):
            odd = chunk.load_state_dict(state[f"chunk_{number}"], strict=False)
            names = [name for name in (*odd.missing_keys, *odd.unexpected_keys) if not name.endswith("_extra_state")]
            if names:
                raise RuntimeError(f"chunk {number}: the checkpoint's weights are not the model's: {', '.join(names)}")

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        """Weights, optimizer and schedule as dist_checkpointing shards, independent of the layout."""
        state: dict[str, Any] = {"model": self.sharded_weights()}
        state["optimizer"] = self._optimizer.sharded_state_dict(
            state["model"], is_loading=is_loading, metadata=dict(_SHARDING)
        )
        state["scheduler"] = self._scheduler.state_dict()
        state["num_steps"] = self.num_steps
        return state

    def sharded_sampler_policy(self) -> dict[str, Any]:
        """What `keep_sampler_policy` kept, as shards beside those of `sharded_weights`: copies."""
        with self.with_sampler_policy():
            shards = self.sharded_weights()
            for shard in nested_values(shards):
                if isinstance(shard, (ShardedTensor, ShardedTensorFactory)):
                    shard.data = shard.data.clone()
        add_prefix_for_sharding(shards, "sampler_policy.")
        return shards

    def load_sampler_policy(self, state: dict[str, Any], step: int) -> None:
        """Take back what a checkpoint of sharded_sampler_policy holds.

        Args:
            step: optimizer steps in them.
        """
        with self.with_sampler_policy():
            self.load_weights(state)
        self.sampler_policy_step = step

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what a checkpoint of sharded_state_dict holds."""
        self.load_weights(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self.num_steps = state["num_steps"]
