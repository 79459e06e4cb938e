"""What runs inside vLLM's processes, in this one: a push that was given up, and a model that got half of one."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nemo_jepo.rollout.vllm import gloo
from tests.support.vllm_processes import needs_vllm

pytestmark = needs_vllm


class Communicator:
    """A broadcast that waits for a lost rank, until the communicator is destroyed."""

    def __init__(self) -> None:
        self.destroyed = threading.Event()

    def destroy(self) -> None:
        self.destroyed.set()


@pytest.fixture
def receiver(monkeypatch) -> Any:
    """Receives over NCCL, of which nothing is here: vLLM's own part waits for the communicator."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    from nemo_jepo.rollout.vllm import plugin

    def join(engine: NCCLWeightTransferEngine, init_info: object) -> None:
        engine.model_update_group = Communicator()

    def receive(engine: NCCLWeightTransferEngine, update_info: SimpleNamespace) -> None:
        if update_info.waits:
            assert engine.model_update_group.destroyed.wait(60)

    monkeypatch.setattr(NCCLWeightTransferEngine, "init_transfer_engine", join)
    monkeypatch.setattr(NCCLWeightTransferEngine, "receive_weights", receive)
    receiver = object.__new__(plugin.WatchedNCCLReceiver)
    receiver.model_update_group = None
    return receiver


def init_info(store: Any) -> Any:
    from nemo_jepo.rollout.vllm.plugin import WatchedNCCLInit

    watched = {"address": "127.0.0.1", "port": store.port, "world_size": 2, "timeout_s": 20.0}
    return WatchedNCCLInit(master_address="x", master_port=1, rank_offset=1, world_size=2, watched=watched)


@pytest.mark.parametrize("end", ["gives up", "is gone"])
def test_a_server_leaves_a_push_that_its_trainer_gives_up_or_does_not_survive(receiver, end):
    store = gloo.open_store("127.0.0.1", 2, 20.0)
    receiver.init_transfer_engine(init_info(store))
    group = receiver.model_update_group
    with ThreadPoolExecutor(1) as executor:
        receiving = executor.submit(receiver.receive_weights, SimpleNamespace(waits=True))
        assert not group.destroyed.wait(1.5)
        if end == "gives up":
            gloo.give_up(store)
        else:
            del store
        with pytest.raises(RuntimeError, match="gave this weight push up"):
            receiving.result(30)
    assert receiver.model_update_group is None


def test_a_push_that_comes_to_its_end_keeps_its_group_and_a_new_trainer_takes_its_place(receiver):
    store = gloo.open_store("127.0.0.1", 2, 20.0)
    receiver.init_transfer_engine(init_info(store))
    group = receiver.model_update_group
    receiver.receive_weights(SimpleNamespace(waits=False))
    assert receiver.model_update_group is group and not group.destroyed.is_set()
    other = gloo.open_store("127.0.0.1", 2, 20.0)
    receiver.init_transfer_engine(init_info(other))
    assert group.destroyed.is_set() and receiver.model_update_group is not group


class TwoParameters(nn.Module):
    """A layer that is whole when both have come."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b"):
            parameter = nn.Parameter(torch.zeros(4), requires_grad=False)
            parameter.weight_loader = self.load  # type: ignore[attr-defined]
            setattr(self, name, parameter)

    @staticmethod
    def load(param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        param.data.copy_(loaded_weight)


def test_half_a_layer_of_a_push_that_broke_off_is_not_taken_for_a_part_of_the_next_one():
    """vLLM counts elements: a of the first push and a of the second are as many as a and b."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, record_metadata_for_reloading

    from nemo_jepo.rollout.vllm.plugin import begin_reload

    layer = TwoParameters()
    record_metadata_for_reloading(layer)
    begin_reload(layer)
    layer.a.weight_loader(layer.a, torch.full((4,), 1.0))
    begin_reload(layer)
    for parameter, value in ((layer.a, 2.0), (layer.b, 3.0)):  # known before the first is loaded, as vLLM's models do
        parameter.weight_loader(parameter, torch.full((4,), value))
    finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.float32))
    assert layer.a.tolist() == [2.0] * 4 and layer.b.tolist() == [3.0] * 4


def test_a_layer_of_which_nothing_has_come_is_named_and_the_next_reload_may_bring_it():
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    from nemo_jepo.rollout.vllm.reload import begin_reload, end_reload, layers_not_loaded

    model = nn.ModuleDict({"came": TwoParameters(), "did_not": TwoParameters()})
    record_metadata_for_reloading(model)
    begin_reload(model)
    for parameter in (model["came"].a, model["came"].b):
        parameter.weight_loader(parameter, torch.ones(4))
    assert layers_not_loaded(model) == ["did_not"]
    with pytest.raises(ValueError, match="^not all weights of did_not came"):
        end_reload(model, SimpleNamespace(dtype=torch.float32))
    begin_reload(model)
    for layer in model.values():
        for parameter in (layer.a, layer.b):
            parameter.weight_loader(parameter, torch.ones(4))
    end_reload(model, SimpleNamespace(dtype=torch.float32))
    assert model["did_not"].b.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("names", "shapes", "dtype_name"),
    [
        (["a", "a"], [[2], [2]], "float32"),
        (["a"], [[2], [2]], "float32"),
        ([1], [[2]], "float32"),
        (["a"], [[-2]], "float32"),
        (["a"], [[2]], "load"),
        (["a"], [[2]], "no_such"),
    ],
)
def test_a_description_that_is_of_no_tensors_is_refused(names, shapes, dtype_name):
    from nemo_jepo.rollout.vllm.reload import check_description

    with pytest.raises(ValueError):
        check_description(names, shapes, dtype_name)
    assert check_description(["a", "b"], [[2, 3], []], "bfloat16") is torch.bfloat16
