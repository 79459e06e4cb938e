"""What the actor sets beside Megatron's own settings."""

import torch

from nemo_jepo.actor.optimizer import _add_gradients_in_products


class Product(torch.nn.Module):
    """A layer of Transformer Engine, as far as its gradients go."""

    fuse_wgrad_accumulation = False


def test_products_of_dense_layers_add_their_gradients_themselves():
    model = torch.nn.ModuleDict(
        {
            "layers": torch.nn.ModuleList([Product(), torch.nn.Linear(2, 2)]),
            "mlp": torch.nn.ModuleDict({"experts": torch.nn.ModuleDict({"fc1": Product()})}),
        }
    )
    _add_gradients_in_products(model)
    assert model["layers"][0].fuse_wgrad_accumulation
    assert not hasattr(model["layers"][1], "fuse_wgrad_accumulation")
    assert not model["mlp"]["experts"]["fc1"].fuse_wgrad_accumulation
