"""Where `nemo-jepo serve` listens: one private address of this machine."""

import socket

import pytest

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.rollout.vllm import server


def resolve(monkeypatch, *addresses: str) -> None:
    """Every name means these."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(server.socket, "getaddrinfo", lambda *_, **__: found)


@pytest.mark.parametrize("host", ["0.0.0.0", "8.8.8.8", "::", "0", "2001:4860:4860::8888"])
def test_a_public_address_is_refused(host):
    with pytest.raises(ConfigError, match="^--host=.*must not be reachable from outside"):
        server.checked_address(host, 0)


def test_every_address_of_a_name_is_checked_and_one_alone_is_taken(monkeypatch):
    resolve(monkeypatch, "127.0.0.1", "8.8.8.8")
    with pytest.raises(ConfigError, match="^--host='node': .*must not be reachable from outside"):
        server.checked_address("node", 0)
    resolve(monkeypatch, "127.0.0.1", "10.0.0.7")
    with pytest.raises(ConfigError, match="^--host='node': means 10.0.0.7, 127.0.0.1, where one IPv4 address"):
        server.checked_address("node", 0)
    resolve(monkeypatch, "127.0.0.5", "127.0.0.5")
    assert server.checked_address("node", 0) == "127.0.0.5"


def test_a_name_that_nobody_knows_and_ipv6_are_refused_in_one_line():
    with pytest.raises(ConfigError, match="^--host='::1': means ::1, where one IPv4 address is needed"):
        server.checked_address("::1", 0)
    for host in ("no.such.host.invalid", "a" * 70, ""):
        with pytest.raises(ConfigError, match=f"^--host='{host}': "):
            server.checked_address(host, 0)


def test_localhost_is_the_loopback_address():
    assert server.checked_address("localhost", 0) == "127.0.0.1"


def test_a_taken_port_and_one_that_is_none_are_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^--port={port}: 127.0.0.1:{port}: Address already in use"):
            server.checked_address("127.0.0.1", port)
    with pytest.raises(ConfigError, match="^--port=70000: "):
        server.checked_address("127.0.0.1", 70000)
