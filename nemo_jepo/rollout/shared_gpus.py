"""Whose the memory is on GPUs that trainers and vLLM servers share: one side gives it up before the other takes it.

    trainers --to_servers--> servers --to_trainers--> trainers

The trainers' model weights and the servers' CUDA graphs stay where they are.
"""

from typing import TYPE_CHECKING

from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.parallel import Layout
from nemo_jepo.config.errors import RunError

if TYPE_CHECKING:
    from nemo_jepo.rollout.vllm.colocated import ColocatedSampler


class SharedGPUs:
    """The trainers have them at first. All ranks of the world call every method.

    Args:
        actor: of this rank.
        layout: of this rank.
        sampler: of this replica, on its first rank; it wakes servers as it loads weights.
    """

    def __init__(self, actor: MegatronJEPOActor, layout: Layout, sampler: "ColocatedSampler | None") -> None:
        self._actor, self._layout, self._sampler = actor, layout, sampler

    def to_servers(self) -> None:
        """Every trainer has given its memory up on return; servers may wake."""
        self._actor.release_memory()
        self._layout.barrier()

    def to_trainers(self) -> None:
        """Put every server to sleep; then trainers have their memory again.

        Every replica samples from all servers, so none sleeps before the last replica has its batch.

        Raises:
            RunError: on every rank, where a server lives and does not sleep.
        """
        self._layout.barrier()
        faults = self._sampler.sleep() if self._sampler is not None else {}
        if self._layout.any_over_world(bool(faults)):
            seen = "; ".join(faults.values()) or "another replica's"
            raise RunError(f"a server does not sleep, so the trainers cannot have their GPUs again: {seen}")
        self._actor.take_back_memory()
