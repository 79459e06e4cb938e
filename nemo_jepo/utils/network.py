"""Ports of this host."""

import socket
from contextlib import ExitStack


def free_ports(count: int = 1, address: str = "127.0.0.1") -> list[int]:
    """Different ports of one address of this host that nobody uses now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server((address, 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]
