"""The networks we offer: any size, a null class, and a config that builds them again."""

import json

import pytest
import torch

from fluvial import networks
from fluvial.errors import OptionError


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def stir(network, seed=0):
    """Weights that are nowhere zero: fresh networks answer 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network.eval()


SHAPES = [(1, 8, 8), (1, 28, 28), (3, 7, 7), (2, 1, 1), (1, 1, 30), (3, 9, 14), (2,), (5,), (3, 11)]


@pytest.mark.parametrize("num_classes", [None, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_comes_out_as_it_went_in(shape, num_classes):
    network = stir(networks.for_data(shape, num_classes, width=8))
    x, t = torch.randn(3, *shape), torch.tensor([0.0, 0.3, 1.0])
    label = None if num_classes is None else torch.tensor([0, 3, 4])
    out = network(x, t, label=label)
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert network.channels == shape[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_config_builds_the_same_architecture(shape):
    network = stir(networks.for_data(shape, 3, width=16))
    config = json.loads(json.dumps(network.config()))
    again = networks.from_config(config).eval()
    assert again.config() == network.config()
    assert again.state_dict().keys() == network.state_dict().keys()
    again.load_state_dict(network.state_dict())
    x, t, label = torch.randn(2, *shape), torch.rand(2), torch.tensor([1, 3])
    assert torch.equal(again(x, t, label=label), network(x, t, label=label))


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)])
def test_no_label_is_the_null_class(shape):
    network = stir(networks.for_data(shape, 5, width=16))
    x, t = torch.randn(2, *shape), torch.tensor([0.2, 0.7])
    assert torch.equal(network(x, t), network(x, t, label=torch.tensor([5, 5])))
    assert not torch.equal(network(x, t), network(x, t, label=torch.tensor([4, 4])))
    with pytest.raises(OptionError, match="without classes"):
        networks.for_data(shape, width=16)(x, t, label=torch.tensor([0, 0]))


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)])
def test_it_starts_at_zero_and_every_weight_then_learns(shape):
    network = networks.for_data(shape, 5, width=16)
    x, t, label = torch.randn(6, *shape), torch.rand(6), torch.arange(6)
    assert torch.equal(network(x, t, label=label), torch.zeros_like(x))
    stir(network)(x, t, label=label).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)])
def test_time_keeps_the_precision_it_came_with(shape):
    network = stir(networks.for_data(shape, width=16)).double()
    x, t = torch.randn(2, *shape, dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64)
    t = t * 1000 if len(shape) == 3 else t
    with torch.no_grad():
        apart = network(x, t * (1 + 1e-11)) - network(x, t)
    assert 0 < float(apart.abs().max()) < 1e-8


def test_padding_does_not_touch_sizes_that_fit():
    network = stir(networks.unet(1, 8, width=16))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([10.0, 900.0])
    assert torch.equal(network(x, t), network.unet(x, t).sample)


def test_the_diffusers_model_is_saved_and_loaded_by_diffusers(tmp_path):
    from diffusers import UNet2DModel

    network = stir(networks.unet(1, 8, num_classes=10, width=16))
    network.unet.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path).eval()
    assert loaded.config["num_class_embeds"] == 11
    x, t, label = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 417.3, 1000.0]), torch.tensor([0, 9, 10])
    torch.testing.assert_close(loaded(x, t, class_labels=label).sample, network(x, t, label=label))


def test_defaults_have_the_size_their_data_wants():
    assert count(networks.unet(1, 8, 10)) < 1_000_000
    assert count(networks.unet(1, 28, 10)) < 2_000_000
    assert networks.unet(1, 28).multipliers == networks.unet(1, 16).multipliers


@pytest.mark.parametrize(
    "make",
    [
        lambda: networks.unet(1, 8, width=30),
        lambda: networks.unet(0, 8),
        lambda: networks.unet(1, (8,)),
        lambda: networks.unet(1, 8, attention=[True]),
        lambda: networks.mlp(0),
        lambda: networks.mlp(2, depth=0),
        lambda: networks.from_config({"kind": "unett"}),
        lambda: networks.from_config({"kind": "mlp", "shape": [2], "wdth": 3}),
    ],
)
def test_what_cannot_be_built_is_refused(make):
    with pytest.raises(OptionError, match=r"expected|not a config"):
        make()
