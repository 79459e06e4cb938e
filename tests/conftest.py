"""What every test runs under: one thread, no network, the same hypothesis examples each time; its tier's marker."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support import fork_server, rank_pool

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")

TESTS = Path(__file__).parent
SHARED = ("vllm", "slurm", "gpu")
LONGEST_FIRST = ("vllm", "slurm", "e2e", "distributed", "browser", "gpu", "unit")
"""Tiers by the length of the work that one xdist worker gets at once, so that none begins long work when others end."""


def pytest_configure(config: pytest.Config) -> None:
    folder = fork_server.make_session_folder()
    config.add_cleanup(lambda: fork_server.remove_session_folder(folder))
    config.add_cleanup(rank_pool.close_pools)  # which comes first


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test has the marker of its folder."""
    for item in items:
        item.add_marker(getattr(pytest.mark, item.path.relative_to(TESTS).parts[0]))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONGEST_FIRST.index(item.path.relative_to(TESTS).parts[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """A worker gets whole files, and of the tiers whose tests share servers or a cluster the whole tier."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, *_ = nodeid.split("::")
            tier = Path(file).parts[1]
            return tier if tier in SHARED else file

    config.option.loadscopereorder = False
    return ByFile(config, log)
