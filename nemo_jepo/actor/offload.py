"""GPU memory that a trainer gives up while others use its GPU, and takes back bit for bit.

    weights          stay: they are what is pushed
    optimizer state  to host memory, pinned where there is a GPU and kept for the next time
    gradients        nowhere: every update begins by zeroing them

Storages are emptied in place, so that every tensor and view over them (Megatron cuts its buffers into many) is itself
again afterwards. Megatron-core 0.16.1's own Optimizer.offload_to_cpu gives parameters new memory instead: without bf16
those are the model's weights, which must not lose theirs.
"""

from collections.abc import Iterable, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, UntypedStorage


class Offload:
    """What one rank's training needs beside the weights, on its GPU or away.

    Args:
        chunks: wrapped by DDP.
        optimizer: over them.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        self._chunks, self._optimizer = chunks, optimizer
        self._away: list[tuple[UntypedStorage, int, Tensor | None]] = []  # with its bytes, and its copy if it has one
        self._host: list[Tensor] = []

    def release(self) -> None:
        """Give the memory up. Gradients are lost."""
        assert not self._away, "released already"
        self._optimizer.zero_grad()
        state = _storages(self._state_tensors())
        for place, storage in enumerate(state):
            host = self._host_memory(place, storage)
            host.copy_(_bytes(storage), non_blocking=True)
            self._away.append((storage, storage.nbytes(), host))
        gradients = _storages(buffer.grad_data for buffer in self._buffers())
        self._away += [(storage, storage.nbytes(), None) for storage in gradients]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for storage, _, _ in self._away:
            storage.resize_(0)

    def take_back(self) -> None:
        """Have it as it was; gradients are zero."""
        assert self._away, "nothing was released"
        for storage, size, host in self._away:
            storage.resize_(size)
            if host is None:
                _bytes(storage).zero_()
            else:
                _bytes(storage).copy_(host, non_blocking=True)
        self._away = []

    def _buffers(self) -> list:
        return [buffer for chunk in self._chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    def _state_tensors(self) -> Iterable[Tensor]:
        """Main weights and moments; not what shares its memory with the model's weights, nor what the host has."""
        weights = [weight for chunk in self._chunks for weight in chunk.parameters()]
        kept, device = {_address(weight) for weight in weights}, weights[0].device
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            inner = getattr(part, "optimizer", None)  # a rank may have no parameters of a kind
            if inner is None:
                continue
            parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
            moments = [value for state in inner.state.values() for value in state.values()]
            for tensor in (*parameters, *moments):
                if isinstance(tensor, Tensor) and tensor.device == device and _address(tensor) not in kept:
                    yield tensor

    def _host_memory(self, place: int, storage: UntypedStorage) -> Tensor:
        """Memory for a copy of the storage, that of the last time where it fits."""
        if place == len(self._host):
            self._host.append(torch.empty(0, dtype=torch.uint8))
        if self._host[place].nbytes != storage.nbytes():
            self._host[place] = torch.empty(
                storage.nbytes(), dtype=torch.uint8, device="cpu", pin_memory=storage.device.type == "cuda"
            )
        return self._host[place]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _storages(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """Those under the tensors, each once."""
    return list({_address(tensor): tensor.untyped_storage() for tensor in tensors}.values())


def _bytes(storage: UntypedStorage) -> Tensor:
    """All of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
