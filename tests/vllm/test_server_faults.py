"""A push to servers of which one hangs or is not there, and one that breaks off: who has the weights is known."""

from collections.abc import Iterator, Mapping, Sequence

import psutil
import pytest
from torch import Tensor

from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.vllm.pool import Pool
from tests.support.pushes import assert_samples_with, stream, transfer_of
from tests.support.serving import KEY, VOCAB, Server, SharedServers
from tests.support.vllm_processes import named, needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(900)]


def stopping(worker: psutil.Process, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The stream; the worker stops, without ending, when it has read a few tensors."""
    for number, item in enumerate(tensors):
        if number == 5:
            worker.suspend()
        yield item


def test_a_worker_that_hangs_is_named_and_the_other_server_is_synced_all_the_same(servers, tmp_path):
    (old, new), both = servers.models, servers.alike()
    urls = [server.url for server in both]
    worker = max(named(both[0].process.pid, "Worker"), key=lambda process: process.pid)
    pool = Pool(urls, VLLMConfig(), KEY, VOCAB)
    with transfer_of(pool, new, tmp_path, sync_timeout_s=20.0) as transfer:  # a worker waits twice as long for tensors
        assert transfer.push(urls, stream(old), 1) == {url: None for url in urls}
        transfer._settings.sync_timeout_s = 5.0
        try:
            faults = transfer.push(urls, stopping(worker, stream(new)), 2)
        finally:
            worker.resume()
        assert faults[urls[1]] is None
        fault = faults[urls[0]]
        assert fault is not None and "\n" not in fault
        assert "missing rank 1 (has " in fault and " of 20 tensors, the last model." in fault
        assert_samples_with(pool, new, 2, urls[1:])
        transfer._settings.sync_timeout_s = 20.0  # as at first: the other worker waits twice that long
        # Half-loaded weights: another push makes it whole, or the server stays out; never anything in between.
        again = transfer.push(urls, stream(new), 3)
        assert again[urls[1]] is None
        assert_samples_with(pool, new, 3, [url for url, fault in again.items() if fault is None])
    pool.close()
    give_up_what_broke(servers, both, again)


def give_up_what_broke(servers: SharedServers, used: Sequence[Server], faults: Mapping[str, str | None]) -> None:
    for server in used:
        if faults.get(server.url) is not None:
            servers.give_up(server)


def test_a_stream_that_breaks_off_ends_every_transfer_and_no_server_counts_as_synced(servers, tmp_path):
    (old, new), one = servers.models, servers.alike(1)
    urls = [server.url for server in one]
    pool = Pool(urls, VLLMConfig(), KEY, VOCAB)

    def broken() -> Iterator[tuple[str, Tensor]]:
        for number, item in enumerate(stream(new)):
            if number == 3:
                raise RuntimeError("a rank of the trainer is gone")
            yield item

    with transfer_of(pool, new, tmp_path, sync_timeout_s=20.0) as transfer:
        with pytest.raises(RuntimeError, match="a rank of the trainer is gone"):
            transfer.push(urls, broken(), 4)
        again = transfer.push(urls, stream(old), 5)
        assert_samples_with(pool, old, 5, [url for url, fault in again.items() if fault is None])
    pool.close()
    give_up_what_broke(servers, one, again)


def test_a_server_without_the_weights_of_the_push_is_reported(servers, tmp_path):
    _, new = servers.models
    pool = Pool(["http://127.0.0.1:9"], VLLMConfig(), KEY, VOCAB)
    with transfer_of(pool, new, tmp_path, sync_timeout_s=5.0) as transfer:
        ((url, fault),) = transfer.push(["http://127.0.0.1:9"], stream(new), 6).items()
        assert fault is not None and url in fault and "No connection for weights was opened" in fault
    pool.close()
