"""Couplings against brute force, and what follows them."""

from __future__ import annotations

import itertools

import pytest
import torch

from fluvial import couplings
from fluvial.couplings import Independent, MinibatchOT, Pairs
from fluvial.errors import OptionError
from fluvial.model import Model
from fluvial.objectives import Objective
from problems import normal, one_line


def cost(noise, data):
    return float((noise - data).square().sum())


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("seed", range(4))
def test_ot_is_the_cheapest_of_all_assignments(n, seed):
    noise, data = normal(n, 2, 3, seed=seed), 1.0 + normal(n, 2, 3, seed=seed + 50)
    noise_index, data_index = MinibatchOT()(noise, data)
    found = cost(noise[noise_index], data[data_index])
    every = [cost(noise[list(order)], data) for order in itertools.permutations(range(n))]
    assert found == pytest.approx(min(every), rel=1e-12)


def test_ot_keeps_the_data_and_uses_every_noise_once():
    noise, data = normal(100, 3), normal(100, 3, seed=1)
    noise_index, data_index = MinibatchOT()(noise, data)
    assert data_index.tolist() == list(range(100))
    assert sorted(noise_index.tolist()) == list(range(100))
    assert noise_index.dtype == data_index.dtype == torch.int64
    assert cost(noise[noise_index], data) < 0.5 * cost(noise, data)


def test_ot_of_a_shuffled_batch_puts_it_back():
    data, order = normal(40, 5), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    noise_index, _ = MinibatchOT()(data[order] + 1e-3, data)
    assert torch.equal(order[noise_index], torch.arange(40))


def test_ot_does_not_mind_a_common_shift():
    """|data - noise|² changes by a constant, and so must not the assignment, though data be far away."""
    noise, data = normal(30, 2), normal(30, 2, seed=1)
    assert torch.equal(MinibatchOT()(noise, data)[0], MinibatchOT()(noise, data + 1e4)[0])


def test_ot_takes_float32():
    noise, data = normal(30, 2), normal(30, 2, seed=1)
    assert torch.equal(MinibatchOT()(noise.float(), data.float())[0], MinibatchOT()(noise, data)[0])


@pytest.mark.parametrize("coupling", [Independent(), Pairs()])
def test_as_they_come(coupling):
    for index in coupling(normal(5, 2), normal(5, 2, seed=1)):
        assert index.tolist() == [0, 1, 2, 3, 4]


def test_who_is_independent():
    assert Independent.independent
    assert not MinibatchOT.independent
    assert not Pairs.independent


def test_by_name():
    assert couplings.named("independent") == Independent()
    assert couplings.named("ot") == MinibatchOT()
    assert couplings.named("pairs") == Pairs()
    own = MinibatchOT()
    assert couplings.named(own) is own


@pytest.mark.parametrize("bad", ["optimal", lambda noise, data: None, 3])
def test_unknown_coupling(bad):
    with pytest.raises(OptionError, match="coupling") as caught:
        couplings.named(bad)
    one_line(caught.value)


class Reversed:
    """Reorders the data too, which the named couplings never do."""

    independent = False

    def __call__(self, noise, data):
        index = torch.arange(len(data))
        return index, index.flip(0)


@pytest.mark.parametrize("coupling", ["ot", Reversed()], ids=["ot", "reversed"])
def test_labels_follow_the_data(coupling):
    """The network sees, at each state, the label of the very data point mixed into it."""
    data, noise = normal(12, 2), normal(12, 2, seed=1)
    t, seen = torch.full((12,), 0.5, dtype=torch.float64), {}

    def network(x, t, label):
        seen.update(x=x, label=label)
        return x

    Objective(coupling=coupling)(
        Model(network, "rectified"), data, {"label": torch.arange(12)}, t=t, noise=noise, seed=0
    )
    mixed_in = 2 * seen["x"] - data[seen["label"]]  # the noise, if the label is that of the data
    distance = torch.cdist(mixed_in, noise).min(1)
    assert float(distance.values.max()) < 1e-12
    assert sorted(distance.indices.tolist()) == list(range(12))
    assert sorted(seen["label"].tolist()) == list(range(12))
