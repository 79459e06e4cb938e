"""Files that are whole or not there, and free ports."""

import hashlib
import os
import socket

import pytest

from nemo_jepo.utils.files import sha256_of, write_atomically
from nemo_jepo.utils.network import free_ports


def test_a_write_that_fails_leaves_what_the_file_held(tmp_path, monkeypatch):
    file = tmp_path / "settings.yaml"
    write_atomically(file, "answer: 42\n")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(file, "answer: 43\n")
    assert file.read_text() == "answer: 42\n"


def test_bytes_and_text_are_written_as_they_are_and_nothing_else_remains(tmp_path):
    write_atomically(tmp_path / "text", "Lösung\n")
    write_atomically(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == "Lösung\n".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "text"]
    assert sha256_of(tmp_path / "bytes") == hashlib.sha256(b"\x00\xff").hexdigest()


def test_free_ports_differ_and_can_be_opened():
    ports = free_ports(3)
    assert len(set(ports)) == 3
    for port in ports:
        with socket.create_server(("127.0.0.1", port)):
            pass
