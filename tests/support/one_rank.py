"""A parallel layout of one rank, without processes: what a rank says is what all say."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def unchanged(value: Any) -> Any:
    return value


@dataclass
class OneRank:
    """In place of `nemo_jepo.actor.parallel.Layout`; a test replaces what another rank would have said."""

    rank: int = 0
    is_replica_head: bool = True
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    share_in_replica: Callable[[Any], Any] = unchanged
    any_over_world: Callable[[bool], bool] = unchanged
    sum_over_data_parallel: Callable[[Any], Any] = unchanged
    share_over_world: Callable[[Any], Any] = unchanged

    def barrier(self) -> None:
        """Nobody else to wait for."""
