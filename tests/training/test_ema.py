"""The moving average against its formula, and what it is a copy of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fluvial.errors import OptionError
from fluvial.model import Model
from fluvial.training.ema import EMA


class Counting(nn.Module):
    """Two layers whose weights are tied, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x, t):
        return self.second(self.first(x))


def walk(network: nn.Module, step: int) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * step
    network.calls += 1  # type: ignore[operator]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_follows_the_formula(decay):
    network = Counting()
    ema, expected = EMA(network, decay), network.first.bias.detach().double().clone()
    for n in range(1, 30):
        walk(network, n)
        ema.update()
        d = min(decay, (1 + n) / (10 + n))
        expected += (1 - d) * (network.first.bias.detach().double() - expected)
    torch.testing.assert_close(ema.network.first.bias.double(), expected, rtol=1e-5, atol=1e-6)
    assert ema.network.calls == network.calls == 29
    assert ema.network.second.weight is ema.network.first.weight


def test_is_a_network_of_its_own_that_samples():
    network = Counting()
    ema = EMA(network.train(), 0.9)
    assert not ema.network.training
    assert network.training
    assert not any(p.requires_grad for p in ema.network.parameters())
    model = Model(network, "vp", prediction="noise")
    averaged = ema.model(model)
    assert averaged.network is ema.network
    assert averaged.convention == model.convention
    before = ema.network.first.bias.clone()
    walk(network, 1)
    assert torch.equal(ema.network.first.bias, before)


def test_goes_on_from_its_state():
    network = Counting()
    one = EMA(network, 0.99)
    for n in range(5):
        walk(network, n)
        one.update()
    two = EMA(network, 0.99)
    two.load_state_dict(one.state_dict(), one.updates)
    for ema in (one, two):
        ema.update()
    assert torch.equal(one.network.first.weight, two.network.first.weight)


def test_keeps_small_differences_of_a_bfloat16_network():
    network = Counting().bfloat16()
    ema = EMA(network, 0.999)
    assert ema.network.first.weight.dtype == torch.float32
    with torch.no_grad():
        network.first.bias.fill_(1.0)
    for _ in range(20):
        ema.update()
    assert ema.network.first.bias.dtype == torch.float32
    assert (ema.network.first.bias < 1.0).any()


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_impossible_decay(decay):
    with pytest.raises(OptionError, match="ema_decay"):
        EMA(Counting(), decay)
