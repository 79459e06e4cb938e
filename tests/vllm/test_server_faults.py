"""A push to servers of which one hangs or is not there, and one that breaks off: who has the weights is known."""

from collections.abc import Iterator, Sequence

import psutil
import pytest
import torch
from torch import Tensor

from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.vllm.channels import write_files
from nemo_jepo.rollout.vllm.pool import Pool
from nemo_jepo.rollout.vllm.push import Pushed, WeightTransfer
from nemo_jepo.utils.http import ServerFault
from tests.support.pushes import PROMPTS, assert_samples_with, request, stream, transfer_of
from tests.support.serving import KEY, VOCAB, Server, SharedServers
from tests.support.vllm_processes import named, needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(900)]


def stopping(worker: psutil.Process, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The stream; the worker stops, without ending, when it has read a few tensors."""
    for number, item in enumerate(tensors):
        if number == 5:
            worker.suspend()
        yield item


def test_a_worker_that_hangs_is_named_and_the_other_server_gets_the_weights_once_more(servers, tmp_path):
    (old, new), both = servers.models, servers.alike()
    urls = [server.url for server in both]
    worker = max(named(both[0].process.pid, "Worker"), key=lambda process: process.pid)
    pool = Pool(urls, VLLMConfig(), KEY, VOCAB)
    with transfer_of(pool, new, tmp_path, sync_timeout_s=60.0) as transfer:  # a worker waits twice as long for tensors
        first = transfer.push(urls, stream(old), 1)
        assert first == Pushed(updated=tuple(urls)), first.lost
        transfer._settings.sync_timeout_s = 10.0
        try:
            pushed = transfer.push(urls, stopping(worker, stream(new)), 2)
        finally:
            worker.resume()
        assert pushed.waiting == (urls[1],) and list(pushed.lost) == urls[:1], pushed
        fault = pushed.lost[urls[0]]
        assert "\n" not in fault and "missing rank 1 (has " in fault and " of 20 tensors, the last model." in fault
        transfer._settings.sync_timeout_s = 60.0  # as at first: the other worker waits twice that long
        assert transfer.push(pushed.waiting, stream(new), 2) == Pushed(updated=(urls[1],))
        assert_samples_with(pool, new, 2, urls[1:])
        # Half-loaded weights: another push makes it whole, or the server stays out; never anything in between.
        again = transfer.push(urls, stream(old), 3)
        if again.waiting:
            again = transfer.push(again.waiting, stream(old), 3)
        assert urls[1] in again.updated
        assert_samples_with(pool, old, 3, again.updated)
    pool.close()
    give_up_what_broke(servers, both, again)


def give_up_what_broke(servers: SharedServers, used: Sequence[Server], pushed: Pushed) -> None:
    for server in used:
        if server.url not in pushed.updated:
            servers.give_up(server)


def test_a_server_that_is_killed_in_mid_push_is_lost_at_once_and_requests_in_flight_at_the_other_go_on(
    servers, tmp_path
):
    """The other's requests are paused meanwhile, and end with the new weights."""
    (old, new), lost = servers.models, servers.take()
    (other,) = servers.alike(1)
    urls = [lost.url, other.url]
    pool = Pool(urls, VLLMConfig(), KEY, VOCAB)

    def killing() -> Iterator[tuple[str, Tensor]]:
        for number, item in enumerate(stream(new)):
            if number == 5:
                for process in psutil.Process(lost.process.pid).children(recursive=True):
                    process.kill()
            yield item

    with transfer_of(pool, new, tmp_path, sync_timeout_s=5000.0) as transfer:  # more than this test may take
        first = transfer.push(urls, stream(old), 1)
        assert first == Pushed(updated=tuple(urls)), first.lost
        pool.admit(other.url, 1)
        work = pool.submit(PROMPTS * 4, request(max_tokens=80), (), only=other.url)
        pushed = transfer.push(urls, killing(), 2)
        assert pushed.waiting == (other.url,) and list(pushed.lost) == [lost.url]
        again = transfer.push(pushed.waiting, stream(new), 2)
        assert again == Pushed(updated=(other.url,)), again
        assert len(work.result()) == 32
        assert_samples_with(pool, new, 2, [other.url])
    pool.close()
    lost.end()


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
        assert_samples_with(pool, old, 5, again.updated)
    pool.close()
    give_up_what_broke(servers, one, again)


def assert_next_push_is_whole(pool, url, new, folder):
    with transfer_of(pool, new, folder) as transfer:
        pushed = transfer.push([url], stream(new), 5)
        assert pushed == Pushed(updated=(url,)), pushed.lost
        assert_samples_with(pool, new, 5, [url])


def test_an_update_that_a_dead_trainer_left_open_does_not_keep_the_next_one_out(servers, tmp_path):
    """It died between the beginning and the first tensor."""
    _, new = servers.models
    (server,) = servers.alike(1)
    pool = Pool([server.url], VLLMConfig(), KEY, VOCAB)
    pool.control(server.url, "POST", "/pause", params={"mode": "keep"})
    pool.control(server.url, "POST", "/start_weight_update")
    assert_next_push_is_whole(pool, server.url, new, tmp_path)
    pool.close()


def test_files_that_are_not_the_models_weights_are_refused_and_the_next_push_makes_the_server_whole(servers, tmp_path):
    _, new = servers.models
    (server,) = servers.alike(1)
    pool = Pool([server.url], VLLMConfig(), KEY, VOCAB)
    empty, half, other = (tmp_path / name for name in ("empty", "half", "other"))
    empty.mkdir()
    torch.save(dict(stream(new)), empty / "model.bin")
    write_files(((name, tensor) for name, tensor in stream(new) if "k_proj" not in name), half)
    write_files([("model.layers.7.mlp.down_proj.weight", torch.zeros(64, 96))], other)
    for folder in (str(empty), str(half), str(other), str(tmp_path / "none"), "weights"):
        with pytest.raises(ServerFault, match="status 500"):
            pool.control(server.url, "POST", "/collective_rpc", {"method": "load_files", "kwargs": {"folder": folder}})
    assert_next_push_is_whole(pool, server.url, new, tmp_path)
    pool.close()


def test_a_push_that_leaves_a_layer_out_is_an_error(servers, tmp_path):
    _, new = servers.models
    (server,) = servers.alike(1)
    pool = Pool([server.url], VLLMConfig(), KEY, VOCAB)
    part = [(name, tensor) for name, tensor in stream(new) if not name.startswith("model.layers.1.")]
    shapes = [(name, tuple(tensor.shape)) for name, tensor in part]
    transfer = WeightTransfer(pool.control, VLLMConfig(), shapes, torch.float32, tmp_path)
    assert server.url in transfer.push([server.url], part, 6).lost
    transfer.close()
    with transfer_of(pool, new, tmp_path) as transfer:
        assert transfer.push([server.url], stream(new), 7) == Pushed(updated=(server.url,))
        assert_samples_with(pool, new, 7, [server.url])
    pool.close()


def test_a_server_without_the_weights_of_the_push_is_reported(servers, tmp_path):
    _, new = servers.models
    pool = Pool(["http://127.0.0.1:9"], VLLMConfig(), KEY, VOCAB)
    with transfer_of(pool, new, tmp_path, sync_timeout_s=5.0) as transfer:
        ((url, fault),) = transfer.push(["http://127.0.0.1:9"], stream(new), 6).lost.items()
        assert url in fault and "No connection for weights was opened" in fault
    pool.close()
