"""The wire of a weight push between processes of one node: host memory that both ends map.

NCCL takes no two processes on one GPU, so this is how weights reach servers that share the trainer's GPUs. The memory
is an anonymous file of the trainer's (memfd), which the others open under /proc: nothing is left behind, whoever dies,
and a container's /dev/shm may be small. It has two slots: while servers read one, the trainer fills the other.
Both ends use this module; it does not import vLLM.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_jepo.rollout.vllm.gloo import Shape, buckets

SLOT_BYTES = 256 << 20
"""Of a slot, unless one tensor is larger."""
SLOTS = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Where the memory is."""

    path: str
    """As another process of this node and this user opens it."""
    num_bytes: int


class SharedSlots:
    """Slots for tensors, on the trainer's side. Give it back with `close`.

    Args:
        shapes: of the tensors that will be sent, in order.
        dtype: of all of them.
    """

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype) -> None:
        self.buckets = list(buckets(shapes, dtype.itemsize, SLOT_BYTES))
        largest = max(map(sum, self.buckets), default=0) * dtype.itemsize
        self._slot_bytes = -(-largest // mmap.PAGESIZE) * mmap.PAGESIZE or mmap.PAGESIZE
        self._dtype = dtype
        self._file = os.memfd_create("nemo_jepo_weights")
        os.truncate(self._file, SLOTS * self._slot_bytes)
        self.place = Place(f"/proc/{os.getpid()}/fd/{self._file}", SLOTS * self._slot_bytes)
        self._memory = mapped(self.place)

    def fill(self, number: int, tensors: Iterator[Tensor]) -> int:
        """The next tensors of the stream into the slot of bucket `number`; where in the memory it begins."""
        start, bucket = number % SLOTS * self._slot_bytes, self.buckets[number]
        slot = self._memory[start:][: sum(bucket) * self._dtype.itemsize].view(self._dtype)
        for part in slot.split(bucket):
            tensor = next(tensors)
            part.view(tensor.shape).copy_(tensor, non_blocking=True)
            del tensor
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return start

    def close(self) -> None:
        """The file goes; the memory with it, once nobody maps it."""
        unpin(self._memory)
        os.close(self._file)


def mapped(place: Place) -> Tensor:
    """The memory as bytes, [n]; pinned where there is a GPU, so that copies go at the speed of its bus."""
    file = os.open(place.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = torch.frombuffer(mmap.mmap(file, place.num_bytes), dtype=torch.uint8)
    finally:
        os.close(file)
    if torch.cuda.is_available():
        code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), place.num_bytes, 0))
        if code != 0:
            raise RuntimeError(f"CUDA error {code} when {place.num_bytes} bytes for weights were to be pinned")
    return memory


def unpin(memory: Tensor) -> None:
    """Before the last reference to what `mapped` gave goes."""
    if torch.cuda.is_available():
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def tensors_at(memory: Tensor, start: int, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
    """Views of the tensors that lie side by side from byte `start` on; they are good until the next bucket but one."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = memory[start:][: sum(sizes) * dtype.itemsize].view(dtype)
    return [part.view(*shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
