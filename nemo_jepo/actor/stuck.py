"""Who is stuck, from what was seen of every rank. Pure: seconds in, ranks out; `heartbeat` sees and acts.

    silent          nothing was heard of it for so long: its process is stopped, its host or its network is gone
    not going on    it lives, and everybody has stood still for longer than the phase ever took, twice, and the patience

A healthy process is heard whatever it does. One that lives and does not go on is known only by what the others wait
for, so the second rule asks for more before it ends a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_jepo.utils.phases import ALONE

LONGEST_WAIT_S = 29 * 60.0
"""A wait for other ranks in a phase without a usual time: a little less than the 30 minutes of a collective, whose
error would name nobody."""
WAITS_FOR_RANKS = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/_functional_collectives.py",
    "core/pipeline_parallel/p2p_communication.py",
    "core/distributed/param_and_grad_buffer.py",
)
"""Files in which a rank waits for others. On a GPU it also does so wherever it reads a result."""
WAITS_FOR_SERVERS = ("/threading.py", "/selectors.py", "/queue.py", "/socket.py", "/ssl.py", "/subprocess.py")
"""Files in which a rank waits for something that has a time limit of its own: servers, workers, writers."""
SHOWN_FRAMES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is known of a rank. Seconds are the observer's."""

    rank: int
    host: str
    pid: int
    phase: str
    number: int
    """Of the phase, counted by the rank."""
    usual_s: float | None
    """The longest that the phase has taken before."""
    stack: tuple[str, ...] = ()
    """Its main thread, as path:line in function, outermost first."""
    ended: bool = False
    """It has said that it is done."""
    silent_s: float = field(default=0.0, compare=False)
    """Since it was last heard."""
    in_phase_s: float = field(default=0.0, compare=False)
    """Since its phase changed."""
    unmoved_s: float = field(default=0.0, compare=False)
    """Since its phase or its stack changed."""

    def is_in(self, files: Sequence[str]) -> bool:
        """Whether the main thread is in one of these files."""
        return bool(self.stack) and self.stack[-1].partition(":")[0].endswith(tuple(files))

    def shown(self, why: str) -> str:
        """The rank, why it is named, and where it is: one line, and one for each frame."""
        line = f"rank {self.rank} (host {self.host}, pid {self.pid}) is stuck: {why}; phase: {self.phase}"
        frames = [f"\n    {frame}" for frame in self.stack[-SHOWN_FRAMES:]]
        return line + (", at" + "".join(frames) if frames else "")


def silent(ranks: Sequence[Seen], limit_s: float) -> list[Seen]:
    """Those that were not heard for so long and have not said that they are done."""
    return [seen for seen in ranks if not seen.ended and seen.silent_s >= limit_s]


def not_going_on(ranks: Sequence[Seen], patience_s: float) -> list[Seen]:
    """Those that the others wait for, or that nobody can tell apart from these; [] while the run may yet go on.

    They are the ranks in the earliest phase. Where all are in the same one, they are those that do not wait for
    ranks; where all do, all.

    Args:
        ranks: all of the world.
        patience_s: beyond twice the longest time that the phase took before.
    """
    if any(seen.ended or seen.phase == ALONE for seen in ranks):
        return []
    waiting = [seen for seen in ranks if seen.is_in(WAITS_FOR_RANKS)]
    usual = [seen.usual_s for seen in ranks if seen.usual_s is not None]
    if len(usual) < len(ranks):
        is_over = any(seen.unmoved_s >= LONGEST_WAIT_S for seen in waiting)
    else:
        is_over = min(seen.in_phase_s for seen in ranks) >= 2 * max(usual) + patience_s
    if not is_over:
        return []
    first = min(seen.number for seen in ranks)
    behind = [seen for seen in ranks if seen.number == first]
    if len(behind) < len(ranks):
        return behind
    working = [seen for seen in ranks if seen not in waiting] or list(ranks)
    if len(working) == len(ranks) and all(seen.is_in(WAITS_FOR_SERVERS) for seen in ranks):
        return []
    return working
