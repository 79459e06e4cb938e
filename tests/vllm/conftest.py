"""Two vLLM servers for every test that leaves them whole; no test leaves anything in /dev/shm."""

from collections.abc import Iterator

import pytest

from tests.support.serving import SharedServers
from tests.support.vllm_processes import orphaned_memory, wait_until


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServers]:
    shared = SharedServers(tmp_path_factory.mktemp("servers"))
    yield shared
    shared.close()


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Files in /dev/shm that no living process maps."""
    before = orphaned_memory()
    yield
    wait_until(lambda: not orphaned_memory() - before, seconds=30)
